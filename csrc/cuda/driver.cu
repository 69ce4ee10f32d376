// Whether this machine can run CUDA kernels at all, asked without raising or initialising torch.
#include "fusedres/cuda_launch.h"

namespace fusedres {

const char* cuda_driver_problem() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaSuccess) return devices > 0 ? nullptr : "the driver reports no CUDA device";
  cudaGetLastError();  // the error is reported here, not by the next launch
  return cudaGetErrorString(status);
}

}  // namespace fusedres
