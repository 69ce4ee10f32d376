// Dgrad by mma.sync: see conv_bn_mma.h.
#include "cuda/conv_bn.h"
#include "cuda/conv_bn_mma.h"

namespace fusedres {

cudaError_t conv_bn_dgrad_mma(const ConvBnDgradParams& p, float* part, const DeviceLimits& limits,
                              ProductPlan* plan, const CudaTarget& target, LaunchConfig* config) {
  return dispatch_half(p.output.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return try_columns<128, 64>([&](auto columns) {
      constexpr int kBN = decltype(columns)::value;
      using Prologue = Gradient<T>;
      return run_mma<T, kBN, Prologue, MaskAndSum<T, kBN>, true>("conv_bn_dgrad_mma", p, part,
                                                                 limits, plan, target, config);
    });
  });
}

}  // namespace fusedres
