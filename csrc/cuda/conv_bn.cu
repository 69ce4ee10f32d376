// conv_bn's 1x1 convolutions on the GPU: one kernel with its prologue and epilogue, and the second
// stage of what it sums up.
//
// Forward reads the input [and residual] and the weight, writes y [and the activation]; backward
// reads g, y, the weight and what the epilogue needs of the input, writes dy and g_in: of a half
// type 2 bytes per element and tensor. Saved for backward: what the caller holds, and the
// activation where it was wanted. How a product is made: conv_bn_mma.h, conv_bn_wgmma.h.
#include <atomic>
#include <mutex>
#include <utility>

#include "cuda/batch_norm_finish.h"
#include "cuda/conv_bn.h"

namespace fusedres {

cudaError_t find_limits(int device, DeviceLimits* limits) {
  static DeviceLimits found[kMaxDevices];
  static std::atomic<bool> known[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (!known[device]) {
    DeviceLimits l;
    const std::pair<int*, cudaDeviceAttr> wanted[] = {
        {&l.multiprocessors, cudaDevAttrMultiProcessorCount},
        {&l.shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
        {&l.shared_of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
        {&l.major, cudaDevAttrComputeCapabilityMajor},
        {&l.minor, cudaDevAttrComputeCapabilityMinor}};
    for (const auto& [value, attribute] : wanted) {
      const cudaError_t status = cudaDeviceGetAttribute(value, attribute, device);
      if (status != cudaSuccess) return status;
    }
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!known[device]) found[device] = l;
    known[device] = true;
  }
  *limits = found[device];
  return cudaSuccess;
}

namespace {

cudaError_t check_product(const ProductPlan& plan, Product product, const DeviceLimits& limits) {
  constexpr int kBlock = ConvBnFwdParams::kCudaBlock;
  if (plan.reduction % kBlock != 0 || plan.columns % kBlock != 0) return cudaErrorInvalidValue;
  const int most =
      product == Product::kMma ? ConvBnFwdParams::kMostOfMma : ConvBnFwdParams::kMostOfWgmma;
  if (plan.reduction > most || plan.columns > most) return cudaErrorInvalidValue;
  if (plan.rows > 0x7fffffff - kTileRows) return cudaErrorInvalidValue;
  if (limits.major < 8) return cudaErrorNotSupported;
  const bool hopper = limits.major == 9 && limits.minor == 0;
  return product == Product::kWgmma && !hopper ? cudaErrorNotSupported : cudaSuccess;
}

ProductPlan plan_of(const Shape& from, int64_t reduction, int64_t columns, int sums) {
  ProductPlan plan = {};
  plan.rows = from.rows();
  plan.reduction = static_cast<int>(reduction);
  plan.columns = static_cast<int>(columns);
  plan.sums = sums;
  return plan;
}

cudaError_t ask_workspace(const Shape& from, int64_t columns, int sums, int device,
                          int64_t* bytes) {
  DeviceLimits limits;
  const cudaError_t status = find_limits(device, &limits);
  *bytes = most_chunks(from.rows(), limits) * sums * columns * static_cast<int64_t>(sizeof(float));
  return status;
}

int sums_of(const ConvBnDgradParams& p) {
  return p.input.sums == nullptr ? 0 : p.input.res_sums == nullptr ? 2 : 3;
}

}  // namespace

cudaError_t launch_conv_bn_fwd(const ConvBnFwdParams& p, Product product, const CudaTarget& target,
                               LaunchConfig* config) {
  const BnActFwdParams& in = p.input;
  if (in.shape.numel() == 0 || p.output.shape.c == 0) return cudaErrorInvalidValue;
  if (any_null(in.y, p.weight.data, static_cast<const void*>(p.y))) return cudaErrorInvalidValue;
  if (p.weight.dtype != in.dtype || !in.shape.channels_inner()) return cudaErrorInvalidValue;
  if (in.mean != nullptr && any_null(in.scale, in.bias)) return cudaErrorInvalidValue;
  if (in.mean == nullptr && (in.residual != nullptr || in.a != nullptr)) {
    return cudaErrorInvalidValue;
  }
  if (in.res_mean != nullptr && any_null(in.residual, in.res_scale, in.res_bias)) {
    return cudaErrorInvalidValue;
  }
  const bool training = p.output.training;
  if (training && p.workspace == nullptr) return cudaErrorInvalidValue;
  if (!aligned_16(in.y, in.residual, in.a, p.weight.data, p.y)) return cudaErrorMisalignedAddress;
  const DeviceGuard guard(target.device);
  if (guard.status() != cudaSuccess) return guard.status();
  DeviceLimits limits;
  cudaError_t status = find_limits(target.device, &limits);
  if (status != cudaSuccess) return status;
  ProductPlan plan = plan_of(in.shape, in.shape.c, p.output.shape.c, training ? 2 : 0);
  status = check_product(plan, product, limits);
  if (status != cudaSuccess) return status;
  float* const part = static_cast<float*>(p.workspace);
  RunForward& run = product == Product::kWgmma ? conv_bn_fwd_wgmma : conv_bn_fwd_mma;
  status = run(p, part, limits, &plan, target, config);
  if (status != cudaSuccess || !training) return status;
  return launch_batch_norm_finish(p.output, part, plan.chunks,
                                  static_cast<int64_t>(plan.tiles) * kTileRows, target.stream,
                                  config);
}

cudaError_t launch_conv_bn_dgrad(const ConvBnDgradParams& p, Product product,
                                 const CudaTarget& target, LaunchConfig* config) {
  const BatchNormBwdParams& out = p.output;
  const BnActBwdParams& in = p.input;
  if (in.shape.numel() == 0 || out.shape.c == 0) return cudaErrorInvalidValue;
  if (any_null(out.g, out.y, out.mean, out.scale, out.rstd, out.sums)) return cudaErrorInvalidValue;
  if (any_null(p.weight.data, static_cast<const void*>(in.g))) return cudaErrorInvalidValue;
  if (p.weight.dtype != out.dtype || !in.shape.channels_inner()) return cudaErrorInvalidValue;
  const int sums = sums_of(p);
  if (sums > 0 && any_null(in.y, in.mean, static_cast<const void*>(p.workspace))) {
    return cudaErrorInvalidValue;
  }
  if (sums == 3 && any_null(in.res_y, in.res_mean)) return cudaErrorInvalidValue;
  if (sums == 0 && (in.a != nullptr || in.scale != nullptr || in.res_sums != nullptr)) {
    return cudaErrorInvalidValue;
  }
  if ((in.scale == nullptr) != (in.bias == nullptr)) return cudaErrorInvalidValue;
  if (in.scale != nullptr && (in.a != nullptr || in.res_sums != nullptr)) {
    return cudaErrorInvalidValue;
  }
  if (p.sampled != nullptr && (in.grad_extra != nullptr || p.step_h < 1 || p.step_w < 1)) {
    return cudaErrorInvalidValue;
  }
  // Blocks beside each other, and pieces of one, still read g and y.
  if (out.dy != nullptr && (out.dy == out.g || out.dy == out.y)) return cudaErrorInvalidValue;
  if (!aligned_16(in.mean, in.scale, in.bias, in.res_mean)) return cudaErrorMisalignedAddress;
  if (!aligned_16(out.g, out.y, out.dy, p.weight.data, in.grad_extra, in.a, in.y, in.res_y, in.g,
                  p.sampled)) {
    return cudaErrorMisalignedAddress;
  }
  const DeviceGuard guard(target.device);
  if (guard.status() != cudaSuccess) return guard.status();
  DeviceLimits limits;
  cudaError_t status = find_limits(target.device, &limits);
  if (status != cudaSuccess) return status;
  ProductPlan plan = plan_of(in.shape, out.shape.c, in.shape.c, sums);
  status = check_product(plan, product, limits);
  if (status != cudaSuccess) return status;
  float* const part = static_cast<float*>(p.workspace);
  RunDgrad& run = product == Product::kWgmma ? conv_bn_dgrad_wgmma : conv_bn_dgrad_mma;
  status = run(p, part, limits, &plan, target, config);
  if (status != cudaSuccess || sums == 0) return status;
  return launch_finish_sums(const_cast<const float*>(part), plan.chunks, sums, in.shape.c,
                            static_cast<float*>(in.sums), static_cast<float*>(in.res_sums),
                            target.stream, config);
}

cudaError_t conv_bn_fwd_workspace(const ConvBnFwdParams& p, int device, int64_t* bytes) {
  return ask_workspace(p.input.shape, p.output.shape.c, p.output.training ? 2 : 0, device, bytes);
}

cudaError_t conv_bn_dgrad_workspace(const ConvBnDgradParams& p, int device, int64_t* bytes) {
  return ask_workspace(p.input.shape, p.input.shape.c, sums_of(p), device, bytes);
}

}  // namespace fusedres
