// The weight gradient of a convolution whose input is still deferred. CPU only.
#pragma once

#include "fusedres/types.h"

namespace fusedres {

struct ConvWindow {
  int64_t height, width;                  // of the kernel
  int64_t stride_h, stride_w, top, left;  // zeros above and left of the input
  int64_t dilation_h, dilation_w;

  int64_t taps() const { return height * width; }
};

// dw[k, c, r, s] = sum over (n, oh, ow) of dy[n, k, oh, ow] * a[n, c, ih, iw], with
// ih = oh*stride_h - top + r*dilation_h and iw alike, and a zero outside of the input. a is x, or
// round(act((x - mean)*scale + bias)), act = ReLU or nothing.
struct ConvBnWgradParams {
  DType dtype;   // float32 or bfloat16
  Shape input;   // of x, in NHWC; c a multiple of kInBlock
  Shape output;  // of dy, in NHWC; c (K above) a multiple of kOutBlock
  ConvWindow window;
  bool relu;
  const void* dy;
  const void* x;
  const void* mean;  // [C], float, as are the next two; or null: a is x
  const void* scale;
  const void* bias;
  float* dw;
  int64_t stride_k, stride_c, stride_r, stride_s;  // of dw, in elements
  void* workspace;                                 // conv_bn_wgrad_workspace() bytes

  static constexpr int64_t kInBlock = 32, kOutBlock = 8;
};

int64_t conv_bn_wgrad_workspace(const ConvBnWgradParams& params);
void launch_conv_bn_wgrad(const ConvBnWgradParams& params, int threads);

}  // namespace fusedres
