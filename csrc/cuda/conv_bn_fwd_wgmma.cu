// Forward by Hopper's warpgroups: see conv_bn_wgmma.h. Compiled for 9.0a alone.
#include "cuda/conv_bn.h"
#include "cuda/conv_bn_wgmma.h"

namespace fusedres {

#ifdef FUSEDRES_WITH_SM90A
cudaError_t conv_bn_fwd_wgmma(const ConvBnFwdParams& p, float* part, const DeviceLimits& limits,
                              ProductPlan* plan, const CudaTarget& target, LaunchConfig* config) {
  return dispatch_half(p.output.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return dispatch_input(p, [&](auto kind) {
      return prefer_kept([&](bool only_kept) {
        return try_columns<256, 128, 64>([&](auto columns) {
          constexpr int kBN = decltype(columns)::value;
          using Prologue = Activation<T, decltype(kind)::value>;
          return run_wgmma<T, kBN, Prologue, Statistics<T, kBN>, false>(
              "conv_bn_fwd_wgmma", p, only_kept, part, limits, plan, target, config);
        });
      });
    });
  });
}
#else
cudaError_t conv_bn_fwd_wgmma(const ConvBnFwdParams&, float*, const DeviceLimits&, ProductPlan*,
                              const CudaTarget&, LaunchConfig*) {
  return cudaErrorNotSupported;
}
#endif

}  // namespace fusedres
