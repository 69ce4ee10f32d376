// Rung 3: bulk copies (TMA) and products by warpgroups (wgmma), for Hopper alone.
//
// Against rung 2: one thread orders a step's two boxes, of x and of w. The hardware makes the
// addresses, permutes the chunks, fills rows past m with zeros, and reports to a barrier in shared
// memory how many bytes have come. A warpgroup of four warps multiplies 64 rows by 64 columns with
// one instruction for 16 channels: x as fragments from registers, where the prologue changes them,
// w by a descriptor from shared memory.
//
// Split: two warpgroups, 64 rows of the tile each; blocks as in rung 2.
//
// Bytes: as in rung 2. Instructions are fewer: no copies, no addresses, and no loads of w's tile.
//
// Bound by taking turns: all threads wait for a tile, change fragments, start products, wait for
// them, and meet at the block's barrier before the next copy into that stage is ordered. While the
// prologue runs the tensor cores idle, and the other way round; two stages hide a part of memory's
// latency, and other blocks on the multiprocessor a part of the rest. The start and the end of each
// block, with its vectors and its stores, hide behind nothing of its own.
//
// The next rung gives copies to warps that do nothing else, several stages ahead, makes fragments
// while products run, and goes from tile to tile without a stop.
#include "cuda/hopper.h"
#include "ladder.h"

namespace fusedres {

namespace {

constexpr int kColumns = 64, kStages = 2;
constexpr int kStageBytes = (kLadderRows + kColumns) * 128;

}  // namespace

__global__ void __launch_bounds__(kThreads)
    tma_kernel(const __grid_constant__ Problem p, const __grid_constant__ TensorMap x,
               const __grid_constant__ TensorMap w) {
  unsigned char* const shared = shared_memory<unsigned char>();
  float* const vectors = reinterpret_cast<float*>(shared + kStages * kStageBytes);
  Barrier* const full = reinterpret_cast<Barrier*>(vectors + 3 * p.c);  // [kStages]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int block = static_cast<int>(blockIdx.x), columns = p.k / kColumns;
  const int row = block / columns * kLadderRows;
  const int column = block % columns * kColumns, steps = p.c / kLadderChannels;

  // A stage is 128 rows of x, and below them 64 of w.
  const auto copy = [&](int step) {
    unsigned char* const stage = shared + step % kStages * kStageBytes;
    Barrier* const barrier = full + step % kStages;
    barrier_arrive_expect(barrier, kStageBytes);
    copy_box(&x, barrier, stage, row, step * kLadderChannels);
    copy_box(&w, barrier, stage + kLadderRows * 128, column, step * kLadderChannels);
  };

  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) barrier_init(full + i, 1);
    barrier_init_fence();
    copy(0);
  }
  load_vectors(p, vectors);
  __syncthreads();
  float d[kColumns / 2];
  for (int step = 0; step < steps; ++step) {
    if (thread == 0 && step + 1 < steps) copy(step + 1);
    barrier_wait(full + step % kStages, step / kStages % 2);
    const unsigned char* const stage = shared + step % kStages * kStageBytes;
    const uint32_t b = shared_address(stage + kLadderRows * 128);
    uint32_t a[kLadderChannels / 16][4];
#pragma unroll
    for (int kk = 0; kk < kLadderChannels / 16; ++kk) {
      load_matrices(
          a[kk], stage + chunk_offset<128>(warp * 16 + matrix_row(lane), matrix_chunk(lane, kk)));
      activate_fragment(a[kk], vectors, p.c, step * kLadderChannels + kk * 16);
    }
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kLadderChannels / 16; ++kk) {
      wgmma<BFloat16, false>(d, a[kk], k_major_descriptor(b, kk), step > 0 || kk > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    __syncthreads();  // the stage may be filled again
  }
  settle(d);
  store_product(p, d, row + warp * 16, column);
}

cudaError_t run_tma(const Problem& p) {
  TensorMap x, w;
  cudaError_t status = describe(&x, DType::kBFloat16, p.x, p.m, p.c, p.c, kLadderRows);
  if (status != cudaSuccess) return status;
  status = describe(&w, DType::kBFloat16, p.w, p.k, p.c, p.c, kColumns);
  if (status != cudaSuccess) return status;
  const int64_t blocks = ceil_div(p.m, kLadderRows) * (p.k / kColumns);
  return start_rung<tma_kernel>("tma", blocks, kThreads,
                                kStages * kStageBytes + 12 * p.c + kStages * 8, p, x, w);
}

}  // namespace fusedres
