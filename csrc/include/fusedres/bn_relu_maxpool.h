// The stem's maxpool(relu(bn(y))), forward and backward, without the activation in memory.
#pragma once

#include "fusedres/types.h"

namespace fusedres {

// A square window whose padding never wins; the index of its maximum must fit a byte.
struct PoolWindow {
  static constexpr int kMaxSize = 16;
  int size, stride, padding;

  int64_t pooled(int64_t extent) const {
    return extent + 2 * padding < size ? 0 : (extent + 2 * padding - size) / stride + 1;
  }
};

// p = maxpool(round(relu((y - mean)*scale + bias)))
struct BnReluMaxpoolFwdParams {
  DType dtype;
  Shape shape;  // of y
  PoolWindow window;
  int threads;
  const void* y;      // [N, C, H, W]
  const void* mean;   // [C], float (double for a double y); as are the next two
  const void* scale;  // [C]
  const void* bias;   // [C]
  void* p;            // [N, C, window.pooled(H), window.pooled(W)], in y's layout
};

// g = gradient of u = (y - mean)*scale + bias, rounded;  sums = (sum g, sum g*(y - mean)) over it.
// Each window's gradient goes to its first maximum in row-major order, or to its last NaN.
struct BnReluMaxpoolBwdParams {
  DType dtype;
  Shape shape;  // of y
  PoolWindow window;
  int threads;
  const void* grad;   // [N, C, window.pooled(H), window.pooled(W)]
  const void* y;      // [N, C, H, W]
  const void* mean;   // [C], float (double for a double y); as are the next two
  const void* scale;  // [C]
  const void* bias;   // [C]
  void* g;            // [N, C, H, W]
  void* sums;         // [2, C], like mean
  uint8_t* winners;   // workspace, one per element of grad: where in its window the maximum lies
  double* workspace;  // [partial_rows(shape), 2, C]
};

void launch_bn_relu_maxpool_fwd(const BnReluMaxpoolFwdParams& params);
void launch_bn_relu_maxpool_bwd(const BnReluMaxpoolBwdParams& params);

}  // namespace fusedres
