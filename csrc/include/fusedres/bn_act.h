// Normalise, add a residual, apply ReLU: one pass; and its backward with the sums BatchNorm needs.
#pragma once

#include "fusedres/types.h"
#ifdef FUSEDRES_WITH_CUDA
#include "fusedres/cuda_launch.h"
#endif

namespace fusedres {

// a = act((y - mean)*scale + bias + r), act = ReLU or nothing, and r one of
//   0                                                  residual null
//   residual                                           res_mean null
//   (residual - res_mean)*res_scale + res_bias         the projection shortcut
struct BnActFwdParams {
  DType dtype;
  Shape shape;
  bool relu;
  const void* y;          // [N, C, H, W]
  const void* mean;       // [C], float (double for a double y); as are all vectors
  const void* scale;      // [C]
  const void* bias;       // [C]
  const void* residual;   // [N, C, H, W] or null
  const void* res_mean;   // [C] or null, as are the next two
  const void* res_scale;  // [C]
  const void* res_bias;   // [C]
  void* a;                // [N, C, H, W]
};

// da = grad [+ grad_extra];  g = a <= 0 ? 0 : da, rounded to the dtype;  over the rounded g:
//   sums     = (sum g, sum g*(y - mean))
//   res_sums = (sum g, sum g*(res_y - res_mean))
// Scale and bias may stand in for an activation without a residual, which is then computed from y
// anew, to the same bits. On the GPU g may be null: only the sums are wanted.
struct BnActBwdParams {
  DType dtype;
  Shape shape;
  const void* grad;        // [N, C, H, W]
  const void* grad_extra;  // [N, C, H, W] or null
  const void* a;           // [N, C, H, W], or null: no ReLU
  const void* y;           // [N, C, H, W]
  const void* mean;        // [C], float (double for a double y)
  const void* scale;       // [C], like mean, with bias and without a and res_y; or null
  const void* bias;        // [C]
  const void* res_y;       // [N, C, H, W] or null
  const void* res_mean;    // [C] or null
  void* g;                 // [N, C, H, W], may be grad itself; not written where it is that
  void* sums;              // [2, C], like mean
  void* res_sums;          // [2, C], or null without res_y
  void* workspace;         // CPU: double [partial_rows(shape), res_sums ? 3 : 2, C];
                           // CUDA: bn_act_bwd_workspace() bytes
};

void launch_bn_act_fwd(const BnActFwdParams& params, int threads);
void launch_bn_act_bwd(const BnActBwdParams& params, int threads);

#ifdef FUSEDRES_WITH_CUDA
// On the given device and stream; `config` tells what was launched, for error messages.
cudaError_t launch_bn_act_fwd(const BnActFwdParams& params, const CudaTarget& target,
                              LaunchConfig* config);
cudaError_t launch_bn_act_bwd(const BnActBwdParams& params, const CudaTarget& target,
                              LaunchConfig* config);
cudaError_t bn_act_bwd_workspace(const BnActBwdParams& params, int device, int64_t* bytes);
#endif

}  // namespace fusedres
