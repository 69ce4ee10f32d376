// Batch normalisation's passes over memory: statistics forward, gradient of the input backward; and
// forward all at once where the tensor fits on chip.
#pragma once

#include "fusedres/types.h"
#ifdef FUSEDRES_WITH_CUDA
#include "fusedres/bn_act.h"
#include "fusedres/cuda_launch.h"
#endif

namespace fusedres {

// Statistics of y and all that follows from them per channel. In training mean and biased var are
// the batch's and running statistics move towards mean and unbiased var; else they are copies of
// the running ones, and y is not read. On the CPU all vectors are of mean's type. An empty tensor
// has mean 0 and var 0.
struct BatchNormFwdParams {
  DType dtype;
  Shape shape;
  bool training;
  double momentum, eps;
  const void* y;                // [N, C, H, W]
  ConstVector weight, bias;     // [C], or null for ones and zeros
  ConstVector momentum_vector;  // [1], counts instead of momentum, or null
  MutableVector running_mean;   // [C], moved if training, else read; or null
  MutableVector running_var;    // [C], the same
  void* mean;                   // [C], float (double for a double y); as are the next four
  void* var;                    // [C], biased
  void* rstd;                   // [C]
  void* scale;                  // [C] = weight*rstd
  void* shift;                  // [C], a copy of bias
  void* workspace;  // CPU: double [partial_rows(shape), 1 + 2*C]; CUDA: *_workspace() bytes
};

// dy = scale*g + c0 + c1*(y - mean), with c0 = -scale*S0/M and c1 = -scale*rstd^2*S1/M in training,
// c0 = c1 = 0 where the statistics were constants. On the GPU, where bias is given, g has not been
// through the mask of relu((y - mean)*scale + bias), which is applied here.
struct BatchNormBwdParams {
  DType dtype;
  Shape shape;
  bool training;
  const void* g;          // [N, C, H, W]
  const void* y;          // [N, C, H, W]
  const void* mean;       // [C], float (double for a double y); as are the next three
  const void* scale;      // [C]
  const void* rstd;       // [C]
  const void* sums;       // [2, C]: S0 = sum g, S1 = sum g*(y - mean)
  const void* bias;       // [C], like mean, or null: g is masked already
  void* dy;               // [N, C, H, W], may be g or y itself
  void* workspace;        // CPU: [2, C], like sums: c0 and c1
  MutableVector dweight;  // [C] = S1*rstd, or null; on the CPU of mean's type, as is dbias
  MutableVector dbias;    // [C] = S0, or null
};

void launch_batch_norm_fwd(const BatchNormFwdParams& params, int threads);
void launch_batch_norm_bwd(const BatchNormBwdParams& params, int threads);

#ifdef FUSEDRES_WITH_CUDA
// On the given device and stream; `config` tells what was launched, for error messages.
cudaError_t launch_batch_norm_fwd(const BatchNormFwdParams& params, const CudaTarget& target,
                                  LaunchConfig* config);
cudaError_t launch_batch_norm_bwd(const BatchNormBwdParams& params, const CudaTarget& target,
                                  LaunchConfig* config);
cudaError_t batch_norm_fwd_workspace(const BatchNormFwdParams& params, int device, int64_t* bytes);

// launch_batch_norm_fwd in training and launch_bn_act_fwd by one cooperative kernel that reads y
// once: it stays in shared memory while the grid agrees on the statistics. `act` has y, the
// residual (a plain tensor, or null) and a; its mean, scale and bias are this kernel's results.
cudaError_t launch_batch_norm_act_fwd(const BatchNormFwdParams& params, const BnActFwdParams& act,
                                      const CudaTarget& target, LaunchConfig* config);
// Bytes of its workspace; 0 where y does not fit on the chip, or a tensor is not made of 16-byte
// vectors.
cudaError_t batch_norm_act_fwd_workspace(const BatchNormFwdParams& params,
                                         const BnActFwdParams& act, int device, int64_t* bytes);
#endif

}  // namespace fusedres
