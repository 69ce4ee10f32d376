// Dgrad by Hopper's warpgroups: see conv_bn_wgmma.h. Compiled for 9.0a alone.
#include "cuda/conv_bn.h"
#include "cuda/conv_bn_wgmma.h"

namespace fusedres {

#ifdef FUSEDRES_WITH_SM90A
cudaError_t conv_bn_dgrad_wgmma(const ConvBnDgradParams& p, float* part, const DeviceLimits& limits,
                                ProductPlan* plan, const CudaTarget& target, LaunchConfig* config) {
  return dispatch_half(p.output.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return prefer_kept([&](bool only_kept) {
      return try_columns<128, 64>([&](auto columns) {
        constexpr int kBN = decltype(columns)::value;
        using Prologue = Gradient<T>;
        return run_wgmma<T, kBN, Prologue, MaskAndSum<T, kBN>, true>(
            "conv_bn_dgrad_wgmma", p, only_kept, part, limits, plan, target, config);
      });
    });
  });
}
#else
cudaError_t conv_bn_dgrad_wgmma(const ConvBnDgradParams&, float*, const DeviceLimits&, ProductPlan*,
                                const CudaTarget&, LaunchConfig*) {
  return cudaErrorNotSupported;
}
#endif

}  // namespace fusedres
