// Rung 4: warps that copy, warps that multiply, and blocks that stay.
//
// Against rung 3: of three warpgroups the first only copies, by one thread, as far ahead as a ring
// of four stages has room; the other two only multiply. Between them stand two barriers a stage,
// "full" and "empty", and none of the whole block. The copier's registers go to the multipliers
// (setmaxnreg), which hold accumulators of up to 256 columns: the prologue is done once for so
// many. A step comes in halves: while the products of one half run, the fragments of the other are
// made.
//
// Split: one block a multiprocessor, which takes every gridDim-th tile, those of the same rows
// after each other in the grid. Vectors are loaded once a block. The copier goes on with the next
// tile while the multipliers store the last one.
//
// Bytes: x is read once for 256 columns (128 or 64, where 256 does not divide k), all but the first
// time from L2; the rest is as before.
//
// Bound by memory where c and k are small, as it should be; else by the prologue, which for k above
// 256 is done several times, and by stores of half a sector. And BatchNorm's statistics of y are
// not there yet: they would read y again.
//
// The library's own kernel (rung 5, csrc/cuda/conv_bn_wgmma.h) keeps what the prologue made for all
// columns of a tile, turns the product by shared memory into whole rows, and takes the statistics
// on that way, from registers.
#include "cuda/hopper.h"
#include "ladder.h"

namespace fusedres {

namespace {

constexpr int kStages = 4;
constexpr int kCopiers = 128, kMultiplyingWarps = 8, kAll = kCopiers + kMultiplyingWarps * 32;
// Registers of a thread: of 64 K, 24 * 128 + 240 * 256.
constexpr int kRegistersOfCopier = 24, kRegistersOfMultiplier = 240;
template <int kColumns>
constexpr int kStageBytesOf = (kLadderRows + kColumns) * 128;

// A place in the ring, and the parity of how often the ring went round.
struct Place {
  int slot = 0;
  unsigned parity = 0;

  __device__ void advance() {
    slot = (slot + 1) % kStages;
    if (slot == 0) parity ^= 1u;
  }
  __device__ int before() const { return (slot + kStages - 1) % kStages; }
};

}  // namespace

template <int kColumns>
__global__ void __launch_bounds__(kAll, 1)
    warp_specialised_kernel(const __grid_constant__ Problem p, const __grid_constant__ TensorMap x,
                            const __grid_constant__ TensorMap w) {
  constexpr int kStageBytes = kStageBytesOf<kColumns>;
  unsigned char* const shared = shared_memory<unsigned char>();
  float* const vectors = reinterpret_cast<float*>(shared + kStages * kStageBytes);
  Barrier* const full = reinterpret_cast<Barrier*>(vectors + 3 * p.c);
  Barrier* const empty = full + kStages;
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int columns = p.k / kColumns, steps = p.c / kLadderChannels;
  const int tiles = static_cast<int>((p.m + kLadderRows - 1) / kLadderRows) * columns;
  Place at;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, kMultiplyingWarps);
    }
    barrier_init_fence();
  }
  load_vectors(p, vectors);
  __syncthreads();

  if (threadIdx.x < kCopiers) {
    give_registers<kRegistersOfCopier>();
    if (threadIdx.x != 0) return;
    for (int tile = block; tile < tiles; tile += blocks) {
      const int row = tile / columns * kLadderRows, column = tile % columns * kColumns;
      for (int step = 0; step < steps; ++step) {
        // The first time round there is nothing to wait for: the phase before the first is over.
        barrier_wait(empty + at.slot, at.parity ^ 1u);
        unsigned char* const stage = shared + at.slot * kStageBytes;
        barrier_arrive_expect(full + at.slot, kStageBytes);
        copy_box(&x, full + at.slot, stage, row, step * kLadderChannels);
        copy_box(&w, full + at.slot, stage + kLadderRows * 128, column, step * kLadderChannels);
        at.advance();
      }
    }
    return;
  }

  take_registers<kRegistersOfMultiplier>();
  const int thread = static_cast<int>(threadIdx.x) - kCopiers, lane = thread % 32;
  const int warp = thread / 32;
  // The stage before this one, whose products are over.
  const auto release = [&] {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + at.before());
  };
  float d[kColumns / 2];
  uint32_t a[2][2][4];  // of half a step each: one in the products, one in the making
  for (int tile = block; tile < tiles; tile += blocks) {
    const int64_t row = static_cast<int64_t>(tile / columns) * kLadderRows;
    const int column = tile % columns * kColumns;
    for (int step = 0; step < steps; ++step) {
      barrier_wait(full + at.slot, at.parity);
      const unsigned char* const stage = shared + at.slot * kStageBytes;
      const uint32_t b = shared_address(stage + kLadderRows * 128);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int kk = half * 2 + i;
          load_matrices(a[half][i], stage + chunk_offset<128>(warp * 16 + matrix_row(lane),
                                                              matrix_chunk(lane, kk)));
          activate_fragment(a[half][i], vectors, p.c, step * kLadderChannels + kk * 16);
        }
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int kk = half * 2 + i;
          wgmma<BFloat16, false>(d, a[half][i], k_major_descriptor(b, kk), step > 0 || kk > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();  // those of the half before are over
        if (half == 0 && step > 0) release();
      }
      at.advance();
    }
    wgmma_wait<0>();
    settle(d);
    release();
    store_product(p, d, row + warp * 16, column);
  }
}

namespace {

template <int kColumns>
cudaError_t run(const Problem& p) {
  int multiprocessors = 0;
  cudaError_t status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0);
  TensorMap x, w;
  if (status == cudaSuccess) {
    status = describe(&x, DType::kBFloat16, p.x, p.m, p.c, p.c, kLadderRows);
  }
  if (status == cudaSuccess) {
    status = describe(&w, DType::kBFloat16, p.w, p.k, p.c, p.c, kColumns);
  }
  if (status != cudaSuccess) return status;
  const int64_t tiles = ceil_div(p.m, kLadderRows) * (p.k / kColumns);
  return start_rung<warp_specialised_kernel<kColumns>>(
      "warp_specialised", tiles < multiprocessors ? tiles : multiprocessors, kAll,
      kStages * kStageBytesOf<kColumns> + 12 * p.c + 2 * kStages * 8, p, x, w);
}

}  // namespace

cudaError_t run_warp_specialised(const Problem& p) {
  return p.k % 256 == 0 ? run<256>(p) : p.k % 128 == 0 ? run<128>(p) : run<64>(p);
}

}  // namespace fusedres
