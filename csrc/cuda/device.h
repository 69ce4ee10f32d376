// The words of device code that a host compiler lacks: shared memory, accesses with cache hints,
// conversions (and the grid's barrier, in grid_barrier.h). Each has a twin in tests/cuda_emulator,
// with which g++ compiles every kernel of this folder for the CPU, to be tested where there is no
// GPU.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "common/activation.h"
#include "common/numeric.h"

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fusedres {

// The only way to shared memory, whose size is the launch's. On 1,024 bytes: the swizzle of a tile
// goes by bits of its address, and repeats after so many.
extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
template <class T>
__device__ __forceinline__ T* shared_memory() {
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// Tells the compiler that x may have changed here: what follows from it is computed again, where it
// would otherwise be kept in registers that a loop has no room for.
__device__ __forceinline__ void forget(int& x) { asm volatile("" : "+r"(x)); }

// An access of 2, 4, 8 or 16 bytes is one instruction on the word of that size.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};
template <class V>
using word_t = typename WordOf<sizeof(V)>::type;

// What is read again soon, by this kernel or the next.
template <class V>
__device__ __forceinline__ V load(const V* p) {
  const word_t<V> word = *reinterpret_cast<const word_t<V>*>(p);
  V value;
  memcpy(&value, &word, sizeof value);
  return value;
}

// What is not read again soon: first out of the caches.
template <class V>
__device__ __forceinline__ V load_once(const V* p) {
  const word_t<V> word = __ldcs(reinterpret_cast<const word_t<V>*>(p));
  V value;
  memcpy(&value, &word, sizeof value);
  return value;
}

// One instruction by name: an assignment of 16 bytes may be compiled into four.
__device__ __forceinline__ void store_word(uint4* p, uint4 word) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(word.x), "r"(word.y),
               "r"(word.z), "r"(word.w)
               : "memory");
}
template <class Word>
__device__ __forceinline__ void store_word(Word* p, Word word) {
  *p = word;
}

template <class V>
__device__ __forceinline__ void store(V* p, V value) {
  word_t<V> word;
  memcpy(&word, &value, sizeof value);
  store_word(reinterpret_cast<word_t<V>*>(p), word);
}

__device__ __forceinline__ float to_acc(Float16 x) {
  return __half2float(__ushort_as_half(x.bits));
}
template <>
__device__ __forceinline__ Float16 from_acc<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// Two roundings in one instruction.
__device__ __forceinline__ void round_pair(float a, float b, BFloat16* out) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  memcpy(out, &pair, sizeof pair);
}
__device__ __forceinline__ void round_pair(float a, float b, Float16* out) {
  const __half2 pair = __floats2half2_rn(a, b);
  memcpy(out, &pair, sizeof pair);
}

[[noreturn]] __device__ inline void device_check_failed(const char* condition, const char* file,
                                                        int line) {
  printf("%s:%d: device check failed: %s\n", file, line, condition);
  __trap();
}

}  // namespace fusedres

#else
#include "cuda_emulator.h"
#endif

// Bounds of what a thread is about to access; only in builds with FUSEDRES_DEBUG=1 and in tests.
#ifdef FUSEDRES_DEBUG
#define FUSEDRES_DEVICE_CHECK(condition) \
  ((condition) ? void(0) : ::fusedres::device_check_failed(#condition, __FILE__, __LINE__))
#else
#define FUSEDRES_DEVICE_CHECK(condition) void(0)
#endif

namespace fusedres {

// kSize elements that are loaded and stored at once.
template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  T values[kSize];
};

// The same, as words: what a branch leaves of 16-bit elements takes half as many registers so.
template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Packed {
  using Word = std::conditional_t<sizeof(T) * kSize % 4 == 0, uint32_t, uint16_t>;
  Word words[sizeof(T) * kSize / sizeof(Word)];
};

template <class T, int kSize>
__device__ __forceinline__ void unpack(const Packed<T, kSize>& packed, acc_t<T> (&x)[kSize]) {
  if constexpr (std::is_same_v<T, BFloat16> && kSize % 2 == 0) {  // one instruction an element
#pragma unroll
    for (int i = 0; i < kSize; i += 2) {
      const uint32_t low = packed.words[i / 2] << 16, high = packed.words[i / 2] & 0xffff0000u;
      memcpy(&x[i], &low, sizeof low);
      memcpy(&x[i + 1], &high, sizeof high);
    }
  } else {
    T values[kSize];
    memcpy(values, packed.words, sizeof values);
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = to_acc(values[i]);
  }
}

// Rounds to the storage type.
template <class T, int kSize>
__device__ __forceinline__ Vector<T, kSize> rounded(const acc_t<T> (&x)[kSize]) {
  Vector<T, kSize> out;
  if constexpr (sizeof(T) == 2 && kSize % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kSize; i += 2) round_pair(x[i], x[i + 1], &out.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) out.values[i] = from_acc<T>(x[i]);
  }
  return out;
}

}  // namespace fusedres
