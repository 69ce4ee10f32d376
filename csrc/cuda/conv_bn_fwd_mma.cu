// Forward by mma.sync: see conv_bn_mma.h.
#include "cuda/conv_bn.h"
#include "cuda/conv_bn_mma.h"

namespace fusedres {

namespace {

template <class T, int kKind, int kBN>
cudaError_t run(const ConvBnFwdParams& p, float* part, const DeviceLimits& limits,
                ProductPlan* plan, const CudaTarget& target, LaunchConfig* config) {
  using Prologue = Activation<T, kKind>;
  using Epilogue = Statistics<T, kBN>;
  using Layout = MmaLayout<kBN, Prologue::kSources, Prologue::kVectors>;
  constexpr auto kKernel = conv_bn_mma_kernel<T, kBN, Prologue, Epilogue, false>;
  if (plan->columns % kBN != 0 || !fit_mma<Layout>(plan, kBN, Epilogue::kResidents, limits)) {
    return cudaErrorNotSupported;
  }
  const cudaError_t status = allow_shared<kKernel>(target.device, limits.shared_of_block);
  if (status != cudaSuccess) return status;
  *config = {"conv_bn_fwd_mma", plan->blocks(), kMultipliers,
             static_cast<size_t>(Layout(*plan).bytes)};
  return launch(kKernel, *config, target.stream, p, static_cast<const T*>(p.weight.data), part,
                *plan);
}

}  // namespace

cudaError_t conv_bn_fwd_mma(const ConvBnFwdParams& p, float* part, const DeviceLimits& limits,
                            ProductPlan* plan, const CudaTarget& target, LaunchConfig* config) {
  return dispatch_half(p.input.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return dispatch_input(p, [&](auto kind) {
      return try_columns<128, 64>([&](auto columns) {
        return run<T, decltype(kind)::value, decltype(columns)::value>(p, part, limits, plan,
                                                                       target, config);
      });
    });
  });
}

}  // namespace fusedres
