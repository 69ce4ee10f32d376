// Several elements at once, by the compiler's own vector types: one source for every instruction
// set.
//
// Each file of csrc/cpu is compiled once per level, a set of instructions (setup_cpu.py), in a
// namespace of that name; csrc/cpu_levels.cpp picks one at run time. All levels give the same bits:
// nothing is contracted to fused multiply-adds, and sums of a channel run in one order. The
// exception are denormal bf16 numbers, which the conversion instruction of avx512_bf16 takes for
// zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/numeric.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace fusedres::FUSEDRES_CPU_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int kCount>
struct VectorOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};
template <class T>
struct VectorOf<T, 1> {
  using type = T;
};

// Of one width with Acc: what its comparisons give, and its bits.
template <class Acc>
using signed_t = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;

template <class To, class From>
FUSEDRES_HOST_DEVICE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// kCount neighbouring elements of type T, along channels (kInner: NHWC) or along pixels (NCHW).
template <class T, int kCount_, bool kInner_>
struct Lanes {
  static constexpr int kCount = kCount_;
  static constexpr bool kInner = kInner_;
  using Acc = acc_t<T>;
  using Values = typename VectorOf<Acc, kCount>::type;
  using Ints = typename VectorOf<signed_t<Acc>, kCount>::type;

  template <class To, class From>
  static FUSEDRES_HOST_DEVICE To raw_load(const From* p) {
    To to;
    memcpy(&to, p, sizeof to);
    return to;
  }

  static FUSEDRES_HOST_DEVICE Values load_acc(const Acc* p) { return raw_load<Values>(p); }
  static FUSEDRES_HOST_DEVICE void store_acc(Acc* p, Values v) { memcpy(p, &v, sizeof v); }
  static FUSEDRES_HOST_DEVICE Values all(Acc value) { return value - Values{}; }  // not +: -0
  static FUSEDRES_HOST_DEVICE Ints all_ints(signed_t<Acc> value) { return Ints{} + value; }

  // A vector of the channels that the lanes lie in, the first of them `channel`.
  static FUSEDRES_HOST_DEVICE Values channel(const Acc* vector, int64_t channel) {
    if constexpr (kInner) {
      return load_acc(vector + channel);
    } else {
      return all(vector[channel]);
    }
  }

  static FUSEDRES_HOST_DEVICE Values load(const T* p) {
    if constexpr (!std::is_same_v<T, BFloat16>) {
      return raw_load<Values>(p);
    } else if constexpr (kCount == 1) {
      return to_acc(*p);
    } else {
      return bits_as<Values>(load_upper(p));
    }
  }

  // v as it will be stored, still in the accumulation type.
  static FUSEDRES_HOST_DEVICE Values rounded(Values v) {
    if constexpr (!std::is_same_v<T, BFloat16>) {
      return v;
    } else if constexpr (kCount == 1) {
      return to_acc(from_acc<T>(v));
    } else {
#ifdef __AVX512BF16__
      const auto halves = bits_as<__m256i>(_mm512_cvtneps_pbh(bits_as<__m512>(v)));
      return bits_as<Values>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#else
      const Words bits = bits_as<Words>(v);
      const Words up = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
      const Words nan = bits_as<Words>(v != v);
      return bits_as<Values>((up & ~nan) | (nan & 0x7fc00000u));
#endif
    }
  }

  // Stores what rounded() gave.
  static FUSEDRES_HOST_DEVICE void put(T* p, Values v) {
    if constexpr (!std::is_same_v<T, BFloat16>) {
      memcpy(p, &v, sizeof v);
    } else if constexpr (kCount == 1) {
      p->bits = static_cast<uint16_t>(bits_as<uint32_t>(v) >> 16);
    } else {
      store_upper(p, bits_as<Words>(v));
    }
  }

  static FUSEDRES_HOST_DEVICE void store(T* p, Values v) {
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<T, BFloat16> && kCount > 1) {
      const __m256bh halves = _mm512_cvtneps_pbh(bits_as<__m512>(v));
      memcpy(p, &halves, sizeof halves);
      return;
    }
#endif
    put(p, rounded(v));
  }

  // store() past the caches, where p lies on a whole vector; end_of_stream() makes it seen.
  static FUSEDRES_HOST_DEVICE void stream(T* p, Values v) {
#if defined(__AVX512F__) || defined(__AVX2__)
    if constexpr (kCount > 1) {
      alignas(kVectorBytes) T stored[kCount];
      store(stored, v);
#ifdef __AVX512F__
      if constexpr (sizeof(T) == 2) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), raw_load<__m256i>(stored));
      } else {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p), raw_load<__m512i>(stored));
      }
#else
      if constexpr (sizeof(T) == 2) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(p), raw_load<__m128i>(stored));
      } else {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), raw_load<__m256i>(stored));
      }
#endif
      return;
    }
#endif
    store(p, v);
  }

  // kCount halves as the upper halves of words, and back. Compilers do not find these instructions
  // by themselves.
  using Halves = typename VectorOf<uint16_t, kCount>::type;
  using Words = typename VectorOf<uint32_t, kCount>::type;
  static FUSEDRES_HOST_DEVICE Words load_upper(const T* p) {
#if defined(__AVX512F__)
    const auto words = _mm512_cvtepu16_epi32(raw_load<__m256i>(p));
    return bits_as<Words>(_mm512_slli_epi32(words, 16));
#elif defined(__AVX2__)
    const auto words = _mm256_cvtepu16_epi32(raw_load<__m128i>(p));
    return bits_as<Words>(_mm256_slli_epi32(words, 16));
#elif defined(__x86_64__)
    const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return bits_as<Words>(_mm_unpacklo_epi16(_mm_setzero_si128(), halves));
#else
    return __builtin_convertvector(raw_load<Halves>(p), Words) << 16;
#endif
  }
  static FUSEDRES_HOST_DEVICE void store_upper(T* p, Words words) {
#if defined(__AVX512F__)
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits_as<__m512i>(words), 16));
    memcpy(p, &halves, sizeof halves);
#elif defined(__AVX2__)
    const __m256i low = _mm256_srli_epi32(bits_as<__m256i>(words), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
    const __m128i halves = _mm256_castsi256_si128(packed);
    memcpy(p, &halves, sizeof halves);
#elif defined(__x86_64__)
    const __m128i low =
        _mm_srai_epi32(bits_as<__m128i>(words), 16);  // fits what packs saturates to
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(low, low));
#else
    const Halves halves = __builtin_convertvector(words >> 16, Halves);
    memcpy(p, &halves, sizeof halves);
#endif
  }

  static FUSEDRES_HOST_DEVICE Values fma(Values a, Values b, Values c) {
#ifndef __FMA__
    return a * b + c;
#else
    if constexpr (kCount == 1) {
      return sizeof(Acc) == 8 ? __builtin_fma(a, b, c) : __builtin_fmaf(a, b, c);
    } else {
#ifdef __AVX512F__
      if constexpr (sizeof(Acc) == 8) {
        return _mm512_fmadd_pd(a, b, c);
      } else {
        return _mm512_fmadd_ps(a, b, c);
      }
#else
      if constexpr (sizeof(Acc) == 8) {
        return _mm256_fmadd_pd(a, b, c);
      } else {
        return _mm256_fmadd_ps(a, b, c);
      }
#endif
    }
#endif
  }

  // All bits set where the condition holds.
  static FUSEDRES_HOST_DEVICE Ints equals(Ints a, Ints b) {
    if constexpr (kCount == 1) {
      return -static_cast<Ints>(a == b);
    } else {
      return a == b;
    }
  }
  static FUSEDRES_HOST_DEVICE Values keep_if(Ints mask, Values v) {
    return bits_as<Values>(mask & bits_as<Ints>(v));
  }

  // relu_gate of activation.h: zero where decider <= 0, which is false for NaN.
  static FUSEDRES_HOST_DEVICE Values gate(Values decider, Values v) {
    if constexpr (kCount == 1) {
      return relu_gate(decider, v);
    } else {
      const Ints closed = decider <= Values{};
      return keep_if(~closed, v);
    }
  }

  // kCount bytes, one per lane.
  static FUSEDRES_HOST_DEVICE Ints load_bytes(const uint8_t* p) {
    if constexpr (kCount == 1) {
      return *p;
    } else {
#if defined(__AVX512F__)
      if constexpr (kCount == 16) {
        return bits_as<Ints>(_mm512_cvtepu8_epi32(raw_load<__m128i>(p)));
      } else {
        return bits_as<Ints>(_mm512_cvtepu8_epi64(_mm_cvtsi64_si128(raw_load<int64_t>(p))));
      }
#elif defined(__AVX2__)
      if constexpr (kCount == 8) {
        return bits_as<Ints>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(raw_load<int64_t>(p))));
      } else {
        return bits_as<Ints>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(raw_load<int32_t>(p))));
      }
#else
      using Bytes = typename VectorOf<uint8_t, kCount>::type;
      return __builtin_convertvector(raw_load<Bytes>(p), Ints);
#endif
    }
  }
  static FUSEDRES_HOST_DEVICE void store_bytes(uint8_t* p, Ints v) {
    if constexpr (kCount == 1) {
      *p = static_cast<uint8_t>(v);
    } else {
#if defined(__AVX512F__)
      if constexpr (kCount == 16) {
        const __m128i bytes = _mm512_cvtepi32_epi8(bits_as<__m512i>(v));
        memcpy(p, &bytes, kCount);
      } else {
        const __m128i bytes = _mm512_cvtepi64_epi8(bits_as<__m512i>(v));
        memcpy(p, &bytes, kCount);
      }
#else
      using Bytes = typename VectorOf<uint8_t, kCount>::type;
      const Bytes bytes = __builtin_convertvector(v, Bytes);
      memcpy(p, &bytes, sizeof bytes);
#endif
    }
  }

  // The lanes' sum, halves added to halves.
  static FUSEDRES_HOST_DEVICE Acc sum(Values v) {
    if constexpr (kCount == 1) {
      return v;
    } else {
      Acc each[kCount];
      memcpy(each, &v, sizeof v);
      for (int half = kCount / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) each[i] += each[i + half];
      }
      return each[0];
    }
  }
};

// As many lanes as a vector register holds in the type that T is computed in.
template <class T, bool kInner>
using Vector = Lanes<T, kVectorBytes / sizeof(acc_t<T>), kInner>;
template <class T, bool kInner>
using Scalar = Lanes<T, 1, kInner>;

FUSEDRES_HOST_DEVICE void end_of_stream() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}

// Calls f(lanes, i) for i in [begin, end): vectors, then what is left one by one.
template <class T, bool kInner, class F>
FUSEDRES_HOST_DEVICE void for_lanes(int64_t begin, int64_t end, const F& f) {
  using Wide = Vector<T, kInner>;
  int64_t i = begin;
  for (; i + Wide::kCount <= end; i += Wide::kCount) f(Wide{}, i);
  for (; i < end; ++i) f(Scalar<T, kInner>{}, i);
}

}  // namespace fusedres::FUSEDRES_CPU_LEVEL
