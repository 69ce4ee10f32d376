// ReLU and its mask, on the host and on the device. Both comparisons are false for NaN, which
// therefore passes through, as it does in torch.relu and its backward.
#pragma once

#ifdef __CUDACC__
#define FUSEDRES_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FUSEDRES_HOST_DEVICE inline
#endif

namespace fusedres {

template <class Acc>
FUSEDRES_HOST_DEVICE Acc relu(Acc u) {
  return u <= Acc(0) ? Acc(0) : u;
}

// Gradient of the input of a ReLU whose output is a.
template <class Acc>
FUSEDRES_HOST_DEVICE Acc relu_bwd(Acc a, Acc grad) {
  return a <= Acc(0) ? Acc(0) : grad;
}

}  // namespace fusedres
