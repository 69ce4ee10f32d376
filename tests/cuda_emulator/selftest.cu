// Kernels that are right, and kernels that are wrong in one way each, to show that the emulator
// runs the first and catches the second.
//
//     selftest CASE [SEED...]
//
// ends with 0 where the results are as they should be, with 1 where not.
#include <algorithm>
#include <chrono>
#include <limits>
#include <thread>

#include "selftest.h"

namespace fusedres {

constexpr unsigned kAll = ~0u;

// --- Right kernels ------------------------------------------------------------------------------

template <class T>
__device__ T warp_sum(T value) {
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_down_sync(kAll, value, delta);
  return value;
}

template <class T>
__device__ T block_sum(T value) {
  T* const shared = shared_memory<T>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  value = warp_sum(value);
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  const int warps = blockDim.x / 32;
  value = warp_sum(lane < warps ? shared[lane] : T(0));
  __syncthreads();  // the next sum writes where slower warps still read
  return value;
}

template <class T>
__global__ void __launch_bounds__(256) block_sum_kernel(const T* x, T* sums) {
  const T twice = block_sum(2 * x[blockIdx.x * blockDim.x + threadIdx.x]);
  const T sum = block_sum(x[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x == 0) sums[blockIdx.x] = twice - sum;
}

template <class T>
bool block_sums() {
  constexpr int kBlocks = 5;
  std::vector<T> x(kBlocks * 256), sums(kBlocks);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<T>(i * 7 % 31);
  CHECK(start(block_sum_kernel<T>, kBlocks, 256, 8 * sizeof(T), false, x.data(), sums.data()) ==
        cudaSuccess);
  for (int b = 0; b < kBlocks; ++b) {
    T sum = 0;
    for (int i = 0; i < 256; ++i) sum += x[b * 256 + i];
    CHECK(sums[b] == sum);
  }
  return true;
}

__global__ void grid_kernel(int* part, int* sums) {
  for (int step = 1; step <= 3; ++step) {
    atomicAdd(&part[blockIdx.x], step * static_cast<int>(threadIdx.x));
    grid_barrier();
    int sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += part[b];
    sums[(step - 1) * gridDim.x + blockIdx.x] = sum;
    grid_barrier();
  }
}

bool grid_sums() {
  std::vector<int> part(3), sums(9);
  CHECK(start(grid_kernel, 3, 64, 0, true, part.data(), sums.data()) == cudaSuccess);
  for (int i = 0; i < 9; ++i) {
    const int steps[] = {1, 3, 6};
    CHECK(sums[i] == 3 * steps[i / 3] * (63 * 64 / 2));
  }
  return true;
}

__global__ void warp_kernel(int* out) {
  const int lane = threadIdx.x % 32;
  int* const row = out + threadIdx.x * 10;
  row[0] = __shfl_sync(kAll, lane, 5);
  row[1] = __shfl_sync(kAll, lane, 5, 8);
  row[2] = __shfl_up_sync(kAll, lane, 3, 16);
  row[3] = __shfl_down_sync(kAll, lane, 3, 16);
  row[4] = __shfl_xor_sync(kAll, lane, 9);
  row[5] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  row[6] = __any_sync(kAll, lane == 31) * 2 + __any_sync(kAll, lane == 32);
  row[7] = __all_sync(kAll, lane < 32) * 2 + __all_sync(kAll, lane < 31);
  const bool low = lane < 16;
  const unsigned mask = low ? 0xffffu : 0xffff0000u;
  const double sum = __shfl_xor_sync(mask, lane + 0.5, 1);
  __syncwarp(mask);
  row[8] = sum == (lane ^ 1) + 0.5;
  row[9] = low ? __shfl_xor_sync(mask, lane, 16) : 0;  // of a lane that takes no part
}

bool warps() {
  std::vector<int> out(64 * 10, -2);
  CHECK(start(warp_kernel, 1, 64, 0, false, out.data()) == cudaSuccess);
  unsigned thirds = 0;
  for (int i = 0; i < 32; i += 3) thirds |= 1u << i;
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32, *row = &out[i * 10];
    CHECK(row[0] == 5);
    CHECK(row[1] == lane / 8 * 8 + 5);
    CHECK(row[2] == (lane % 16 < 3 ? lane : lane - 3));
    CHECK(row[3] == (lane % 16 > 12 ? lane : lane + 3));
    CHECK(row[4] == (lane ^ 9));
    CHECK(row[5] == static_cast<int>(thirds));
    CHECK(row[6] == 2);
    CHECK(row[7] == 2);
    CHECK(row[8] == 1);
    CHECK(row[9] == (lane < 16 ? -1 : 0));
  }
  return true;
}

bool halves() {
  const auto bits = [](float x) { return from_acc<Float16>(x).bits; };
  CHECK(bits(1) == 0x3c00 && bits(-2) == 0xc000 && bits(65504) == 0x7bff && bits(65520) == 0x7c00);
  CHECK(bits(1 + 0x1p-11f) == 0x3c00 && bits(1 + 0x3p-11f) == 0x3c02);  // ties to even
  CHECK(bits(0x1p-24f) == 1 && bits(0x1p-25f) == 0 && bits(0x1.8p-25f) == 1);
  for (unsigned i = 0; i < 0x7c00; ++i) CHECK(bits(to_acc(Float16{uint16_t(i)})) == i);
  CHECK(std::isnan(to_acc(from_acc<Float16>(std::numeric_limits<float>::quiet_NaN()))));
  Float16 half[2];
  round_pair(1, -2, half);
  CHECK(half[0].bits == 0x3c00 && half[1].bits == 0xc000);
  BFloat16 bf[2];
  round_pair(1, -2, bf);
  CHECK(bf[0].bits == 0x3f80 && bf[1].bits == 0xc000);
  return true;
}

// From several threads of the host, as autograd launches from one of its own.
bool host_threads() {
  bool right[4] = {};
  std::vector<std::thread> threads;
  for (bool& result : right) {
    threads.emplace_back([&result] {
      result = true;
      for (int i = 0; i < 2; ++i) result = result && block_sums<float>() && grid_sums();
    });
  }
  for (std::thread& thread : threads) thread.join();
  return std::all_of(right, right + 4, [](bool result) { return result; });
}

template <class T>
__global__ void copy_kernel(const T* x, T* y, int vectors) {
  using Vec = Vector<T, 16 / sizeof(T)>;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < vectors) store(reinterpret_cast<Vec*>(y) + i, load(reinterpret_cast<const Vec*>(x) + i));
}

// With `x` and `y` so many elements away from 16 bytes, and an array so much too short.
bool copies(int misaligned, int missing) {
  constexpr int kVectors = 70, kSize = kVectors * 4;
  std::vector<float> x(kSize + misaligned, 1.5f), y(kSize + misaligned - missing, 0.0f);
  CHECK(start(copy_kernel<float>, 3, 32, 0, false, x.data() + misaligned, y.data() + misaligned,
              kVectors) == cudaSuccess);
  CHECK(std::count(y.begin(), y.end(), 1.5f) == kSize);
  return true;
}

__global__ void nothing_kernel() {}

bool refusals() {
  const auto nothing = [](unsigned blocks, unsigned threads, size_t shared, bool cooperative) {
    return start(nothing_kernel, blocks, threads, shared, cooperative);
  };
  emulator_configure(1, 3, 2, 64 << 10);
  emulator_clear_launched();
  CHECK(nothing(0, 32, 0, false) == cudaErrorInvalidConfiguration);
  CHECK(nothing(1, 0, 0, false) == cudaErrorInvalidConfiguration);
  CHECK(nothing(1, 1025, 0, false) == cudaErrorInvalidConfiguration);
  CHECK(nothing(1, 32, (48 << 10) + 1, false) == cudaErrorInvalidConfiguration);
  CHECK(nothing(7, 32, 0, true) == cudaErrorCooperativeLaunchTooLarge);
  CHECK(cudaGetLastError() == cudaErrorCooperativeLaunchTooLarge);
  CHECK(cudaGetLastError() == cudaSuccess);
  CHECK(std::string(emulator_launched()).empty());
  CHECK(nothing(6, 1024, 48 << 10, true) == cudaSuccess);
  const auto kernel = reinterpret_cast<const void*>(nothing_kernel);
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  CHECK(cudaFuncSetAttribute(kernel, attribute, (64 << 10) + 1) == cudaErrorInvalidValue);
  CHECK(cudaFuncSetAttribute(kernel, attribute, 64 << 10) == cudaSuccess);
  CHECK(nothing(1, 32, 64 << 10, false) == cudaSuccess);
  CHECK(std::string(emulator_launched()) ==
        "_ZN8fusedres14nothing_kernelEv\n_ZN8fusedres14nothing_kernelEv");
  int blocks = -1;
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, 256, 65 << 10) ==
        cudaSuccess);
  CHECK(blocks == 0);
  int64_t resident = 0;
  CHECK((resident_blocks<nothing_kernel, 1024>(0, &resident)) == cudaSuccess && resident == 6);
  CHECK(DeviceGuard(1).status() == cudaErrorInvalidDevice);
  return true;
}

// --- Wrong kernels ------------------------------------------------------------------------------

// Writes in one warp what another reads, without the barrier between. The readers wait first, so
// they are late unless warps do fall behind.
__global__ void race_kernel(float* out, int barrier) {
  float* const shared = shared_memory<float>();
  shared[threadIdx.x] = 1;
  __syncwarp();
  if (barrier) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 32) % blockDim.x];
}

bool races(int barrier) {
  std::vector<float> out(256);
  CHECK(start(race_kernel, 1, 256, 256 * sizeof(float), false, out.data(), barrier) == cudaSuccess);
  return std::count(out.begin(), out.end(), 1.0f) == 256;
}

// Elements of shared memory that nothing wrote are NaN, as is their sum.
__global__ void unwritten_kernel(float* out) {
  float* const shared = shared_memory<float>();
  if (threadIdx.x < 31) shared[threadIdx.x] = 1;
  __syncwarp();
  const float sum = warp_sum(shared[threadIdx.x]);
  if (threadIdx.x == 0) *out = sum;
}

bool reads_unwritten() {
  float sum = 0;
  CHECK(start(unwritten_kernel, 1, 32, 32 * sizeof(float), false, &sum) == cudaSuccess);
  return std::isnan(sum);
}

__global__ void divergent_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void early_return_kernel() {
  if (threadIdx.x == 3) return;
  __syncthreads();
}

__global__ void shared_kernel(int writes) {
  int* const shared = shared_memory<int>();
  for (int i = threadIdx.x; i < writes; i += blockDim.x) shared[i] = i;
}

__global__ void grid_barrier_kernel() { grid_barrier(); }

__global__ void early_return_grid_kernel() {
  if (blockIdx.x == 1) return;
  grid_barrier();
}

__global__ void missing_lane_kernel(int* out) {
  if (threadIdx.x != 7) out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
}

__global__ void deadlock_kernel() {
  if (threadIdx.x == 9) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  __syncthreads();
}

__global__ void foreign_mask_kernel() { __syncwarp(0xffffu); }

__global__ void launching_kernel() { start(nothing_kernel, 1, 1, 0, false); }

__global__ void check_kernel(int bound) { FUSEDRES_DEVICE_CHECK(int(threadIdx.x) < bound); }

__global__ void throwing_kernel() {
  if (threadIdx.x == 1) throw 1;
}

__global__ void overflow_kernel(int depth, volatile int* out) {
  volatile char frame[1024] = {};
  frame[depth % 1024] = 1;
  if (depth > 0) overflow_kernel(depth - 1, out);
  *out += frame[0];
}

// --- Time ---------------------------------------------------------------------------------------

__global__ void barriers_kernel(int count) {
  for (int i = 0; i < count; ++i) __syncthreads();
}

bool measure() {
  using Clock = std::chrono::steady_clock;
  const auto seconds = [](Clock::time_point from) {
    return std::chrono::duration<double>(Clock::now() - from).count();
  };
  constexpr int kBlocks = 20, kWaits = 100;
  start(barriers_kernel, 1, 256, 0, false, 1);
  Clock::time_point from = Clock::now();
  start(barriers_kernel, kBlocks, 256, 0, false, kWaits);
  printf("%.3f us per wait of a thread\n", seconds(from) / (kBlocks * kWaits * 256) * 1e6);
  from = Clock::now();
  start(nothing_kernel, 1000, 256, 0, false);
  printf("%.3f us per thread that does not wait\n", seconds(from) / (1000 * 256) * 1e6);
  from = Clock::now();
  for (int i = 0; i < 1000; ++i) start(nothing_kernel, 1, 32, 0, false);
  printf("%.3f us per launch of a warp\n", seconds(from) / 1000 * 1e6);
  return true;
}

bool run_case(const std::string& name) {
  int out[64] = {};
  if (name == "block_sums") return block_sums<float>() && block_sums<double>();
  if (name == "grid_sums") return grid_sums();
  if (name == "warps") return warps();
  if (name == "halves") return halves();
  if (name == "host_threads") return host_threads();
  if (name == "copies") return copies(0, 0);
  if (name == "refusals") return refusals();
  if (name == "barrier") return races(1);
  if (name == "shared") return runs(start(shared_kernel, 2, 64, 400, false, 100));
  if (name == "race") return races(0);
  if (name == "unwritten") return reads_unwritten();
  if (name == "divergent_barrier") return runs(start(divergent_kernel, 1, 64, 0, false));
  if (name == "early_return") return runs(start(early_return_kernel, 1, 64, 0, false));
  if (name == "shared_overrun") return runs(start(shared_kernel, 2, 64, 400, false, 101));
  if (name == "no_shared") return runs(start(shared_kernel, 1, 64, 0, false, 64));
  if (name == "global_overrun") return copies(0, 1);
  if (name == "misaligned") return copies(1, 0);
  if (name == "grid_barrier_alone") return runs(start(grid_barrier_kernel, 2, 32, 0, false));
  if (name == "too_large") return runs(start(grid_barrier_kernel, 4, 32, 0, true));
  if (name == "early_return_grid") return runs(start(early_return_grid_kernel, 3, 32, 0, true));
  if (name == "missing_lane") return runs(start(missing_lane_kernel, 1, 64, 0, false, out));
  if (name == "absent_lane") return runs(start(missing_lane_kernel, 1, 7, 0, false, out));
  if (name == "deadlock") return runs(start(deadlock_kernel, 1, 32, 0, false));
  if (name == "foreign_mask") return runs(start(foreign_mask_kernel, 1, 32, 0, false));
  if (name == "launches") return runs(start(launching_kernel, 1, 32, 0, false));
  if (name == "check") return runs(start(check_kernel, 1, 64, 0, false, 63));
  if (name == "throws") return runs(start(throwing_kernel, 1, 32, 0, false));
  if (name == "overflow") return runs(start(overflow_kernel, 1, 1, 0, false, 1000, out));
  if (name == "measure") return measure();
  fprintf(stderr, "no case %s\n", name.c_str());
  exit(2);
}

}  // namespace fusedres

int main(int argc, char** argv) {
  return fusedres::run_cases(argc, argv, 48 << 10, fusedres::run_case);
}
