// Casts the fp32 weights of a whole model to a half type, stored [K, R, S, C], in one launch.
//
// A block takes 2,048 elements of one weight, which it finds by a search over the running number of
// blocks. It writes 16 bytes a thread, neighbours side by side; it reads fp32 side by side too
// where the weight is stored [K, R, S, C] or is 1x1, else R*S apart, by way of the caches: 6 bytes
// per element, once a step.
#include "cuda/launch.h"
#include "fusedres/pack.h"

namespace fusedres {

constexpr int kPackVector = 8;
constexpr int64_t kPackBlock = int64_t{kThreads} * kPackVector;

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
  const int64_t numel = static_cast<int64_t>(entry.filters) * entry.channels * entry.taps;
  const int64_t begin = static_cast<int64_t>(blockIdx.x - plan.first[low]) * kPackBlock +
                        static_cast<int64_t>(threadIdx.x) * kPackVector;
  if (begin >= numel) return;
  const bool straight = entry.channels_last || entry.taps == 1;
  const bool whole = begin + kPackVector <= numel;
  float values[kPackVector];
  if (straight && whole && reinterpret_cast<uintptr_t>(entry.source) % 16 == 0) {
    const auto* const from = reinterpret_cast<const Vector<float, 4>*>(entry.source + begin);
    const Vector<float, 4> first = load_once(from), second = load_once(from + 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = first.values[i];
      values[4 + i] = second.values[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPackVector; ++i) {
      const int64_t at = begin + i < numel ? begin + i : numel - 1;
      int64_t from = at;
      if (!straight) {
        const int64_t row = at / entry.channels, c = at - row * entry.channels;  // row: (k, r, s)
        const int64_t k = row / entry.taps, tap = row - k * entry.taps;
        from = (k * entry.channels + c) * entry.taps + tap;
      }
      values[i] = entry.source[from];
    }
  }
  T* const out = static_cast<T*>(plan.params.buffer) + entry.offset + begin;
  const Vector<T, kPackVector> cast = rounded<T, kPackVector>(values);
  if (whole) {
    store(reinterpret_cast<Vector<T, kPackVector>*>(out), cast);
  } else {
#pragma unroll
    for (int i = 0; i < kPackVector; ++i) {
      if (begin + i < numel) out[i] = cast.values[i];
    }
  }
}

cudaError_t launch_pack(const PackParams& params, const CudaTarget& target, LaunchConfig* config) {
  if (params.count < 0 || params.count > PackParams::kMost) return cudaErrorInvalidValue;
  PackPlan plan;
  plan.params = params;
  int64_t blocks = 0;
  for (int i = 0; i < params.count; ++i) {
    const PackEntry& entry = params.entries[i];
    const int64_t numel = static_cast<int64_t>(entry.filters) * entry.channels * entry.taps;
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
