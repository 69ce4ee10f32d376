// Convolutions with the BatchNorm behind them, whose input may still be deferred. On the GPU those
// of 1x1 in float16 and bfloat16.
#pragma once

#include "fusedres/batch_norm.h"
#include "fusedres/bn_act.h"
#include "fusedres/types.h"
#ifdef FUSEDRES_WITH_CUDA
#include "fusedres/cuda_launch.h"
#endif

namespace fusedres {

struct ConvWindow {
  int64_t height, width;                  // of the kernel
  int64_t stride_h, stride_w, top, left;  // zeros above and left of the input
  int64_t dilation_h, dilation_w;

  int64_t taps() const { return height * width; }
};

// The gradient of the weight:
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

// A convolution of 1x1, stride 1 and no padding in NHWC, with the activation in front of it and the
// statistics behind it: launch_bn_act_fwd, y[n, k, h, w] = sum over c of a[n, c, h, w] * weight[k,
// c], and in training launch_batch_norm_fwd of that y. On the CPU the dtype is float or bfloat16;
// on the GPU it is a half type, the weight is of it, channels are multiples of kCudaBlock, nothing
// is empty and every tensor lies on 16 bytes.
struct ConvBnFwdParams {
  BnActFwdParams input;       // mean null: its y is the activation; a null: only the convolution
                              // wants it; c a multiple of kBlock
  ConstVector weight;         // [K, C], float or of the dtype; rounded to it
  BatchNormFwdParams output;  // of the same dtype, n, h and w; c (K above) a multiple of kBlock
  void* y;                    // [N, K, H, W], output.y
  void* workspace;            // conv_bn_fwd_workspace() bytes

  static constexpr int64_t kBlock = 32, kMostChannels = 4096;
  static constexpr int kCudaBlock = 64, kMostOfMma = 1024, kMostOfWgmma = 2048;  // channels
};

// The gradient of its input: launch_batch_norm_bwd, whose dy is written,
// da[n, c, h, w] = sum over k of dy[n, k, h, w] * weight[k, c], rounded to the dtype, and
// launch_bn_act_bwd of that da.
struct ConvBnDgradParams {
  BatchNormBwdParams output;  // of the dtype, n, h and w of the input; on the CPU bias null; on the
                              // GPU dy may be null, but neither g nor y
  ConstVector weight;         // [K, C], as forward
  BnActBwdParams input;       // grad is g; sums null: of an input that was no Deferred, of which
                              // there are but grad_extra and g = da
  const void* sampled;        // [N, C, ceil(H / step_h), ceil(W / step_w)]: joins da, rounded, at
                              // every step-th pixel; or null
  int64_t step_h, step_w;
  void* workspace;  // conv_bn_dgrad_workspace() bytes; those of output and input are in it
};

int64_t conv_bn_fwd_workspace(const ConvBnFwdParams& params);
void launch_conv_bn_fwd(const ConvBnFwdParams& params, int threads);
int64_t conv_bn_dgrad_workspace(const ConvBnDgradParams& params);
void launch_conv_bn_dgrad(const ConvBnDgradParams& params, int threads);
int64_t conv_bn_wgrad_workspace(const ConvBnWgradParams& params);
void launch_conv_bn_wgrad(const ConvBnWgradParams& params, int threads);

#ifdef FUSEDRES_WITH_CUDA
// The instruction that makes the product: that of every GPU from 8.0 on, or that of 9.0 alone.
enum class Product : int { kMma = 0, kWgmma = 1 };

// On the given device and stream; `config` tells what was launched, for error messages.
// cudaErrorNotSupported where the device has no such instruction, the build no code for it, or the
// channels do not fit on the chip.
cudaError_t launch_conv_bn_fwd(const ConvBnFwdParams& params, Product product,
                               const CudaTarget& target, LaunchConfig* config);
cudaError_t launch_conv_bn_dgrad(const ConvBnDgradParams& params, Product product,
                                 const CudaTarget& target, LaunchConfig* config);
cudaError_t conv_bn_fwd_workspace(const ConvBnFwdParams& params, int device, int64_t* bytes);
cudaError_t conv_bn_dgrad_workspace(const ConvBnDgradParams& params, int device, int64_t* bytes);
#endif

}  // namespace fusedres
