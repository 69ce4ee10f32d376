// Rung 2: tiles in shared memory, tensor cores (mma.sync), copies beside the program (cp.async).
//
// Against rung 1: a block makes [128, 64] of y from tiles of 64 channels of x and w, which lie in
// shared memory in two stages: while one is multiplied, the next one is on its way. The prologue is
// done in registers, between a tile and the tensor core, once for 64 columns; its vectors are in
// shared memory. Chunks of 16 bytes are permuted within a row (tile_layout.h), so that 8 rows are
// read without meeting a bank twice.
//
// Split: 8 warps, each 16 rows of the tile and all 64 columns. Blocks beside each other in the grid
// have the same rows, so that x comes from memory once and from the L2 cache after that.
//
// Bytes: x is read k/64 times, all but the first from L2; w, small, from L2; y is written once,
// in halves of sectors that meet in L2. Rows past m repeat the last row, and are not stored.
//
// Bound by what all threads do beside multiplying: 6 copies of 16 bytes a thread and step, each
// with an address of its own; every warp reads all of w's tile from shared memory; two barriers of
// the block a step, at which tensor cores wait.
//
// The next rung leaves copies and addresses to the hardware, and lets tensor cores read w's tile
// from shared memory themselves, once for 64 rows.
#include "ladder.h"

namespace fusedres {

namespace {

constexpr int kColumns = 64, kStages = 2;
constexpr int kStageBytes = (kLadderRows + kColumns) * 128;

}  // namespace

__global__ void __launch_bounds__(kThreads) tiled_kernel(const Problem p) {
  unsigned char* const shared = shared_memory<unsigned char>();
  float* const vectors = reinterpret_cast<float*>(shared + kStages * kStageBytes);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int block = static_cast<int>(blockIdx.x), columns = p.k / kColumns;
  const int64_t row = static_cast<int64_t>(block / columns) * kLadderRows;
  const int column = block % columns * kColumns, steps = p.c / kLadderChannels;

  // A stage is 128 rows of x, and below them 64 of w.
  const auto copy = [&](int step) {
    unsigned char* const stage = shared + step % kStages * kStageBytes;
#pragma unroll
    for (int i = 0; i < kStageBytes / 16 / kThreads; ++i) {
      const int r = (i * kThreads + thread) / 8, chunk = thread % 8;
      const int64_t last = p.m - 1;
      const BFloat16* const from = r < kLadderRows
                                       ? p.x + (row + r < last ? row + r : last) * p.c
                                       : p.w + static_cast<int64_t>(column + r - kLadderRows) * p.c;
      copy_async(stage + chunk_offset<128>(r, chunk), from + step * kLadderChannels + chunk * 8);
    }
  };

  load_vectors(p, vectors);
  float d[kColumns / 2] = {};
  copy(0);
  copy_commit();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) copy(step + 1);
    copy_commit();
    copy_wait<1>();  // this step's have come, the next one's may be on their way
    __syncthreads();
    const unsigned char* const stage = shared + step % kStages * kStageBytes;
#pragma unroll
    for (int kk = 0; kk < kLadderChannels / 16; ++kk) {
      uint32_t a[4];
      load_matrices(
          a, stage + chunk_offset<128>(warp * 16 + matrix_row(lane), matrix_chunk(lane, kk)));
      activate_fragment(a, vectors, p.c, step * kLadderChannels + kk * 16);
#pragma unroll
      for (int j = 0; j < kColumns / 16; ++j) {  // two pieces of 8 columns
        uint32_t b[4];
        const int r = kLadderRows + j * 16 + lane / 16 * 8 + lane % 8;
        load_matrices(b, stage + chunk_offset<128>(r, kk * 2 + lane / 8 % 2));
        multiply<BFloat16>(*reinterpret_cast<float (*)[4]>(&d[j * 8]), a, b[0], b[1]);
        multiply<BFloat16>(*reinterpret_cast<float (*)[4]>(&d[j * 8 + 4]), a, b[2], b[3]);
      }
    }
    __syncthreads();  // the stage may be filled again
  }
  store_product(p, d, row + warp * 16, column);
}

cudaError_t run_tiled(const Problem& p) {
  const int64_t blocks = ceil_div(p.m, kLadderRows) * (p.k / kColumns);
  return start_rung<tiled_kernel>("tiled", blocks, kThreads, kStages * kStageBytes + 12 * p.c, p);
}

}  // namespace fusedres
