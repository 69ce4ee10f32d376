// How launchers start kernels: on a device and a stream, with a grid that fits the device.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>

#include "common/dispatch.h"
#include "cuda/device.h"
#include "fusedres/cuda_launch.h"
#include "fusedres/types.h"

namespace fusedres {

constexpr int kThreads = 256;  // of a block, in every kernel
constexpr int kMaxDevices = 64;

// The one way to start a kernel.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), const LaunchConfig& config,
                   [[maybe_unused]] cudaStream_t stream, Args&&... args) {
#ifdef __CUDACC__
  cudaLaunchConfig_t how = {};
  how.gridDim = dim3(config.blocks);
  how.blockDim = dim3(config.threads);
  how.dynamicSmemBytes = config.shared_bytes;
  how.stream = stream;
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  how.attrs = &cooperative;
  how.numAttrs = config.cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&how, kernel, Params(std::forward<Args>(args))...);
#else
  return emulator::launch(reinterpret_cast<const void*>(kernel), dim3(config.blocks),
                          dim3(config.threads), config.shared_bytes, config.cooperative,
                          [&] { kernel(Params(args)...); });
#endif
}

// Blocks of kThreads threads that fit on the whole device at once; found once per kernel and
// device. The device must be current.
template <auto kKernel, size_t kSharedBytes>
cudaError_t resident_blocks(int device, int64_t* blocks) {
  static std::atomic<int> known[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (known[device] == 0) {
    int multiprocessors = 0, per_multiprocessor = 0;
    cudaError_t status =
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (status != cudaSuccess) return status;
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &per_multiprocessor, reinterpret_cast<const void*>(kKernel), kThreads, kSharedBytes);
    if (status != cudaSuccess) return status;
    if (per_multiprocessor == 0) return cudaErrorLaunchOutOfResources;
    known[device] = multiprocessors * per_multiprocessor;
  }
  *blocks = known[device];
  return cudaSuccess;
}

// Lets blocks of kKernel have up to `most` bytes of shared memory, once per device: a limit set for
// each launch would be lowered by one thread between another's setting and launch.
template <auto kKernel>
cudaError_t allow_shared(int device, int most) {
  static std::atomic<bool> allowed[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (allowed[device]) return cudaSuccess;
  const cudaError_t status = cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kKernel), cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  allowed[device] = status == cudaSuccess;
  return status;
}

// dispatch() of common/dispatch.h with float16, and with cudaError_t as what f returns.
template <class F>
cudaError_t dispatch_cuda(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Tag<float>{});
    case DType::kFloat16:
      return f(Tag<Float16>{});
    case DType::kBFloat16:
      return f(Tag<BFloat16>{});
    case DType::kFloat64:
      return f(Tag<double>{});
  }
  return cudaErrorInvalidValue;
}

// Whether every one of the pointers lies on 16 bytes; null does.
template <class... Pointers>
bool aligned_16(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

template <class... Pointers>
bool any_null(Pointers... pointers) {
  return ((pointers == nullptr) || ...);
}

}  // namespace fusedres
