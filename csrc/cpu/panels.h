// Words of panels, the operands of products on the CPU: one number each, or two of bf16 where the
// machine multiplies pairs of it.
#pragma once

#include <cstdint>

#include "cpu/lanes.h"

namespace fusedres::FUSEDRES_CPU_LEVEL {

using WordLanes = Vector<float, true>;
using WordValues = WordLanes::Values;
using Words = VectorOf<uint32_t, WordLanes::kCount>::type;

// How many numbers a word holds.
template <class T>
#ifdef __AVX512BF16__
constexpr int kPair = std::is_same_v<T, BFloat16> ? 2 : 1;
#else
constexpr int kPair = 1;
#endif

template <class T>
FUSEDRES_HOST_DEVICE WordValues multiply_add(Words left, Words right, WordValues sum) {
#ifdef __AVX512BF16__
  if constexpr (kPair<T> == 2) {
    return _mm512_dpbf16_ps(sum, bits_as<__m512bh>(left), bits_as<__m512bh>(right));
  }
#endif
  return WordLanes::fma(bits_as<WordValues>(left), bits_as<WordValues>(right), sum);
}

// One word for each lane: its value, or two, rounded to the dtype; the second is in the upper half.
template <class T>
FUSEDRES_HOST_DEVICE Words word(WordValues first, WordValues second) {
#ifdef __AVX512BF16__
  if constexpr (kPair<T> == 2) {
    // lanes 0, 16, 1, 17, ..: one half of each
    alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                        21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                        11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i order;
    memcpy(&order, kOrder, sizeof order);
    const auto both = bits_as<__m512i>(_mm512_cvtne2ps_pbh(second, first));
    return bits_as<Words>(_mm512_permutexvar_epi16(order, both));
  }
#endif
  (void)second;
  return bits_as<Words>(Vector<T, true>::rounded(first));
}

// The same of what is stored already; null for zeros.
template <class T>
FUSEDRES_HOST_DEVICE Words word(const T* first, const T* second) {
  using Lane = Vector<T, true>;
  const Words one = first == nullptr ? Words{} : bits_as<Words>(Lane::load(first));
  if constexpr (kPair<T> == 2) {
    return (one >> 16) | (second == nullptr ? Words{} : bits_as<Words>(Lane::load(second)));
  } else {
    (void)second;
    return one;
  }
}

// Two vectors of words side by side.
template <class T>
FUSEDRES_HOST_DEVICE void two_words(const T* first, const T* second, Words (&words)[2]) {
#ifdef __AVX512BF16__
  if constexpr (kPair<T> == 2) {
    // lane i of either row, side by side: the lower half of the lanes, and the upper one
    alignas(64) static constexpr uint16_t kOrder[2][32] = {
        {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
         24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    __m512i one{}, other{};
    if (first != nullptr) memcpy(&one, first, sizeof one);
    if (second != nullptr) memcpy(&other, second, sizeof other);
    for (int i = 0; i < 2; ++i) {
      __m512i order;
      memcpy(&order, kOrder[i], sizeof order);
      words[i] = bits_as<Words>(_mm512_permutex2var_epi16(one, order, other));
    }
    return;
  }
#endif
  const auto at = [](const T* row, int i) {
    return row == nullptr ? nullptr : row + i * WordLanes::kCount;
  };
  for (int i = 0; i < 2; ++i) words[i] = word<T>(at(first, i), at(second, i));
}

// Lines that a microkernel fetches meanwhile, one a step: in a burst, fetches would wait for each
// other.
struct Ahead {
  const char* line;
  int64_t pitch;
};

}  // namespace fusedres::FUSEDRES_CPU_LEVEL
