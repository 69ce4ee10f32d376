// out = relu(x + residual) and its backward on the CPU, split into equal ranges of elements.
//
// Forward reads two tensors and writes one, backward the same: 6 bytes per bf16 element, 12 per
// float. Backward needs out alone: its sign is the mask.
#include "fusedres/add_relu.h"

#include "common/dispatch.h"
#include "cpu/traversal.h"

namespace fusedres::FUSEDRES_CPU_LEVEL {
namespace {

template <class T>
void add_relu_fwd(const AddReluFwdParams& p, int threads) {
  const T* const x = static_cast<const T*>(p.x);
  const T* const residual = static_cast<const T*>(p.residual);
  T* const out = static_cast<T*>(p.out);
  for_each_element<T>(p.numel, threads, [=](auto lanes, int64_t i) {
    using L = decltype(lanes);
    const auto u = L::load(x + i) + L::load(residual + i);
    L::store(out + i, L::gate(u, u));
  });
}

template <class T>
void add_relu_bwd(const AddReluBwdParams& p, int threads) {
  const T* const grad = static_cast<const T*>(p.grad);
  const T* const out = static_cast<const T*>(p.out);
  T* const dx = static_cast<T*>(p.dx);
  for_each_element<T>(p.numel, threads, [=](auto lanes, int64_t i) {
    using L = decltype(lanes);
    L::put(dx + i, L::gate(L::load(out + i), L::load(grad + i)));
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

}  // namespace fusedres::FUSEDRES_CPU_LEVEL
