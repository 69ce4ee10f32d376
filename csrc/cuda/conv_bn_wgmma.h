// conv_bn's 1x1 kernels by Hopper's warpgroups (9.0a): one block a multiprocessor, of three
// warpgroups. One thread of the first one orders bulk copies, as far ahead as there is room; the
// other two multiply, 64 rows of the tile each.
//
// Rings of steps of 64 channels lie between them, one for each source of A and one for B; every
// slot has a barrier that says "full" and one that says "empty". Fragments of A go through
// registers, where the prologue changes them, into the product; B is read from shared memory. Where
// a tile's A fits into its ring (keeps_a), it stays there for all pieces: the first one leaves what
// the prologue made of it in the place of what came, the others read that. Where all of B that the
// block needs fits (keeps_b), it is copied once.
//
// While half a step's products run, the next half's fragments are made; the accumulators are
// written while the copies of the next tile go on. Rows past M come as zeros.
//
// Shared memory: rings, staging, scratch and running sums of the epilogue, vectors, barriers.
#pragma once

#include "cuda/conv_bn_epilogue.h"
#include "cuda/conv_bn_launch.h"
#include "cuda/conv_bn_prologue.h"
#include "cuda/hopper.h"

namespace fusedres {

constexpr int kWarpgroup = 128, kWgmmaThreads = kWarpgroup + kMultipliers;
// Registers of a thread: of 64 K, 24 * 128 + 240 * 256.
constexpr int kCopierRegisters = 24, kMultiplierRegisters = 240;

template <int kBN, int kSources, int kVectors>
struct WgmmaLayout {
  static constexpr int kBK = 64, kRowBytes = kBK * 2;
  static constexpr int kABytes = kTileRows * kRowBytes, kBBytes = kBN * kRowBytes;

  int second, b, staging, scratch, running, table, barriers, bytes;

  FUSEDRES_HOST_DEVICE explicit WgmmaLayout(const ProductPlan& plan) {
    second = plan.stages * kABytes;
    b = second + plan.second_stages * kABytes;
    staging = b + plan.b_stages * kBBytes;
    scratch = staging + kWarps * kStagingBytes;
    running = scratch + kWarps * plan.sums * kBN * 4;
    table = running + plan.sums * plan.n_tiles * kBN * 4;
    barriers = table + kVectors * plan.reduction * 4;
    bytes = barriers + 2 * (plan.stages + plan.second_stages + plan.b_stages) * 8;
  }
};

// A place in a ring, and how often the ring went round: the parity of the phase to wait for.
struct RingPlace {
  int slot = 0;
  unsigned parity = 0;

  __device__ void advance(int size) {
    if (++slot < size) return;
    slot = 0;
    parity ^= 1u;
  }

  // `steps` back, at most once round.
  __device__ void retreat(int steps, int size) {
    slot -= steps;
    if (slot >= 0) return;
    slot += size;
    parity ^= 1u;
  }

  __device__ int before(int size) const { return (slot == 0 ? size : slot) - 1; }
};

struct Ring {
  Barrier *full, *empty;  // [size]
  unsigned char* slots;
  int size;

  // Takes its barriers from `from`, which moves on.
  __device__ Ring(Barrier** from, unsigned char* slots, int size)
      : full(*from), empty(*from + size), slots(slots), size(size) {
    *from += 2 * size;
  }

  // By one thread, before the block's barrier.
  __device__ void init() const {
    for (int i = 0; i < size; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, kWarps);
    }
  }

  // By the thread that orders copies: the slot, when it is empty, and that `bytes` are to come.
  __device__ unsigned char* prepare(const RingPlace& at, int bytes) const {
    barrier_wait(empty + at.slot,
                 at.parity ^ 1u);  // the first time round there is nothing to wait for
    barrier_arrive_expect(full + at.slot, bytes);
    return slots + at.slot * bytes;
  }
};

struct TensorMaps {
  TensorMap first, second, b;
};

struct Rings {
  Ring a, second, b;
};

// What the thread that orders copies does.
template <class Layout, int kBN, int kSources, bool kBByReduction>
__device__ __forceinline__ void order_copies(const TensorMaps& maps, const ProductPlan& plan,
                                             const BlockPart& part, const Rings& rings) {
  const int steps = plan.reduction / Layout::kBK;
  prefetch_map(&maps.first);
  if constexpr (kSources == 2) prefetch_map(&maps.second);
  prefetch_map(&maps.b);
  RingPlace a, second, b;
  for (int tile = 0; tile < part.tiles; ++tile) {
    const int row = static_cast<int>((part.first_tile + tile) * kTileRows);
    for (int piece = 0; piece < plan.n_tiles; ++piece) {
      const int column = part.column + piece * kBN;
      for (int k = 0; k < steps; ++k) {
        const int channel = k * Layout::kBK;
        if (piece == 0 || !plan.keeps_a) {
          unsigned char* const to = rings.a.prepare(a, Layout::kABytes);
          copy_box(&maps.first, rings.a.full + a.slot, to, row, channel);
          a.advance(rings.a.size);
          if constexpr (kSources == 2) {
            unsigned char* const beside = rings.second.prepare(second, Layout::kABytes);
            copy_box(&maps.second, rings.second.full + second.slot, beside, row, channel);
            second.advance(rings.second.size);
          }
        }
        if (tile > 0 && plan.keeps_b) continue;
        unsigned char* const to = rings.b.prepare(b, Layout::kBBytes);
        Barrier* const full = rings.b.full + b.slot;
        if constexpr (kBByReduction) {
#pragma unroll
          for (int panel = 0; panel < kBN / 64; ++panel) {
            copy_box(&maps.b, full, to + panel * kPanelBytes, channel, column + panel * 64);
          }
        } else {
          copy_box(&maps.b, full, to, column, channel);
        }
        b.advance(rings.b.size);
      }
    }
  }
}

template <class T, int kBN, class Prologue, class Epilogue, bool kBByReduction>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    conv_bn_wgmma_kernel(const __grid_constant__ typename Epilogue::Params p,
                         const __grid_constant__ TensorMaps maps, float* part_sums,
                         const __grid_constant__ ProductPlan plan) {
  using Layout = WgmmaLayout<kBN, Prologue::kSources, Prologue::kVectors>;
  constexpr int kBK = Layout::kBK, kRowBytes = Layout::kRowBytes;
  const Layout layout(plan);
  unsigned char* const shared = shared_memory<unsigned char>();
  float* const scratch = reinterpret_cast<float*>(shared + layout.scratch);
  float* const running = reinterpret_cast<float*>(shared + layout.running);
  float* const table = reinterpret_cast<float*>(shared + layout.table);
  Barrier* barriers = reinterpret_cast<Barrier*>(shared + layout.barriers);
  const Rings rings = {{&barriers, shared, plan.stages},
                       {&barriers, shared + layout.second, plan.second_stages},
                       {&barriers, shared + layout.b, plan.b_stages}};
  const BlockPart part(plan, kBN);
  const Prologue prologue(p, plan, table);
  prologue.fill(p, table, blockIdx.x == 0);
  for (int i = static_cast<int>(threadIdx.x); i < plan.sums * plan.n_tiles * kBN;
       i += kWgmmaThreads) {
    running[i] = 0;
  }
  if (threadIdx.x == 0) {
    rings.a.init();
    rings.second.init();
    rings.b.init();
    barrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x < kWarpgroup) {
    give_registers<kCopierRegisters>();
    if (threadIdx.x == 0) {
      order_copies<Layout, kBN, Prologue::kSources, kBByReduction>(maps, plan, part, rings);
    }
    return;
  }
  take_registers<kMultiplierRegisters>();
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroup;
  const int lane = thread % 32, warp = thread / 32;
  const Epilogue epilogue(p, plan);
  const int steps = plan.reduction / kBK;
  const uint32_t b_ring = shared_address(shared + layout.b);
  float d[kBN / 2];
  uint32_t fragments[2][2][4];  // of half a step each: one in the products, one in the making
  RingPlace a, second, b;

  for (int tile = 0; tile < BlockPart(plan, kBN).tiles; ++tile) {
    for (int piece = 0; piece < plan.n_tiles; ++piece) {
      const bool first = piece == 0, last = piece == plan.n_tiles - 1;
      if (!first && plan.keeps_a) a.retreat(steps, rings.a.size);
      const bool fresh = first || !plan.keeps_a;  // A is as it came
      const bool releases = last || !plan.keeps_a;
      const bool emits =
          first && Prologue::side_output(p) != nullptr && BlockPart(plan, kBN).group == 0;
      const bool rewrites = Prologue::kChanges && fresh && (emits || (plan.keeps_a && !last));

      // The slots of the step before, whose products are over, may be filled again.
      const auto release = [&] {
        // Pieces ago, maybe, ordinary stores went where the next bulk copy will write.
        if (Prologue::kChanges && releases) fence_async();
        __syncwarp();
        if (lane == 0) {
          if (releases) barrier_arrive(rings.a.empty + a.before(rings.a.size));
          if (!plan.keeps_b) barrier_arrive(rings.b.empty + b.before(rings.b.size));
        }
      };
      for (int k = 0; k < steps; ++k) {
        unsigned char* const a_tile = rings.a.slots + a.slot * Layout::kABytes;
        if (fresh) barrier_wait(rings.a.full + a.slot, a.parity);
        [[maybe_unused]] const unsigned char* const beside =
            rings.second.slots + second.slot * Layout::kABytes;
        if constexpr (Prologue::kSources == 2) {
          if (fresh) barrier_wait(rings.second.full + second.slot, second.parity);
        }
        const uint32_t b_tile = b_ring + b.slot * Layout::kBBytes;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int kk = half * 2 + i;
            uint32_t (&fragment)[4] = fragments[half][i];
            const uint32_t from = chunk_offset<kRowBytes>(warp * kWarpRows + matrix_row(lane),
                                                          matrix_chunk(lane, kk));
            load_matrices(fragment, a_tile + from);
            if (Prologue::kChanges && fresh) {
              uint32_t other[4] = {};
              if constexpr (Prologue::kSources == 2) load_matrices(other, beside + from);
              prologue.apply(fragment, other, k * kBK + kk * 16);
              if (rewrites) store_fragment<kRowBytes>(a_tile, warp * kWarpRows, kk, fragment);
            }
          }
          if (half == 0) barrier_wait(rings.b.full + b.slot, plan.keeps_b ? 0u : b.parity);
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int kk = half * 2 + i;
            const uint64_t descriptor =
                kBByReduction ? n_major_descriptor(b_tile, kk) : k_major_descriptor(b_tile, kk);
            wgmma<T, kBByReduction>(d, fragments[half][i], descriptor, k > 0 || kk > 0);
          }
          wgmma_commit();
          wgmma_wait<1>();  // those of the half before are over
          if (half == 0 && k > 0) release();
        }
        if constexpr (Prologue::kSources == 2) {
          if (fresh) {
            __syncwarp();
            if (lane == 0) barrier_arrive(rings.second.empty + second.slot);
            second.advance(rings.second.size);
          }
        }
        if (emits) {
          __syncwarp();
          const int64_t at = BlockPart(plan, kBN).first_tile + tile;
          store_rows<kRowBytes>(a_tile, warp * kWarpRows, rows_of_warp(plan, at, warp),
                                Prologue::side_output(p) +
                                    (at * kTileRows + warp * kWarpRows) * plan.reduction + k * kBK,
                                plan.reduction);
        }
        a.advance(rings.a.size);
        b.advance(rings.b.size);
      }
      wgmma_wait<0>();
      settle(d);
      release();
      finish_piece<kBN>(epilogue, plan, d, shared + layout.staging, scratch, running, thread, tile,
                        piece, [] { part_barrier(1, kMultipliers); });
    }
  }
  leave_sums<kBN>(plan, running, part_sums, thread);
}

// Launches the kernel `name` where the device has room for it (and if only_kept, for what is to be
// fetched once), else cudaErrorNotSupported.
template <class T, int kBN, class Prologue, class Epilogue, bool kBByReduction>
cudaError_t run_wgmma(const char* name, const typename Epilogue::Params& p, bool only_kept,
                      float* part, const DeviceLimits& limits, ProductPlan* plan,
                      const CudaTarget& target, LaunchConfig* config) {
  using Layout = WgmmaLayout<kBN, Prologue::kSources, Prologue::kVectors>;
  constexpr auto kKernel = conv_bn_wgmma_kernel<T, kBN, Prologue, Epilogue, kBByReduction>;
  if (plan->columns % kBN != 0 ||
      !fit_wgmma<Layout, Prologue::kSources>(plan, kBN, limits, only_kept)) {
    return cudaErrorNotSupported;
  }
  TensorMaps maps = {};
  const int64_t rows = plan->rows, reduction = plan->reduction, columns = plan->columns;
  const auto describe_a = [&](TensorMap* map, int source) {
    return describe(map, p.output.dtype, Prologue::source(p, source), rows, reduction, reduction,
                    kTileRows);
  };
  cudaError_t status = describe_a(&maps.first, 0);
  if (status == cudaSuccess && Prologue::kSources == 2) status = describe_a(&maps.second, 1);
  if (status == cudaSuccess) {
    status =
        kBByReduction
            ? describe(&maps.b, p.output.dtype, p.weight.data, reduction, columns, columns, 64)
            : describe(&maps.b, p.output.dtype, p.weight.data, columns, reduction, reduction, kBN);
  }
  if (status == cudaSuccess) {
    status = allow_shared<kKernel>(target.device, limits.shared_of_block);
  }
  if (status != cudaSuccess) return status;
  *config = {name, plan->blocks(), kWgmmaThreads, static_cast<size_t>(Layout(*plan).bytes)};
  return launch(kKernel, *config, target.stream, p, maps, part, *plan);
}

// Calls f(only_kept), first for plans that fetch A once, then for any.
template <class F>
cudaError_t prefer_kept(const F& f) {
  const cudaError_t status = f(true);
  return status == cudaErrorNotSupported ? f(false) : status;
}

}  // namespace fusedres
