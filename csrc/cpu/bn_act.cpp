// BatchNorm apply, residual add and ReLU on the CPU, in one pass each way.
//
// Forward: element by element. Reads y [and residual], writes a: 2 or 3 tensors of traffic where
// three separate passes would move 5 to 7. Nothing is saved beyond what the caller already holds.
// Backward: reads grad [grad_extra] [a] y [res_y], writes g, and in the same pass sums what the
// gradients of weight, bias and mean need, over g as it was rounded, so that the sums belong to the
// gradient that flows on. Split as cpu/reduction.h describes.
#include "cpu/bn_act.h"

namespace fusedres::FUSEDRES_CPU_LEVEL {

void launch_bn_act_fwd(const BnActFwdParams& params, int threads) {
  dispatch(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* const a = static_cast<T*>(params.a);
    with_activation<T>(params, [&](const auto& value) {
      dispatch(streams(params.shape, a), [&](auto stream) {
        elementwise<T>(params.shape, threads, [=](auto lanes, int64_t o, int64_t c) {
          using L = decltype(lanes);
          stream ? L::stream(a + o, value(lanes, o, c)) : L::store(a + o, value(lanes, o, c));
        });
      });
    });
  });
}

void launch_bn_act_bwd(const BnActBwdParams& params, int threads) {
  dispatch(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_gated_gradient<T>(params, [&](const auto& gradient) {
      constexpr int kSums = std::decay_t<decltype(gradient)>::kSums;
      double* const partials = static_cast<double*>(params.workspace);
      sum_stage1<kSums, T>(params.shape, threads, partials, [](const Tile&) {}, gradient);
      settle_sums<T, kSums>(params, partials, partial_rows(params.shape), threads);
    });
  });
}

}  // namespace fusedres::FUSEDRES_CPU_LEVEL
