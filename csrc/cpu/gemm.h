// Products over channels, out[m, n] = sum over k of a[m, k] * weight, for convolutions of 1x1.
//
// The weight lies in panels of kPanel columns, a word of which holds neighbours along k; pixels are
// read as they lie in memory. A microkernel holds kMicroRows x kPanel sums in registers over all
// of k, so that no sum is stored before it is whole, and every sum runs in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/panels.h"
#include "cpu/traversal.h"
#include "fusedres/conv_bn.h"

namespace fusedres::FUSEDRES_CPU_LEVEL {

constexpr int kMicroRows = kVectorBytes == 64 ? 8 : 4;  // with their sums few registers are left
constexpr int kMicroVectors = 2;
constexpr int64_t kPanel = kMicroVectors * WordLanes::kCount;

// Whether a row of T is a row of words as it lies in memory.
template <class T>
constexpr bool kRowsAreWords = sizeof(T) * kPair<T> == sizeof(uint32_t);

// Memory that is read next, fetched while a product runs.
class Fetches {
 public:
  // Takes `bytes` from p on; none if p is null.
  void add(const void* p, int64_t bytes) {
    if (p == nullptr || bytes <= 0) return;
    regions_[count_++] = {static_cast<const char*>(p), static_cast<const char*>(p) + bytes};
    bytes_ += bytes;
  }
  // Spreads them over so many steps of microkernels.
  void spread(int64_t steps) { pitch_ = bytes_ > steps * kLine / 2 ? kLine : kLine / 2; }

  // What to fetch in the next microkernel, of so many steps.
  Ahead next(int64_t steps, const void* otherwise) {
    if (current_ == count_) return {static_cast<const char*>(otherwise), 0};
    Region& region = regions_[current_];
    const Ahead ahead = {region.next, pitch_};
    region.next += steps * pitch_;
    if (region.next >= region.end) ++current_;
    return ahead;
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Region {
    const char *next, *end;
  };
  Region regions_[8];
  int count_ = 0, current_ = 0;
  int64_t bytes_ = 0, pitch_ = kLine;
};

template <class T, int kRows>
void microkernel(const uint32_t* a, const uint32_t* panel, int64_t steps, T* out, int64_t width,
                 Ahead ahead) {
  using Lane = Vector<T, true>;
  WordValues sums[kRows][kMicroVectors] = {};
  for (int64_t step = 0; step < steps; ++step) {
    __builtin_prefetch(ahead.line + step * ahead.pitch);
    Words columns[kMicroVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kMicroVectors; ++v) {
      memcpy(&columns[v], panel + step * kPanel + v * WordLanes::kCount, sizeof columns[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Words row = Words{} + a[r * steps + step];
#pragma GCC unroll 2
      for (int v = 0; v < kMicroVectors; ++v) {
        sums[r][v] = multiply_add<T>(row, columns[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kMicroVectors; ++v) {
      Lane::store(out + r * width + v * WordLanes::kCount, sums[r][v]);
    }
  }
}

// out [rows, columns] = a [rows, depth] times the panels; columns is a multiple of kPanel.
template <class T>
void multiply(const T* a, int64_t rows, int64_t depth, const uint32_t* panels, int64_t columns,
              T* out, Fetches& fetches) {
  static_assert(kRowsAreWords<T>);
  const int64_t steps = depth / kPair<T>;
  fetches.spread(rows / kMicroRows * (columns / kPanel) * steps);
  for (int64_t n = 0; n < columns; n += kPanel, panels += steps * kPanel) {
    const auto words = [&](int64_t row) {
      return reinterpret_cast<const uint32_t*>(a + row * depth);
    };
    int64_t row = 0;
    for (; row + kMicroRows <= rows; row += kMicroRows) {
      microkernel<T, kMicroRows>(words(row), panels, steps, out + row * columns + n, columns,
                                 fetches.next(steps, panels));
    }
    for (; row < rows; ++row) {
      microkernel<T, 1>(words(row), panels, steps, out + row * columns + n, columns,
                        {reinterpret_cast<const char*>(panels), 0});
    }
  }
}

// Panels of weight [filters, channels], columns of which are filters.
template <class T, class W>
void pack_filters(const W* weight, int64_t filters, int64_t channels, int threads,
                  uint32_t* panels) {
  constexpr int64_t kAtOnce = 32, kWords = kAtOnce / kPair<T>;
  const int64_t steps = channels / kPair<T>;
  parallel_for(filters / kPanel, filters * channels, threads, [&](int64_t i) {
    uint32_t* const panel = panels + i * kPanel * steps;
    for (int64_t c = 0; c < channels; c += kAtOnce) {
      for (int64_t k = 0; k < kPanel; ++k) {
        const W* const source = weight + (i * kPanel + k) * channels + c;
        T row[kAtOnce];
        uint32_t words[kWords];
        for (int64_t j = 0; j < kAtOnce; j += WordLanes::kCount) {
          Vector<T, true>::store(row + j, Vector<W, true>::load(source + j));
        }
        memcpy(words, row, sizeof words);
        for (int64_t j = 0; j < kWords; ++j) panel[(c / kPair<T> + j) * kPanel + k] = words[j];
      }
    }
  });
}

// The same for columns that are channels, and sums over filters.
template <class T, class W>
void pack_channels(const W* weight, int64_t filters, int64_t channels, int threads,
                   uint32_t* panels) {
  const int64_t steps = filters / kPair<T>;
  parallel_for(channels / kPanel, filters * channels, threads, [&](int64_t i) {
    uint32_t* const panel = panels + i * kPanel * steps;
    for (int64_t step = 0; step < steps; ++step) {
      const W* const first = weight + step * kPair<T> * channels + i * kPanel;
      const W* const second = first + (kPair<T> - 1) * channels;
      for (int64_t j = 0; j < kPanel; j += WordLanes::kCount) {
        using Lane = Vector<W, true>;
        const Words words = word<T>(Lane::load(first + j), Lane::load(second + j));
        memcpy(panel + step * kPanel + j, &words, sizeof words);
      }
    }
  });
}

// Throws where the kernels on panels cannot serve.
inline void check_pointwise(const char* op, DType dtype, const Shape& input, const Shape& output,
                            DType weight) {
  const bool typed = (dtype == DType::kFloat32 || dtype == DType::kBFloat16) &&
                     (weight == dtype || weight == DType::kFloat32);
  const bool nhwc = input.channels_inner() && output.channels_inner();
  constexpr int64_t kBlock = ConvBnFwdParams::kBlock;
  const bool blocks =
      input.c % kBlock == 0 && output.c % kBlock == 0 && input.c <= ConvBnFwdParams::kMostChannels;
  if (typed && nhwc && blocks && input.rows() == output.rows()) return;
  throw std::invalid_argument(std::string(op) +
                              ": needs float32 or bfloat16 in NHWC, channels in blocks of 32");
}

inline int64_t panel_bytes(int64_t filters, int64_t channels) {
  return filters * channels * static_cast<int64_t>(sizeof(uint32_t));  // enough for each dtype
}

// Pixels cut into blocks of whole microkernels but for the last, and blocks into chunks whose
// results a cache holds until they are read again.
struct PixelBlocks {
  int64_t rows, blocks;

  static constexpr int64_t kChunk = 64, kGroup = 8;
  static constexpr int64_t kScratch = 1 << 15;  // elements
  static_assert(ConvBnFwdParams::kMostChannels <= kScratch / kGroup);

  explicit PixelBlocks(int64_t rows_) : rows(rows_) {
    constexpr int64_t kMost = 256, kMultiple = 8;  // which few threads divide evenly
    const int64_t wanted = ceil_div(ceil_div(rows, kChunk), kMultiple) * kMultiple;
    blocks = std::min(std::min(wanted, kMost), ceil_div(rows, kGroup));
  }
  int64_t begin(int64_t block) const {
    return std::min(rows, ceil_div(rows, kGroup) * block / blocks * kGroup);
  }

  // Calls body(row, rows) for the chunks of a block, each of which fits a scratch of kScratch.
  template <class Body>
  void for_each_chunk(int64_t block, int64_t channels, const Body& body) const {
    const int64_t most = kScratch / channels / kGroup * kGroup, step = std::min(kChunk, most);
    const int64_t end = begin(block + 1);
    for (int64_t row = begin(block); row < end; row += step) body(row, std::min(step, end - row));
  }
};

}  // namespace fusedres::FUSEDRES_CPU_LEVEL
