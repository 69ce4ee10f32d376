// Forward by Hopper's warpgroups: see conv_bn_wgmma.h. Compiled for 9.0a alone.
#include "cuda/conv_bn.h"
#include "cuda/conv_bn_wgmma.h"

namespace fusedres {

#ifdef FUSEDRES_WITH_SM90A
namespace {

template <class T, int kKind, int kBN>
cudaError_t run(const ConvBnFwdParams& p, bool only_kept, float* part, const DeviceLimits& limits,
                ProductPlan* plan, const CudaTarget& target, LaunchConfig* config) {
  using Prologue = Activation<T, kKind>;
  using Layout = WgmmaLayout<kBN, Prologue::kSources, Prologue::kVectors>;
  constexpr auto kKernel = conv_bn_wgmma_kernel<T, kBN, Prologue, Statistics<T, kBN>, false>;
  if (plan->columns % kBN != 0 ||
      !fit_wgmma<Layout, Prologue::kSources>(plan, kBN, limits, only_kept)) {
    return cudaErrorNotSupported;
  }
  TensorMaps maps = {};
  const DType dtype = p.input.dtype;
  const int64_t rows = plan->rows, reduction = plan->reduction;
  cudaError_t status =
      describe(&maps.first, dtype, p.input.y, rows, reduction, reduction, kTileRows);
  if (status == cudaSuccess && Prologue::kSources == 2) {
    status = describe(&maps.second, dtype, p.input.residual, rows, reduction, reduction, kTileRows);
  }
  if (status == cudaSuccess) {
    status = describe(&maps.b, dtype, p.weight.data, plan->columns, reduction, reduction, kBN);
  }
  if (status == cudaSuccess) {
    status = allow_shared<kKernel>(target.device, limits.shared_of_block);
  }
  if (status != cudaSuccess) return status;
  *config = {"conv_bn_fwd_wgmma", plan->blocks(), kWgmmaThreads,
             static_cast<size_t>(Layout(*plan).bytes)};
  return launch(kKernel, *config, target.stream, p, maps, part, *plan);
}

}  // namespace

cudaError_t conv_bn_fwd_wgmma(const ConvBnFwdParams& p, float* part, const DeviceLimits& limits,
                              ProductPlan* plan, const CudaTarget& target, LaunchConfig* config) {
  return dispatch_half(p.input.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return dispatch_input(p, [&](auto kind) {
      const auto attempt = [&](bool only_kept) {
        return try_columns<256, 128, 64>([&](auto columns) {
          return run<T, decltype(kind)::value, decltype(columns)::value>(p, only_kept, part, limits,
                                                                         plan, target, config);
        });
      };
      const cudaError_t status = attempt(true);
      return status == cudaErrorNotSupported ? attempt(false) : status;
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
