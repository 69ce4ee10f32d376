// conv_bn's 1x1 kernels by mma.sync, for every GPU from 8.0 on.
//
// All eight warps copy, 16 bytes a thread and copy, into a ring of `stages` steps of 32 channels;
// then multiply what came first. The ring goes on over pieces and tiles: while one is written, the
// next one's operands are on their way. A is fetched, and its prologue done, once a piece; from
// memory once, for the pieces of a tile follow each other. Rows past M repeat the last one: they
// are masked where they would leave.
//
// Shared memory: stages of (A of each source [128][32], B [kBN][32] or [32][kBN]), staging, scratch
// and running sums of the epilogue, the prologue's vectors.
#pragma once

#include "cuda/conv_bn_epilogue.h"
#include "cuda/conv_bn_launch.h"
#include "cuda/conv_bn_prologue.h"

namespace fusedres {

// The shared memory of a block, in bytes from its start.
template <int kBN, int kSources, int kVectors>
struct MmaLayout {
  static constexpr int kBK = 32, kRowBytes = kBK * 2;
  static constexpr int kABytes = kTileRows * kRowBytes, kBBytes = kBN * kRowBytes;
  static constexpr int kStageBytes = kSources * kABytes + kBBytes;

  int staging, scratch, running, table, bytes;

  FUSEDRES_HOST_DEVICE explicit MmaLayout(const ProductPlan& plan) {
    staging = plan.stages * kStageBytes;
    scratch = staging + kWarps * kStagingBytes;
    running = scratch + kWarps * plan.sums * kBN * 4;
    table = running + plan.sums * plan.n_tiles * kBN * 4;
    bytes = table + kVectors * plan.reduction * 4;
  }
};

// Where a block stands in its row of steps: step k of piece `piece` of tile `tile`.
struct StepOf {
  int tile = 0, piece = 0, k = 0;

  __device__ void advance(int steps, int pieces) {
    if (++k < steps) return;
    k = 0;
    if (++piece < pieces) return;
    piece = 0;
    ++tile;
  }
};

// kBByReduction: B is [reduction, columns], as dgrad has it; else [columns, reduction].
template <class T, int kBN, class Prologue, class Epilogue, bool kBByReduction>
__global__ void __launch_bounds__(kMultipliers, Epilogue::kResidents)
    conv_bn_mma_kernel(const typename Epilogue::Params p, const T* b, float* part_sums,
                       ProductPlan plan) {
  using Layout = MmaLayout<kBN, Prologue::kSources, Prologue::kVectors>;
  constexpr int kBK = Layout::kBK, kRowBytes = Layout::kRowBytes;
  const Layout layout(plan);
  unsigned char* const shared = shared_memory<unsigned char>();
  float* const scratch = reinterpret_cast<float*>(shared + layout.scratch);
  float* const running = reinterpret_cast<float*>(shared + layout.running);
  float* const table = reinterpret_cast<float*>(shared + layout.table);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const BlockPart part(plan, kBN);
  const Prologue prologue(p, plan, table);
  const Epilogue epilogue(p, plan);
  prologue.fill(p, table, blockIdx.x == 0);
  for (int i = thread; i < plan.sums * plan.n_tiles * kBN; i += kMultipliers) running[i] = 0;
  T* const side = part.group == 0 ? Prologue::side_output(p) : nullptr;

  const int steps = plan.reduction / kBK, all = part.tiles * plan.n_tiles * steps;
  const auto copy = [&](const StepOf& at, int slot) {
    constexpr int kChunks = kRowBytes / kChunkBytes;  // of a row of A
    unsigned char* const stage = shared + slot * Layout::kStageBytes;
    const int64_t row0 = (part.first_tile + at.tile) * kTileRows;
    int copier = thread;
    forget(copier);
#pragma unroll
    for (int i = 0; i < kTileRows * kChunks / kMultipliers; ++i) {
      const int n = i * kMultipliers + copier, r = n / kChunks, chunk = n % kChunks;
      const int64_t row = row0 + r < plan.rows ? row0 + r : plan.rows - 1;
      const int64_t from = row * plan.reduction + at.k * kBK + chunk * 8;
#pragma unroll
      for (int source = 0; source < Prologue::kSources; ++source) {
        copy_async(stage + source * Layout::kABytes + chunk_offset<kRowBytes>(r, chunk),
                   Prologue::source(p, source) + from);
      }
    }
    unsigned char* const to = stage + Prologue::kSources * Layout::kABytes;
    const int column = part.column + at.piece * kBN;
#pragma unroll
    for (int i = 0; i < kBN * kChunks / kMultipliers; ++i) {
      const int n = i * kMultipliers + copier;
      if constexpr (kBByReduction) {  // panels of 64 columns
        const int k = n / (kBN / 8), chunk = n % (kBN / 8);
        copy_async(to + chunk / 8 * (kBK * 128) + chunk_offset<128>(k, chunk % 8),
                   b + static_cast<int64_t>(at.k * kBK + k) * plan.columns + column + chunk * 8);
      } else {
        const int r = n / kChunks, chunk = n % kChunks;
        copy_async(to + chunk_offset<kRowBytes>(r, chunk),
                   b + static_cast<int64_t>(column + r) * plan.reduction + at.k * kBK + chunk * 8);
      }
    }
  };

  StepOf next, at;
  int ahead = 0;  // steps whose copies have begun
  for (; ahead < plan.stages - 1; ++ahead) {
    if (ahead < all) {
      copy(next, ahead);
      next.advance(steps, plan.n_tiles);
    }
    copy_commit();
  }
  float d[kBN / 2];
  int slot = 0, refill = plan.stages - 1;
  for (int step = 0; step < all; ++step) {
    if (plan.stages == 2) {
      copy_wait<0>();
    } else if (plan.stages == 3) {
      copy_wait<1>();
    } else {
      copy_wait<2>();
    }
    __syncthreads();  // all copies of this step have come, all warps have left the step before
    if (ahead < all) {
      copy(next, refill);
      next.advance(steps, plan.n_tiles);
      ++ahead;
    }
    copy_commit();
    unsigned char* const a_tile = shared + slot * Layout::kStageBytes;
    const unsigned char* const b_tile = a_tile + Prologue::kSources * Layout::kABytes;
    if (at.k == 0) {
#pragma unroll
      for (int i = 0; i < kBN / 2; ++i) d[i] = 0;
    }
    const bool writes = side != nullptr && at.piece == 0;
#pragma unroll
    for (int kk = 0; kk < kBK / 16; ++kk) {
      uint32_t a[4], second[4] = {};
      const uint32_t from =
          chunk_offset<kRowBytes>(warp * kWarpRows + matrix_row(lane), matrix_chunk(lane, kk));
      load_matrices(a, a_tile + from);
      if constexpr (Prologue::kSources == 2) load_matrices(second, a_tile + Layout::kABytes + from);
      prologue.apply(a, second, at.k * kBK + kk * 16);
      if (writes) store_fragment<kRowBytes>(a_tile, warp * kWarpRows, kk, a);
#pragma unroll
      for (int j = 0; j < kBN / 16; ++j) {  // two pieces of 8 columns
        uint32_t words[4];
        const int upper = lane / 8 % 2, r = lane % 8, second_piece = lane / 16;
        if constexpr (kBByReduction) {
          const int chunk = j * 2 + second_piece;
          load_matrices_transposed(words,
                                   b_tile + chunk / 8 * (kBK * 128) +
                                       chunk_offset<128>(kk * 16 + upper * 8 + r, chunk % 8));
        } else {
          load_matrices(words, b_tile + chunk_offset<kRowBytes>(j * 16 + second_piece * 8 + r,
                                                                kk * 2 + upper));
        }
#pragma unroll
        for (int piece = 0; piece < 2; ++piece) {
          float (&out)[4] = *reinterpret_cast<float (*)[4]>(&d[(j * 2 + piece) * 4]);
          multiply<T>(out, a, words[piece * 2], words[piece * 2 + 1]);
        }
      }
    }
    if (writes) {
      __syncwarp();
      const int64_t tile = part.first_tile + at.tile;
      store_rows<kRowBytes>(
          a_tile, warp * kWarpRows, rows_of_warp(plan, tile, warp),
          side + (tile * kTileRows + warp * kWarpRows) * plan.reduction + at.k * kBK,
          plan.reduction);
    }
    if (at.k == steps - 1) {
      finish_piece<kBN>(epilogue, plan, d, shared + layout.staging, scratch, running, thread,
                        at.tile, at.piece, [] { __syncthreads(); });
    }
    at.advance(steps, plan.n_tiles);
    slot = slot + 1 == plan.stages ? 0 : slot + 1;
    refill = refill + 1 == plan.stages ? 0 : refill + 1;
  }
  leave_sums<kBN>(plan, running, part_sums, thread);
}

// Launches the kernel `name` where the device has room for it, else cudaErrorNotSupported.
template <class T, int kBN, class Prologue, class Epilogue, bool kBByReduction>
cudaError_t run_mma(const char* name, const typename Epilogue::Params& p, float* part,
                    const DeviceLimits& limits, ProductPlan* plan, const CudaTarget& target,
                    LaunchConfig* config) {
  using Layout = MmaLayout<kBN, Prologue::kSources, Prologue::kVectors>;
  constexpr auto kKernel = conv_bn_mma_kernel<T, kBN, Prologue, Epilogue, kBByReduction>;
  if (plan->columns % kBN != 0 || !fit_mma<Layout>(plan, kBN, Epilogue::kResidents, limits)) {
    return cudaErrorNotSupported;
  }
  const cudaError_t status = allow_shared<kKernel>(target.device, limits.shared_of_block);
  if (status != cudaSuccess) return status;
  *config = {name, plan->blocks(), kMultipliers, static_cast<size_t>(Layout(*plan).bytes)};
  return launch(kKernel, *config, target.stream, p, static_cast<const T*>(p.weight.data), part,
                *plan);
}

}  // namespace fusedres
