// The second stage of every reduction to per-channel sums.
//
// A block takes kColumns columns of the partial rows [rows, count*C]: rows of 32 bytes, a sector.
// Its lanes add every kLanes-th row, then each other's sums; the order depends on `rows` alone.
#include "cuda/finish_sums.h"

namespace fusedres {

constexpr int kColumns = 8, kLanes = kThreads / kColumns;

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    finish_sums_kernel(const Acc* part, int64_t rows, int count, int64_t channels, Acc* sums,
                       Acc* res_sums) {
  Acc* const shared = shared_memory<Acc>();  // [kLanes][kColumns]
  const int column = static_cast<int>(threadIdx.x) % kColumns;
  const int lane = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t width = count * channels;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  Acc sum = 0;
  if (at < width) {
#pragma unroll 4
    for (int64_t row = lane; row < rows; row += kLanes) sum += part[row * width + at];
  }
  shared[threadIdx.x] = sum;
  for (int half = kLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) {
      sum += shared[threadIdx.x + half * kColumns];
      shared[threadIdx.x] = sum;
    }
  }
  if (lane > 0 || at >= width) return;
  if (at < 2 * channels) sums[at] = sum;
  if (count == 3 && at < channels) res_sums[at] = sum;
  if (at >= 2 * channels) res_sums[at - channels] = sum;
}

template <class Acc>
cudaError_t launch_finish_sums(const Acc* part, int64_t rows, int count, int64_t channels,
                               Acc* sums, Acc* res_sums, cudaStream_t stream,
                               LaunchConfig* config) {
  const int64_t blocks = ceil_div(count * channels, kColumns);
  if (blocks == 0) return cudaSuccess;
  *config = {"finish_sums", static_cast<unsigned>(blocks), kThreads, kThreads * sizeof(Acc)};
  return launch(finish_sums_kernel<Acc>, *config, stream, part, rows, count, channels, sums,
                res_sums);
}

template cudaError_t launch_finish_sums<float>(const float*, int64_t, int, int64_t, float*, float*,
                                               cudaStream_t, LaunchConfig*);
template cudaError_t launch_finish_sums<double>(const double*, int64_t, int, int64_t, double*,
                                                double*, cudaStream_t, LaunchConfig*);

}  // namespace fusedres
