// What the rungs of the ladder share: the problem, and the words of its prologue and epilogue.
//
//   y[m, k] = relu((x[m, c] - mean)*scale + bias) @ w[k, c]^T
//
// x, w and y are bfloat16, the vectors and all sums float; what the prologue makes is rounded to
// bfloat16. c and k are multiples of 64, m is anything from 1 to 2^31 - 129. Rung 5 also leaves
// BatchNorm's statistics of y; those below it do not.
#pragma once

#include "cuda/launch.h"
#include "cuda/tensor_core.h"

namespace fusedres {

struct Problem {
  int64_t m;
  int c, k;
  const BFloat16 *x, *w;
  const float *mean, *scale, *bias;  // [c]
  BFloat16* y;
  float *y_mean, *y_var;  // [k]; only rung 5 writes them
  void* workspace;        // library_workspace() bytes
};

// cudaErrorNotSupported where c does not fit on the chip, or rung 5 cannot run on this device.
using Rung = cudaError_t(const Problem& p);
Rung run_naive, run_tiled, run_tma, run_warp_specialised;
Rung run_library_mma, run_library_mma_stats, run_library_wgmma, run_library_wgmma_stats;
cudaError_t library_workspace(const Problem& p, int64_t* bytes);

__device__ __forceinline__ float activate(float x, float mean, float scale, float bias) {
  const float value = (x - mean) * scale + bias;
  return relu_gate(value, value);
}

// --- for rungs with tiles: of a row of A or of B a tile holds 64 channels, 128 bytes -------------

constexpr int kLadderRows = 128;     // of x, and of y, in a tile: 16 for each of 8 warps
constexpr int kLadderChannels = 64;  // of a step

// Shared memory of the vectors, [3][c]. By all threads of the block, before its barrier.
__device__ __forceinline__ void load_vectors(const Problem& p, float* vectors) {
  for (int i = static_cast<int>(threadIdx.x); i < p.c; i += static_cast<int>(blockDim.x)) {
    vectors[i] = p.mean[i];
    vectors[p.c + i] = p.scale[i];
    vectors[2 * p.c + i] = p.bias[i];
  }
}

// The prologue on a warp's fragment of A, 16 rows by the 16 channels from `channel` on: of a lane's
// four words, two neighbours each, words 0 and 1 are of the first 8 channels.
__device__ __forceinline__ void activate_fragment(uint32_t (&a)[4], const float* vectors, int c,
                                                  int channel) {
  const int first = channel + fragment_pair(static_cast<int>(threadIdx.x) % 32) * 2;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const float* const mean = vectors + first + word / 2 * 8;
    float x[2];
    unpack(Packed<BFloat16, 2>{{a[word]}}, x);
#pragma unroll
    for (int i = 0; i < 2; ++i) x[i] = activate(x[i], mean[i], mean[c + i], mean[2 * c + i]);
    const Vector<BFloat16, 2> pair = rounded<BFloat16, 2>(x);
    memcpy(&a[word], &pair, sizeof pair);
  }
}

// A warp's 16 rows of the product, from `row` and `column` on, to y: those that exist. A lane has
// two neighbours of 8 columns, of one row and of the row 8 below it.
template <int kSize>
__device__ __forceinline__ void store_product(const Problem& p, const float (&d)[kSize],
                                              int64_t row, int column) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t r = row + fragment_row(lane) + half * 8;
    if (r >= p.m) continue;
    BFloat16* const out = p.y + r * p.k + column + fragment_pair(lane) * 2;
#pragma unroll
    for (int piece = 0; piece < kSize / 4; ++piece) {
      const float pair[2] = {d[piece * 4 + half * 2], d[piece * 4 + half * 2 + 1]};
      store(reinterpret_cast<Vector<BFloat16, 2>*>(out + piece * 8), rounded<BFloat16, 2>(pair));
    }
  }
}

// Starts a rung on device 0, with as much shared memory as it asks for.
template <auto kKernel, class... Args>
cudaError_t start_rung(const char* name, int64_t blocks, int threads, int64_t shared_bytes,
                       const Args&... args) {
  int most = 0;
  cudaError_t status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (status != cudaSuccess) return status;
  if (shared_bytes > most) return cudaErrorNotSupported;
  status = allow_shared<kKernel>(0, most);
  if (status != cudaSuccess) return status;
  const LaunchConfig config = {name, static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
                               static_cast<size_t>(shared_bytes)};
  return launch(kKernel, config, nullptr, args...);
}

}  // namespace fusedres
