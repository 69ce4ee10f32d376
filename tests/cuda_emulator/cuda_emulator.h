// CUDA's language for a host compiler: g++ compiles the kernels of csrc/cuda with this header, and
// emulator.cpp runs them on the CPU. csrc/cuda/device.h includes it where it is not nvcc's turn,
// and the second half has the twins of what that header defines for the GPU.
//
// A thread runs until it waits, so one that spins on memory until another writes there hangs.
#pragma once

#include <cuda_runtime_api.h>
#include <math.h>  // sqrt() and the like for float and double, outside of std, as nvcc has them

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "common/numeric.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static_assert(false, "no __shared__ variables: use shared_memory<T>()");

namespace fusedres {
namespace emulator {

struct Site {
  const char* file;
  int line;
};

enum class WarpOp { kSync, kShfl, kShflUp, kShflDown, kShflXor, kBallot, kAny, kAll, kTogether };

#pragma GCC visibility push(hidden)  // the module exports its kernels, whose names are looked up

// Prints the message with the kernel, block and thread in front of it, and aborts.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

unsigned char* shared_memory_of_block();
int lane();
void wait_for_block(Site site);
void wait_for_grid(Site site);

// Waits for all lanes of the mask. Shuffles return the value of lane `source`, votes the ballot.
uint64_t meet_warp(WarpOp op, unsigned mask, uint64_t value, int source, Site site);

cudaError_t run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, bool cooperative,
                void (*body)(const void*), const void* closure);

#pragma GCC visibility pop

// Runs the kernel to its end; `body` is what each of its threads does.
template <class F>
cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, bool cooperative,
                   const F& body) {
  return run(
      kernel, grid, block, shared_bytes, cooperative,
      [](const void* closure) { (*static_cast<const F*>(closure))(); }, &body);
}

template <class T>
T shuffle(WarpOp op, unsigned mask, T value, int source, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  word = meet_warp(op, mask, word, source, site);
  memcpy(&value, &word, sizeof value);
  return value;
}

// The lanes between which a shuffle of this width moves values.
struct Segment {
  int lane, begin, end;

  explicit Segment(int width) : lane(emulator::lane()) {
    if (width < 1 || width > 32 || (width & (width - 1))) fail("shuffle of width %d", width);
    begin = lane & ~(width - 1);
    end = begin + width;
  }
};

// One instruction on the GPU, which faults where the word is not aligned to its size.
template <class V>
void check_word(const V* p, const char* what) {
  constexpr size_t kBytes = sizeof(V);
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16);
  static_assert(std::is_trivially_copyable_v<V>);
  if (reinterpret_cast<uintptr_t>(p) % kBytes) {
    fail("misaligned %s of %zu bytes at %p", what, kBytes, static_cast<const void*>(p));
  }
}

}  // namespace emulator
}  // namespace fusedres

// Views of what the engine sets for each thread; hidden, so that no other library's are meant.
#pragma GCC visibility push(hidden)
extern const uint3& threadIdx;
extern const uint3& blockIdx;
extern const dim3& blockDim;
extern const dim3& gridDim;
#pragma GCC visibility pop

// Every wait knows its place in the source: file and line are never passed.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  fusedres::emulator::wait_for_block({file, line});
}

inline void __syncwarp(unsigned mask = ~0u, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  using namespace fusedres::emulator;
  meet_warp(WarpOp::kSync, mask, 0, lane(), {file, line});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  using namespace fusedres::emulator;
  const Segment s(width);
  return shuffle(WarpOp::kShfl, mask, value, s.begin | (source & (width - 1)), {file, line});
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  using namespace fusedres::emulator;
  const Segment s(width);
  const int source = s.lane - static_cast<int>(delta & 31u);
  return shuffle(WarpOp::kShflUp, mask, value, source < s.begin ? s.lane : source, {file, line});
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  using namespace fusedres::emulator;
  const Segment s(width);
  const int source = s.lane + static_cast<int>(delta & 31u);
  return shuffle(WarpOp::kShflDown, mask, value, source < s.end ? source : s.lane, {file, line});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  using namespace fusedres::emulator;
  const Segment s(width);
  const int source = s.lane ^ (lane_mask & 31);
  return shuffle(WarpOp::kShflXor, mask, value, source < s.end ? source : s.lane, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  using namespace fusedres::emulator;
  return static_cast<unsigned>(
      meet_warp(WarpOp::kBallot, mask, predicate != 0, lane(), {file, line}));
}

inline int __any_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                      int line = __builtin_LINE()) {
  using namespace fusedres::emulator;
  return meet_warp(WarpOp::kAny, mask, predicate != 0, lane(), {file, line}) != 0;
}

inline int __all_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                      int line = __builtin_LINE()) {
  using namespace fusedres::emulator;
  return meet_warp(WarpOp::kAll, mask, predicate != 0, lane(), {file, line}) == mask;
}

// Only one thread runs at a time.
template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, float> ||
                std::is_same_v<T, double>);
  const T old = *address;
  // As unsigned, integers wrap here too.
  if constexpr (std::is_same_v<T, int>) {
    *address = static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value));
  } else {
    *address = old + value;
  }
  return old;
}

namespace fusedres {

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::shared_memory_of_block());
}

inline void grid_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::wait_for_grid({file, line});
}

inline void forget(int&) {}

template <class V>
V load(const V* p) {
  emulator::check_word(p, "load");
  return *p;
}

template <class V>
V load_once(const V* p) {
  emulator::check_word(p, "load");
  return *p;
}

template <class V>
void store(V* p, V value) {
  emulator::check_word(p, "store");
  *p = value;
}

inline float to_acc(Float16 x) {
  _Float16 half;
  memcpy(&half, &x, sizeof half);
  return half;
}
template <>
inline Float16 from_acc<Float16>(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  Float16 out;
  memcpy(&out, &half, sizeof out);
  return out;
}

template <class T>
void round_pair(float a, float b, T* out) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
  out[0] = from_acc<T>(a);
  out[1] = from_acc<T>(b);
}

[[noreturn]] inline void device_check_failed(const char* condition, const char* file, int line) {
  emulator::fail("%s:%d: device check failed: %s", file, line, condition);
}

}  // namespace fusedres
