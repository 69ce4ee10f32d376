// The twins of csrc/cuda/hopper.h; async.cpp and products.cpp do what they ask for.
#pragma once

#include "cuda_emulator.h"
#include "fusedres/types.h"

namespace fusedres {

struct alignas(64) TensorMap {
  const unsigned char* matrix;
  int64_t rows, columns;
  int64_t stride;  // in bytes
  uint64_t box_rows;
  uint64_t mark;  // of one that describe() has written
  uint64_t rest[10];
};
static_assert(sizeof(TensorMap) == 128);

using Barrier = uint64_t;

namespace emulator {
#pragma GCC visibility push(hidden)

cudaError_t describe(TensorMap* map, const void* matrix, int64_t rows, int64_t columns,
                     int64_t stride, int box_rows);
void barrier_init(Barrier* barrier, unsigned count, Site site);
void barrier_init_fence(Site site);
void barrier_arrive(Barrier* barrier, bool expects, unsigned bytes, Site site);
void barrier_wait(Barrier* barrier, unsigned parity, Site site);
void copy_box(const TensorMap* map, Barrier* barrier, void* shared, int row, int column, Site site);
void part_barrier(int id, int threads, Site site);
void move_registers(bool take, int count, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int left, Site site);
void wgmma(float* d, int size, const uint32_t* a, uint64_t b, bool accumulate, bool n_major,
           bool bfloat16, Site site);

#pragma GCC visibility pop
}  // namespace emulator

inline cudaError_t describe(TensorMap* map, DType, const void* matrix, int64_t rows,
                            int64_t columns, int64_t stride, int box_rows) {
  return emulator::describe(map, matrix, rows, columns, stride, box_rows);
}

inline void barrier_init(Barrier* barrier, unsigned count, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
  emulator::barrier_init(barrier, count, {file, line});
}

inline void barrier_init_fence(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::barrier_init_fence({file, line});
}

inline void barrier_arrive(Barrier* barrier, const char* file = __builtin_FILE(),
                           int line = __builtin_LINE()) {
  emulator::barrier_arrive(barrier, false, 0, {file, line});
}

inline void barrier_arrive_expect(Barrier* barrier, unsigned bytes,
                                  const char* file = __builtin_FILE(),
                                  int line = __builtin_LINE()) {
  emulator::barrier_arrive(barrier, true, bytes, {file, line});
}

inline void barrier_wait(Barrier* barrier, unsigned parity, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
  emulator::barrier_wait(barrier, parity, {file, line});
}

inline void copy_box(const TensorMap* map, Barrier* barrier, void* shared, int row, int column,
                     const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::copy_box(map, barrier, shared, row, column, {file, line});
}

inline void prefetch_map(const TensorMap*) {}

// Which ordinary stores the async proxy reads is not known here: a missing one does not show.
inline void fence_async() {}

inline void part_barrier(int id, int threads, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
  emulator::part_barrier(id, threads, {file, line});
}

template <int kCount>
void take_registers(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  emulator::move_registers(true, kCount, {file, line});
}

template <int kCount>
void give_registers(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  emulator::move_registers(false, kCount, {file, line});
}

inline void wgmma_fence(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::wgmma_fence({file, line});
}

inline void wgmma_commit(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::wgmma_commit({file, line});
}

template <int kLeft>
void wgmma_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(kLeft >= 0 && kLeft <= 7);
  emulator::wgmma_wait(kLeft, {file, line});
}

template <int kSize>
void settle(float (&)[kSize]) {}

template <class T, bool kNMajor, int kSize>
void wgmma(float (&d)[kSize], const uint32_t (&a)[4], uint64_t b, bool accumulate,
           const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(kSize == 32 || kSize == 64 || kSize == 128);
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
  constexpr bool kBFloat16 = std::is_same_v<T, BFloat16>;
  emulator::wgmma(d, kSize, a, b, accumulate, kNMajor, kBFloat16, {file, line});
}

}  // namespace fusedres
