// Kernels with tensor cores, copies beside the program and barriers in shared memory: right ones,
// and the same ones with a fault each.
//
//     tensor_selftest CASE [SEED...]
//
// ends with 0 where the results are as they should be, with 1 where not.
#include <algorithm>

#include "cuda/hopper.h"
#include "selftest.h"

namespace fusedres {

enum class Fault {
  kNone,
  // of copies by threads
  kNoCopyWait,
  kCopyWaitTooShort,
  kNoBlockBarrier,
  kCopyMisaligned,
  kCopyOutside,
  kRowMisaligned,
  kMissingLane,
  // of barriers and bulk copies
  kNoInit,
  kNoInitFence,
  kNoInitBarrier,
  kInitTwice,
  kNoFullWait,
  kWrongParity,
  kTwoArrivals,
  kTooFewBytes,
  kTooManyBytes,
  kBoxMisaligned,
  kBoxOutside,
  kNoMap,
  kCopyTooMany,
  kOverwrittenBarrier,
  kNoEmptyWait,
  // of products
  kEarlyRelease,
  kEarlyRead,
  kNoProductWait,
  kTouchFragment,
  kTouchAccumulator,
  kNoFence,
  kTileMisaligned,
  kTileOutside,
  kOtherDescriptorOfLane,
  kOtherDescriptorOfWarp,
  kMissingWarp,
  kOtherRegisters,
};

// Small whole numbers, which no order of a sum rounds.
template <class T>
std::vector<T> numbers(size_t size, int step) {
  std::vector<T> out(size);
  for (size_t i = 0; i < size; ++i) {
    out[i] = from_acc<T>(static_cast<float>(static_cast<int>(i * step % 23) - 11));
  }
  return out;
}

// c [m, n] is a [m, k] times b, [n, k] or, if `n_major`, [k, n].
template <class T>
bool is_product(const std::vector<float>& c, const std::vector<T>& a, const std::vector<T>& b,
                int m, int n, int k, bool n_major) {
  for (int row = 0; row < m; ++row) {
    for (int column = 0; column < n; ++column) {
      float sum = 0;
      for (int i = 0; i < k; ++i) {
        sum += to_acc(a[row * k + i]) * to_acc(b[n_major ? i * n + column : column * k + i]);
      }
      if (c[row * n + column] != sum) {
        fprintf(stderr, "wrong: (%d, %d) is %g, not %g\n", row, column, c[row * n + column], sum);
        return false;
      }
    }
  }
  return true;
}

// --- Copies by threads, and products by warps ---------------------------------------------------

// A block of four warps has [64, 64] of c, and tiles of [64, 64] of a [m, k] and b [k, n] in two
// stages.
constexpr int kTile = 64, kTileBytes = 64 * 128;

template <class T>
__device__ void copy_tile(unsigned char* tile, const T* from, int stride, Fault fault) {
  for (uint32_t i = threadIdx.x; i < kTile * 8; i += blockDim.x) {
    const uint32_t row = i / 8, chunk = i % 8;
    unsigned char* to = tile + chunk_offset<128>(row, chunk);
    if (fault == Fault::kCopyMisaligned && i == 77) to += 8;
    if (fault == Fault::kCopyOutside && i == 77) to += 4 * kTileBytes;
    copy_async(to, from + row * stride + chunk * 8);
  }
  copy_commit();
}

template <class T>
__global__ void __launch_bounds__(128)
    copying_kernel(const T* a, const T* b, float* c, int n, int k, Fault fault) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = blockIdx.x / (n / kTile) * kTile, column = blockIdx.x % (n / kTile) * kTile;
  unsigned char* const shared = shared_memory<unsigned char>();
  const auto copy = [&](int step) {
    unsigned char* const stage = shared + step % 2 * 2 * kTileBytes;
    copy_tile(stage, a + row * k + step * kTile, k, fault);
    copy_tile(stage + kTileBytes, b + step * kTile * n + column, n, fault);
  };
  float d[8][4] = {};
  const int steps = k / kTile;
  copy(0);
  for (int step = 0; step < steps; ++step) {
    const bool last = step + 1 == steps;
    if (!last) copy(step + 1);
    if (fault != Fault::kNoCopyWait) {
      if (last && fault != Fault::kCopyWaitTooShort) {
        copy_wait<0>();
      } else {
        copy_wait<2>();
      }
    }
    if (fault != Fault::kNoBlockBarrier) __syncthreads();
    const unsigned char* const tile = shared + step % 2 * 2 * kTileBytes;
    for (uint32_t kk = 0; kk < 4; ++kk) {
      uint32_t fragment[4];
      const uint32_t offset =
          chunk_offset<128>(16 * warp + matrix_row(lane), matrix_chunk(lane, kk));
      if (fault == Fault::kMissingLane && lane == 9) continue;
      load_matrices(fragment, tile + offset + (fault == Fault::kRowMisaligned ? 4 : 0));
      for (uint32_t j = 0; j < 8; j += 2) {
        uint32_t words[4];
        load_matrices_transposed(
            words, tile + kTileBytes + chunk_offset<128>(kk * 16 + lane % 16, j + lane / 16));
        multiply<T>(d[j], fragment, words[0], words[1]);
        multiply<T>(d[j + 1], fragment, words[2], words[3]);
      }
    }
    __syncthreads();
  }
  for (int j = 0; j < 8; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int r = row + 16 * warp + fragment_row(lane) + i / 2 * 8;
      c[r * n + column + j * 8 + fragment_pair(lane) * 2 + i % 2] = d[j][i];
    }
  }
}

template <class T>
bool copying(Fault fault = Fault::kNone) {
  constexpr int kM = 128, kN = 192, kK = 256;
  const std::vector<T> a = numbers<T>(kM * kK, 7), b = numbers<T>(kK * kN, 5);
  std::vector<float> c(kM * kN);
  CHECK(runs(start(copying_kernel<T>, kM / kTile * kN / kTile, 128, 4 * kTileBytes, false, a.data(),
                   b.data(), c.data(), kN, kK, fault)));
  return is_product(c, a, b, kM, kN, kK, true);
}

// --- A ring of bulk copies, and products by warpgroups ------------------------------------------

constexpr int kStages = 3, kRows = 128, kBarrierBytes = 1024;

template <int kN>
constexpr int kStageBytes = (kRows + kN) * 128;
template <int kN>
constexpr int kRingBytes = kBarrierBytes + kStages * kStageBytes<kN>;

struct Ring {
  Barrier *full, *empty;
  unsigned char* tiles;
};

template <bool kNMajor, int kN>
__device__ void fill_ring(const Ring& ring, const TensorMap* a, const TensorMap* b, int steps,
                          Fault fault) {
  unsigned bytes = kStageBytes<kN>;
  if (fault == Fault::kTooFewBytes) bytes -= 16;
  if (fault == Fault::kTooManyBytes) bytes += 16;
  if (fault == Fault::kCopyTooMany) ++steps;
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages, turn = step / kStages;
    Barrier* const full = ring.full + stage;
    if (fault != Fault::kNoEmptyWait) barrier_wait(ring.empty + stage, (turn & 1) ^ 1);
    barrier_arrive_expect(full, bytes);
    if (fault == Fault::kTwoArrivals) barrier_arrive(full);
    unsigned char* tile = ring.tiles + stage * kStageBytes<kN>;
    if (fault == Fault::kBoxMisaligned) tile += 512;
    if (fault == Fault::kBoxOutside) tile += 2 * kStageBytes<kN> + kRows * 128;
    if (fault == Fault::kOverwrittenBarrier) tile = reinterpret_cast<unsigned char*>(ring.full);
    copy_box(a, full, tile, blockIdx.x * kRows, step * 64);
    tile += kRows * 128;
    for (int box = 0; box < (kNMajor ? kN / 64 : 1); ++box) {
      copy_box(b, full, tile + box * 64 * 128, kNMajor ? step * 64 : 0,
               kNMajor ? box * 64 : step * 64);
    }
  }
}

// A group of products stays in flight while the next one's fragments are loaded.
template <class T, bool kNMajor, int kN>
__device__ void multiply_ring(const Ring& ring, float (&d)[kN / 2], int steps, Fault fault) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4;  // of two warpgroups
  uint32_t fragments[2][4][4];
  const auto release = [&](int step) {
    __syncwarp();
    if (lane == 0) barrier_arrive(ring.empty + step % kStages);
  };
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    const int parity = step / kStages & 1;
    if (fault != Fault::kNoFullWait) {
      barrier_wait(ring.full + stage, fault == Fault::kWrongParity ? parity ^ 1 : parity);
    }
    const unsigned char* const tile = ring.tiles + stage * kStageBytes<kN>;
    uint32_t b = shared_address(tile) + kRows * 128;
    if (fault == Fault::kTileMisaligned) b += 512;
    if (fault == Fault::kTileOutside) b += 2 * kStageBytes<kN>;
    if (fault == Fault::kOtherDescriptorOfLane && lane == 5) b += 1024;
    if (fault == Fault::kOtherDescriptorOfWarp && warp == 5) b += 1024;
    uint32_t (&a)[4][4] = fragments[step % 2];
    for (uint32_t kk = 0; kk < 4; ++kk) {
      load_matrices(a[kk],
                    tile + chunk_offset<128>(16 * warp + matrix_row(lane), matrix_chunk(lane, kk)));
    }
    if (fault != Fault::kNoFence) wgmma_fence();
    for (uint32_t kk = 0; kk < 4; ++kk) {
      if (fault == Fault::kMissingWarp && warp == 6 && kk == 3) continue;
      const uint64_t descriptor = kNMajor ? n_major_descriptor(b, kk) : k_major_descriptor(b, kk);
      wgmma<T, kNMajor>(d, a[kk], descriptor, step > 0 || kk > 0);
    }
    wgmma_commit();
    if (fault == Fault::kTouchFragment) a[2][3] ^= 1;
    if (fault == Fault::kTouchAccumulator) d[3] = 0;
    if (fault == Fault::kEarlyRelease) {
      release(step);
      wgmma_wait<1>();
      continue;
    }
    wgmma_wait<1>();
    if (step > 0) release(step - 1);
  }
  const float early = d[0];
  if (fault != Fault::kNoProductWait) wgmma_wait<0>();
  settle(d);
  if (fault == Fault::kEarlyRead) d[0] = early;
}

// A block of a warpgroup that copies and two that have 64 rows of c each.
template <class T, bool kNMajor, int kN>
__global__ void __launch_bounds__(384)
    ring_kernel(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* c,
                int m, int n, int k, Fault fault) {
  unsigned char* const shared = shared_memory<unsigned char>();
  Barrier* const barriers = reinterpret_cast<Barrier*>(shared);
  const Ring ring = {barriers, barriers + kStages, shared + kBarrierBytes};
  if (threadIdx.x == 0) {
    prefetch_map(&a);
    for (int i = 0; i < kStages; ++i) {
      if (fault == Fault::kNoInit && i == 1) continue;
      barrier_init(ring.full + i, 1);
      barrier_init(ring.empty + i, 8);
      if (fault == Fault::kInitTwice) barrier_init(ring.empty + i, 8);
    }
    if (fault != Fault::kNoInitFence) barrier_init_fence();
  }
  if (fault != Fault::kNoInitBarrier) __syncthreads();
  const int steps = (k + 63) / 64;
  if (threadIdx.x < 128) {
    if (fault == Fault::kOtherRegisters && threadIdx.x >= 64) {
      give_registers<40>();
    } else {
      give_registers<24>();
    }
    const TensorMap* map = &a;
    TensorMap none = {};
    if (fault == Fault::kNoMap) map = &none;
    if (threadIdx.x == 0) fill_ring<kNMajor, kN>(ring, map, &b, steps, fault);
    return;
  }
  take_registers<240>();
  float d[kN / 2];
  multiply_ring<T, kNMajor, kN>(ring, d, steps, fault);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4;
  for (int i = 0; i < kN / 2; ++i) {
    const int row = blockIdx.x * kRows + 16 * warp + fragment_row(lane) + i % 4 / 2 * 8;
    const int column = i / 4 * 8 + fragment_pair(lane) * 2 + i % 2;
    if (row < m && column < n) c[row * n + column] = d[i];
  }
}

template <class T, bool kNMajor, int kN>
bool ring(Fault fault = Fault::kNone) {
  constexpr int kM = 149, kColumns = kN - 24, kK = 600;  // of which the last boxes stand out
  const std::vector<T> a = numbers<T>(kM * kK, 7), b = numbers<T>(kK * kColumns, 5);
  std::vector<float> c(kM * kColumns);
  constexpr DType kType = std::is_same_v<T, BFloat16> ? DType::kBFloat16 : DType::kFloat16;
  TensorMap a_map, b_map;
  CHECK(runs(describe(&a_map, kType, a.data(), kM, kK, kK, kRows)));
  if (kNMajor) {
    CHECK(runs(describe(&b_map, kType, b.data(), kK, kColumns, kColumns, 64)));
  } else {
    CHECK(runs(describe(&b_map, kType, b.data(), kColumns, kK, kK, kN)));
  }
  const auto kernel = ring_kernel<T, kNMajor, kN>;
  CHECK(runs(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kRingBytes<kN>)));
  CHECK(runs(start(kernel, 2, 384, kRingBytes<kN>, false, a_map, b_map, c.data(), kM, kColumns, kK,
                   fault)));
  return is_product(c, a, b, kM, kColumns, kK, kNMajor);
}

// --- Boxes anywhere -----------------------------------------------------------------------------

__global__ void box_kernel(const __grid_constant__ TensorMap map, BFloat16* out, int rows, int row,
                           int column) {
  unsigned char* const shared = shared_memory<unsigned char>();
  Barrier* const barrier = reinterpret_cast<Barrier*>(shared);
  unsigned char* const tile = shared + 1024;
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    barrier_arrive_expect(barrier, rows * 128);
    copy_box(&map, barrier, tile, row, column);
  }
  __syncthreads();
  barrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < rows * 64; i += blockDim.x) {
    const int chunk = i % 64 / 8;
    memcpy(out + i, tile + chunk_offset<128>(i / 64, chunk) + i % 8 * 2, sizeof out[0]);
  }
}

bool boxes() {
  constexpr int kMatrixRows = 21, kColumns = 75, kStride = 80;
  const std::vector<BFloat16> x = numbers<BFloat16>(kMatrixRows * kStride, 7);
  for (const int rows : {1, 8, 20, 40}) {
    TensorMap map;
    CHECK(runs(describe(&map, DType::kBFloat16, x.data(), kMatrixRows, kColumns, kStride, rows)));
    for (const int row : {-50, -3, 0, 1, 20, 21, 1 << 30}) {
      for (const int column : {-64, -63, -5, 0, 8, 30, 74, 75}) {
        std::vector<BFloat16> out(rows * 64);
        CHECK(runs(start(box_kernel, 1, 32, 1024 + rows * 128, false, map, out.data(), rows, row,
                         column)));
        for (int i = 0; i < rows * 64; ++i) {
          const int64_t r = int64_t{row} + i / 64, c = column + i % 64;
          const bool inside = r >= 0 && r < kMatrixRows && c >= 0 && c < kColumns;
          CHECK(out[i].bits == (inside ? x[r * kStride + c].bits : 0));
        }
      }
    }
  }
  return true;
}

bool descriptions() {
  alignas(16) static BFloat16 x[64];
  TensorMap map;
  const auto refused = [&](const BFloat16* matrix, int64_t rows, int64_t columns, int64_t stride,
                           int box_rows) {
    return describe(&map, DType::kBFloat16, matrix, rows, columns, stride, box_rows) ==
           cudaErrorInvalidValue;
  };
  constexpr int64_t kMost = int64_t{1} << 32;
  CHECK(!refused(x, kMost, kMost, 8, 256));
  CHECK(refused(x, kMost + 1, 1, 8, 1) && refused(x, 1, kMost + 1, 8, 1));
  CHECK(refused(x, 0, 1, 8, 1) && refused(x, 1, 0, 8, 1) && refused(x, -1, 1, 8, 1));
  CHECK(refused(x + 1, 1, 1, 8, 1) && refused(nullptr, 1, 1, 8, 1));
  CHECK(refused(x, 1, 1, 12, 1) && refused(x, 1, 1, int64_t{1} << 39, 1));
  CHECK(refused(x, 1, 1, 8, 0) && refused(x, 1, 1, 8, 257));
  return true;
}

// --- Parts of a block ---------------------------------------------------------------------------

enum class Parts { kRight, kNone, kOtherSize, kIdZero, kNotAll };

// Warps in pairs: what one writes, the other reads.
__global__ void parts_kernel(int* out, Parts how) {
  int* const shared = shared_memory<int>();
  const int warp = threadIdx.x / 32, pair = warp / 2;
  if (how == Parts::kNotAll && warp == 3) return;
  int sum = 0;
  for (int step = 0; step < 5; ++step) {
    shared[threadIdx.x] = step * static_cast<int>(threadIdx.x);
    const int id = how == Parts::kIdZero ? 0 : pair + 1;
    if (how == Parts::kOtherSize && warp == 1) {
      part_barrier(id, 96);
    } else if (how != Parts::kNone) {
      part_barrier(id, 64);
    }
    sum += shared[threadIdx.x ^ 32];
    if (how != Parts::kNone) part_barrier(pair + 5, 64);
  }
  out[threadIdx.x] = sum;
}

bool parts(Parts how) {
  std::vector<int> out(256);
  CHECK(runs(start(parts_kernel, 1, 256, 1024, false, out.data(), how)));
  for (int i = 0; i < 256; ++i) CHECK(out[i] == 10 * (i ^ 32));
  return true;
}

// --- The rest -----------------------------------------------------------------------------------

// By warps that are no warpgroup.
__global__ void small_kernel() { wgmma_fence(); }

bool capability() {
  int major = 0, minor = -1;
  CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess);
  CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0) == cudaSuccess);
  CHECK(major == 9 && minor == 0);
  emulator_set_capability(8, 6);
  CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess);
  CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0) == cudaSuccess);
  CHECK(major == 8 && minor == 6);
  CHECK(copying<BFloat16>());
  emulator_set_capability(9, 0);
  return true;
}

bool older_device() {
  emulator_set_capability(8, 0);
  return ring<BFloat16, false, 64>();
}

bool run_case(const std::string& name) {
  static const struct {
    const char* name;
    Fault fault;
  } kCopying[] =
      {
          {"no_copy_wait", Fault::kNoCopyWait},
          {"copy_wait_too_short", Fault::kCopyWaitTooShort},
          {"no_block_barrier", Fault::kNoBlockBarrier},
          {"copy_misaligned", Fault::kCopyMisaligned},
          {"copy_outside", Fault::kCopyOutside},
          {"row_misaligned", Fault::kRowMisaligned},
          {"missing_lane", Fault::kMissingLane},
      },
    kRing[] = {
        {"no_init", Fault::kNoInit},
        {"no_init_fence", Fault::kNoInitFence},
        {"no_init_barrier", Fault::kNoInitBarrier},
        {"init_twice", Fault::kInitTwice},
        {"no_full_wait", Fault::kNoFullWait},
        {"wrong_parity", Fault::kWrongParity},
        {"two_arrivals", Fault::kTwoArrivals},
        {"too_few_bytes", Fault::kTooFewBytes},
        {"too_many_bytes", Fault::kTooManyBytes},
        {"box_misaligned", Fault::kBoxMisaligned},
        {"box_outside", Fault::kBoxOutside},
        {"no_map", Fault::kNoMap},
        {"copy_too_many", Fault::kCopyTooMany},
        {"overwritten_barrier", Fault::kOverwrittenBarrier},
        {"no_empty_wait", Fault::kNoEmptyWait},
        {"early_release", Fault::kEarlyRelease},
        {"early_read", Fault::kEarlyRead},
        {"no_product_wait", Fault::kNoProductWait},
        {"touch_fragment", Fault::kTouchFragment},
        {"touch_accumulator", Fault::kTouchAccumulator},
        {"no_fence", Fault::kNoFence},
        {"tile_misaligned", Fault::kTileMisaligned},
        {"tile_outside", Fault::kTileOutside},
        {"other_descriptor_of_lane", Fault::kOtherDescriptorOfLane},
        {"other_descriptor_of_warp", Fault::kOtherDescriptorOfWarp},
        {"missing_warp", Fault::kMissingWarp},
        {"other_registers", Fault::kOtherRegisters},
    };
  for (const auto& entry : kCopying) {
    if (name == entry.name) return copying<BFloat16>(entry.fault);
  }
  for (const auto& entry : kRing) {
    if (name == entry.name) return ring<BFloat16, false, 64>(entry.fault);
  }
  if (name == "copying") return copying<BFloat16>() && copying<Float16>();
  if (name == "ring_64") return ring<BFloat16, false, 64>() && ring<Float16, true, 64>();
  if (name == "ring_128") return ring<Float16, false, 128>() && ring<BFloat16, true, 128>();
  if (name == "ring_256") return ring<BFloat16, false, 256>() && ring<BFloat16, true, 256>();
  if (name == "boxes") return boxes();
  if (name == "descriptions") return descriptions();
  if (name == "capability") return capability();
  if (name == "older_device") return older_device();
  if (name == "parts") return parts(Parts::kRight);
  if (name == "no_part_barrier") return parts(Parts::kNone);
  if (name == "part_of_other_size") return parts(Parts::kOtherSize);
  if (name == "part_zero") return parts(Parts::kIdZero);
  if (name == "part_not_all") return parts(Parts::kNotAll);
  if (name == "small_group") return runs(start(small_kernel, 1, 96, 0, false));
  fprintf(stderr, "no case %s\n", name.c_str());
  exit(2);
}

}  // namespace fusedres

int main(int argc, char** argv) {
  return fusedres::run_cases(argc, argv, 227 << 10, fusedres::run_case);
}
