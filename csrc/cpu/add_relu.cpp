// out = relu(x + residual) and its backward on the CPU, split into equal ranges of elements.
//
// Forward reads two tensors and writes one, backward the same: 6 bytes per bf16 element, 12 per
// float. Backward needs out alone: its sign is the mask.
#include "fusedres/add_relu.h"

#include "common/activation.h"
#include "common/dispatch.h"
#include "common/traversal.h"

namespace fusedres {
namespace {

template <class T>
void add_relu_fwd(const AddReluFwdParams& p, int threads) {
  const T* const x = static_cast<const T*>(p.x);
  const T* const residual = static_cast<const T*>(p.residual);
  T* const out = static_cast<T*>(p.out);
  for_each_range(p.numel, threads, [=](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const auto u = to_acc(x[i]) + to_acc(residual[i]);
      out[i] = relu_gate(u, from_acc<T>(u));
    }
  });
}

template <class T>
void add_relu_bwd(const AddReluBwdParams& p, int threads) {
  const T* const grad = static_cast<const T*>(p.grad);
  const T* const out = static_cast<const T*>(p.out);
  T* const dx = static_cast<T*>(p.dx);
  for_each_range(p.numel, threads, [=](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      dx[i] = relu_gate(to_acc(out[i]), grad[i]);
    }
  });
}

}  // namespace

void launch_add_relu_fwd(const AddReluFwdParams& params, int threads) {
  dispatch(params.dtype,
           [&](auto tag) { add_relu_fwd<typename decltype(tag)::type>(params, threads); });
}

void launch_add_relu_bwd(const AddReluBwdParams& params, int threads) {
  dispatch(params.dtype,
           [&](auto tag) { add_relu_bwd<typename decltype(tag)::type>(params, threads); });
}

}  // namespace fusedres
