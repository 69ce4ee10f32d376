// ReLU and its backward are one gate, on the host and on the device.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FUSEDRES_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Never a function of its own on the host: of the copies that CPU kernels are compiled to, the
// linker would keep one, which may use instructions that the machine does not have.
#define FUSEDRES_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fusedres {

// By a mask on the bits on the host: from a conditional, g++ makes a branch in the hottest loops,
// which then neither vectorise nor predict. On the device a conditional is one select.
FUSEDRES_HOST_DEVICE float zero_if(bool condition, float x) {
#ifdef __CUDA_ARCH__
  return condition ? 0.0f : x;
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits &= static_cast<uint32_t>(condition) - 1u;
  memcpy(&x, &bits, sizeof bits);
  return x;
#endif
}

FUSEDRES_HOST_DEVICE double zero_if(bool condition, double x) {
#ifdef __CUDA_ARCH__
  return condition ? 0.0 : x;
#else
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits &= static_cast<uint64_t>(condition) - 1u;
  memcpy(&x, &bits, sizeof bits);
  return x;
#endif
}

// `value` where ReLU lets it pass: forward u itself, backward the gradient, with u or the output as
// `decider`. The comparison is false for NaN, which therefore passes, as it does in torch.
// Round before the gate, not after it: the result is the same, and the rounding of a constant zero
// is no path of its own.
template <class Acc, class T>
FUSEDRES_HOST_DEVICE T relu_gate(Acc decider, T value) {
  return zero_if(decider <= Acc(0), value);
}

}  // namespace fusedres
