// The two ways to make conv_bn's 1x1 products, each in files of its own.
#pragma once

#include "cuda/conv_bn_launch.h"
#include "cuda/conv_bn_prologue.h"
#include "fusedres/conv_bn.h"

namespace fusedres {

// `plan` comes with rows, reduction, columns and sums, and goes with what ran; part
// [plan.chunks, sums, columns] gets the sums. cudaErrorNotSupported where nothing fits.
using RunForward = cudaError_t(const ConvBnFwdParams& p, float* part, const DeviceLimits& limits,
                               ProductPlan* plan, const CudaTarget& target, LaunchConfig* config);
using RunDgrad = cudaError_t(const ConvBnDgradParams& p, float* part, const DeviceLimits& limits,
                             ProductPlan* plan, const CudaTarget& target, LaunchConfig* config);
RunForward conv_bn_fwd_mma, conv_bn_fwd_wgmma;
RunDgrad conv_bn_dgrad_mma, conv_bn_dgrad_wgmma;

// Calls f with a tag of the half type.
template <class F>
cudaError_t dispatch_half(DType dtype, const F& f) {
  if (dtype == DType::kBFloat16) return f(Tag<BFloat16>{});
  if (dtype == DType::kFloat16) return f(Tag<Float16>{});
  return cudaErrorInvalidValue;
}

// Calls f with an InputKind.
template <class F>
cudaError_t dispatch_input(const ConvBnFwdParams& p, const F& f) {
  if (p.input.mean == nullptr) return f(std::integral_constant<int, kTensorInput>{});
  if (p.input.residual == nullptr) return f(std::integral_constant<int, kDeferredInput>{});
  return f(std::integral_constant<int, kJoinedInput>{});
}

// Calls f with numbers of columns that a piece may have, until one is supported.
template <int kFirst, int... kOthers, class F>
cudaError_t try_columns(const F& f) {
  const cudaError_t status = f(std::integral_constant<int, kFirst>{});
  if constexpr (sizeof...(kOthers) > 0) {
    if (status == cudaErrorNotSupported) return try_columns<kOthers...>(f);
  }
  return status;
}

}  // namespace fusedres
