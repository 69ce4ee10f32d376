// The stem's maxpool(relu(bn(y))), forward and backward, without the activation in memory.
#pragma once

#include "fusedres/types.h"
#ifdef FUSEDRES_WITH_CUDA
#include "fusedres/cuda_launch.h"
#endif

namespace fusedres {

// A square window whose padding never wins; the index of its maximum must fit a byte.
struct PoolWindow {
  static constexpr int kMaxSize = 16;
  int size, stride, padding;

  bool valid() const {
    return 1 <= size && size <= kMaxSize && stride >= 1 && padding >= 0 && 2 * padding <= size;
  }
  int64_t pooled(int64_t extent) const {
    return extent + 2 * padding < size ? 0 : (extent + 2 * padding - size) / stride + 1;
  }
};

// p = maxpool(round(relu((y - mean)*scale + bias)))
struct BnReluMaxpoolFwdParams {
  DType dtype;
  Shape shape;  // of y
  PoolWindow window;
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
  const void* grad;   // [N, C, window.pooled(H), window.pooled(W)]
  const void* y;      // [N, C, H, W]
  const void* mean;   // [C], float (double for a double y); as are the next two
  const void* scale;  // [C]
  const void* bias;   // [C]
  void* g;            // [N, C, H, W]
  void* sums;         // [2, C], like mean
  uint8_t* winners;   // CPU: one per element of grad, where in its window the maximum lies
  void* workspace;    // CPU: double [partial_rows(shape), 2, C]; CUDA: *_workspace() bytes
};

void launch_bn_relu_maxpool_fwd(const BnReluMaxpoolFwdParams& params, int threads);
void launch_bn_relu_maxpool_bwd(const BnReluMaxpoolBwdParams& params, int threads);

#ifdef FUSEDRES_WITH_CUDA
// On the given device and stream; `config` tells what was launched, for error messages.
cudaError_t launch_bn_relu_maxpool_fwd(const BnReluMaxpoolFwdParams& params,
                                       const CudaTarget& target, LaunchConfig* config);
cudaError_t launch_bn_relu_maxpool_bwd(const BnReluMaxpoolBwdParams& params,
                                       const CudaTarget& target, LaunchConfig* config);
cudaError_t bn_relu_maxpool_bwd_workspace(const BnReluMaxpoolBwdParams& params, int device,
                                          int64_t* bytes);
#endif

}  // namespace fusedres
