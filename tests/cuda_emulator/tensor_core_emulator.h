// The twins of csrc/cuda/tensor_core.h; async.cpp and products.cpp do what they ask for.
#pragma once

#include "cuda_emulator.h"

namespace fusedres {
namespace emulator {
#pragma GCC visibility push(hidden)

uint32_t shared_address(const void* p, Site site);
void copy_async(void* shared, const void* global, Site site);
void copy_commit();
void copy_wait(int left);
void load_matrices(uint32_t* words, const void* row, bool transposed, Site site);
void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bfloat16, Site site);

#pragma GCC visibility pop
}  // namespace emulator

inline uint32_t shared_address(const void* p, const char* file = __builtin_FILE(),
                               int line = __builtin_LINE()) {
  return emulator::shared_address(p, {file, line});
}

inline void copy_async(void* shared, const void* global, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  emulator::copy_async(shared, global, {file, line});
}

inline void copy_commit() { emulator::copy_commit(); }

template <int kLeft>
void copy_wait() {
  static_assert(kLeft >= 0);
  emulator::copy_wait(kLeft);
}

inline void load_matrices(uint32_t (&words)[4], const void* row,
                          const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::load_matrices(words, row, false, {file, line});
}

inline void load_matrices_transposed(uint32_t (&words)[4], const void* row,
                                     const char* file = __builtin_FILE(),
                                     int line = __builtin_LINE()) {
  emulator::load_matrices(words, row, true, {file, line});
}

template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
              const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
  emulator::multiply(d, a, b0, b1, std::is_same_v<T, BFloat16>, {file, line});
}

}  // namespace fusedres
