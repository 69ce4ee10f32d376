// Casts the fp32 weights of a whole model to a half type, stored [K, R, S, C], in one launch.
//
// A block takes 2,048 elements of one weight, which it finds by a search over the running number of
// blocks. It writes 16 bytes a thread, neighbours side by side; it reads fp32 side by side too
// where the weight is stored [K, R, S, C] or is 1x1, else R*S apart, by way of the caches: 6 bytes
// per element, once a step.
#include "cuda/launch.h"
#include "fusedres/pack.h"

namespace fusedres {

constexpr uint32_t kPackVector = 8, kPackBlock = kThreads * kPackVector;

// The entries, and the first block of each.
struct PackPlan {
  PackParams params;
  unsigned first[PackParams::kMost + 1];
};
static_assert(sizeof(PackPlan) <= 4096, "more than a kernel takes");

template <class T>
__global__ void __launch_bounds__(kThreads) pack_kernel(PackPlan plan) {
  int low = 0, high = plan.params.count;  // the last entry that begins at or before this block
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (plan.first[middle] <= blockIdx.x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const PackEntry& entry = plan.params.entries[low];
  const uint32_t channels = entry.channels, taps = entry.taps;
  const uint32_t numel = entry.filters * channels * taps;
  const uint32_t begin = (blockIdx.x - plan.first[low]) * kPackBlock + threadIdx.x * kPackVector;
  if (begin >= numel) return;
  const bool straight = entry.channels_last || taps == 1;
  float values[kPackVector];
  if (straight && begin + kPackVector <= numel &&
      reinterpret_cast<uintptr_t>(entry.source) % 16 == 0) {
    const auto* const from = reinterpret_cast<const Vector<float, 4>*>(entry.source + begin);
    const Vector<float, 4> first = load_once(from), second = load_once(from + 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = first.values[i];
      values[4 + i] = second.values[i];
    }
  } else {
#pragma unroll
    for (uint32_t i = 0; i < kPackVector; ++i) {
      const uint32_t at = begin + i < numel ? begin + i : numel - 1;
      uint32_t from = at;
      if (!straight) {
        const uint32_t row = at / channels, c = at - row * channels;  // row: (k, r, s)
        const uint32_t k = row / taps, tap = row - k * taps;
        from = (k * channels + c) * taps + tap;
      }
      values[i] = entry.source[from];
    }
  }
  // past the end too: the next weight begins on 16 bytes
  T* const out = static_cast<T*>(plan.params.buffer) + entry.offset + begin;
  store(reinterpret_cast<Vector<T, kPackVector>*>(out), rounded<T, kPackVector>(values));
}

cudaError_t launch_pack(const PackParams& params, const CudaTarget& target, LaunchConfig* config) {
  if (params.count < 0 || params.count > PackParams::kMost) return cudaErrorInvalidValue;
  PackPlan plan;
  plan.params = params;
  int64_t blocks = 0;
  for (int i = 0; i < params.count; ++i) {
    const PackEntry& entry = params.entries[i];
    const int64_t numel = static_cast<int64_t>(entry.filters) * entry.channels * entry.taps;
    if (numel > 0x7fffffff || entry.offset % kPackVector != 0) return cudaErrorInvalidValue;
    if (numel > 0 && any_null(entry.source, static_cast<const float*>(params.buffer))) {
      return cudaErrorInvalidValue;
    }
    plan.first[i] = static_cast<unsigned>(blocks);
    blocks += ceil_div(numel, kPackBlock);
  }
  plan.first[params.count] = static_cast<unsigned>(blocks);
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff || !aligned_16(params.buffer)) return cudaErrorInvalidValue;
  const DeviceGuard guard(target.device);
  if (guard.status() != cudaSuccess) return guard.status();
  *config = {"pack", static_cast<unsigned>(blocks), kThreads};
  if (params.dtype == DType::kBFloat16) {
    return launch(pack_kernel<BFloat16>, *config, target.stream, plan);
  }
  if (params.dtype == DType::kFloat16) {
    return launch(pack_kernel<Float16>, *config, target.stream, plan);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fusedres
