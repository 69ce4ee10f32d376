// out = relu(x + residual) and its backward. Element by element, so any one dense layout serves.
#pragma once

#include "fusedres/types.h"
#ifdef FUSEDRES_WITH_CUDA
#include <cuda_runtime_api.h>

#include "fusedres/cuda_launch.h"
#endif

namespace fusedres {

struct AddReluFwdParams {
  DType dtype;
  int64_t numel;
  const void* x;         // [numel]
  const void* residual;  // [numel]
  void* out;             // [numel], may be x or residual itself
};

// dx = out <= 0 ? 0 : grad; the gradient of x and of the residual alike.
struct AddReluBwdParams {
  DType dtype;
  int64_t numel;
  const void* grad;  // [numel]
  const void* out;   // [numel]
  void* dx;          // [numel], may be grad or out itself
};

void launch_add_relu_fwd(const AddReluFwdParams& params, int threads);
void launch_add_relu_bwd(const AddReluBwdParams& params, int threads);

#ifdef FUSEDRES_WITH_CUDA
// On the given device and stream; `config` tells what was launched, for error messages.
cudaError_t launch_add_relu_fwd(const AddReluFwdParams& params, const CudaTarget& target,
                                LaunchConfig* config);
cudaError_t launch_add_relu_bwd(const AddReluBwdParams& params, const CudaTarget& target,
                                LaunchConfig* config);
#endif

}  // namespace fusedres
