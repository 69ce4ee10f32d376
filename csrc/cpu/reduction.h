// Per-channel sums and moments on the CPU, in two stages without atomics.
//
// Stage 1 cuts the tensor into items (NHWC: a block of pixels, kTile channels at most; NCHW: one
// plane), walks each item in chunks, sums a chunk in the accumulation type and chunks in double,
// and writes one row of partials per block. Stage 2 merges the rows of each channel in order. A
// block has at least 128 pixels, so partials stay small beside the tensor.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/numeric.h"
#include "cpu/lanes.h"
#include "cpu/traversal.h"
#include "fusedres/types.h"

namespace fusedres::FUSEDRES_CPU_LEVEL {

constexpr int64_t kTile = 1024;  // channels per item: their accumulators stay in the L1 cache
// Rows of accumulators lie off the distance at which a load waits for a store to another row.
constexpr int64_t kTileRow = kTile + 48;

// Pixels [row, row + rows), counted through N, H, W, of channels [channel, channel + channels).
struct Tile {
  int64_t row, rows, channel, channels;
};

// What one element, or several at once, add to up to three sums: value, value*second, value*third.
template <class Values>
struct Factors {
  Values value{}, second{}, third{};
};

// To the sums of pixel after pixel.
template <int kSums, class L, class Values>
FUSEDRES_HOST_DEVICE void add(Values (&sums)[kSums], const Factors<Values>& f) {
  sums[0] += f.value;
  if constexpr (kSums > 1) sums[1] = L::fma(f.value, f.second, sums[1]);
  if constexpr (kSums > 2) sums[2] = L::fma(f.value, f.third, sums[2]);
}

inline int64_t block_begin(const Shape& shape, int64_t block) {
  const int64_t blocks = partial_rows(shape), rows = shape.rows();
  return rows / blocks * block + std::min(block, rows % blocks);
}

// Calls body(partial_row, tile) for every item of stage 1.
template <class Body>
void for_each_item(const Shape& shape, int threads, const Body& body) {
  const int64_t tiles = shape.channels_inner() ? ceil_div(shape.c, kTile) : shape.c;
  const int64_t width = shape.channels_inner() ? kTile : 1;
  parallel_for(partial_rows(shape) * tiles, shape.numel(), threads, [&](int64_t item) {
    const int64_t block = item / tiles, channel = item % tiles * width;
    const int64_t row = block_begin(shape, block);
    body(block, Tile{row, block_begin(shape, block + 1) - row, channel,
                     std::min(width, shape.c - channel)});
  });
}

template <class Body>
void for_each_chunk(const Shape& shape, const Tile& tile, const Body& body) {
  const int64_t pixels = (1 << 15) / tile.channels;
  const int64_t step = shape.channels_inner() ? std::clamp<int64_t>(pixels, 32, 64) : 1024;
  for (int64_t done = 0; done < tile.rows; done += step) {
    body(Tile{tile.row + done, std::min(step, tile.rows - done), tile.channel, tile.channels});
  }
}

// Where the pixels of an NCHW tile begin.
inline int64_t plane_offset(const Shape& shape, const Tile& tile) {
  const int64_t n = tile.row / shape.hw();
  return (n * shape.c + tile.channel - n) * shape.hw() + tile.row;
}

// sums[k][i] = the k-th sum of f(lanes, offset, channel) over the pixels of channel
// tile.channel + i. Some pixels are added to each other before they join a sum.
template <int kSums, class T, class F, class Acc>
void sum_tile(const Shape& shape, const Tile& tile, const F& f, Acc (&sums)[kSums][kTileRow]) {
  constexpr int kTogether = 8, kChains = 4;
  if (shape.channels_inner()) {
    for (auto& row : sums) std::fill_n(row, tile.channels, Acc(0));
    const int64_t end = tile.row + tile.rows, channels = shape.c;
    for (int64_t row = tile.row; row < end; row += kTogether) {
      const int64_t base = row * channels + tile.channel;
      const auto join = [&](auto lanes, int64_t i, auto rows) {
        using L = decltype(lanes);
        typename L::Values together[kSums] = {};
        for (int r = 0; r < rows; ++r) {
          add<kSums, L>(together, f(lanes, base + r * channels + i, tile.channel + i));
        }
        for (int k = 0; k < kSums; ++k) {
          L::store_acc(sums[k] + i, L::load_acc(sums[k] + i) + together[k]);
        }
      };
      if (row + kTogether <= end) {
        constexpr std::integral_constant<int, kTogether> kRows;
        for_lanes<T, true>(0, tile.channels, [&](auto l, int64_t i) { join(l, i, kRows); });
      } else {
        const int rows = static_cast<int>(end - row);
        for_lanes<T, true>(0, tile.channels, [&](auto l, int64_t i) { join(l, i, rows); });
      }
    }
  } else {
    using Wide = Vector<T, false>;
    using Single = Scalar<T, false>;
    const int64_t c = tile.channel, offset = plane_offset(shape, tile);
    typename Wide::Values wide[kChains][kSums] = {};
    constexpr int64_t kStep = kChains * Wide::kCount;
    int64_t i = 0;
    for (; i + kStep <= tile.rows; i += kStep) {
      for (int r = 0; r < kChains; ++r) {
        add<kSums, Wide>(wide[r], f(Wide{}, offset + i + r * Wide::kCount, c));
      }
    }
    Acc single[kSums];
    for (int k = 0; k < kSums; ++k) {
      single[k] = Wide::sum((wide[0][k] + wide[1][k]) + (wide[2][k] + wide[3][k]));
    }
    for (; i < tile.rows; ++i) add<kSums, Single>(single, f(Single{}, offset + i, c));
    for (int k = 0; k < kSums; ++k) sums[k][0] = single[k];
  }
}

// Stage 1 of kSums per-channel sums of f into partials [partial_rows, kSums, C]. prepare(tile) runs
// on each chunk first: it may write what f then reads from cache.
template <int kSums, class T, class Prepare, class F>
void sum_stage1(const Shape& shape, int threads, double* partials, const Prepare& prepare,
                const F& f) {
  for_each_item(shape, threads, [&](int64_t block, const Tile& item) {
    const F local = f;
    double totals[kSums][kTileRow];
    for (auto& row : totals) std::fill_n(row, item.channels, 0.0);
    for_each_chunk(shape, item, [&](const Tile& chunk) {
      alignas(64) acc_t<T> sums[kSums][kTileRow];
      prepare(chunk);
      sum_tile<kSums, T>(shape, chunk, local, sums);
      for (int k = 0; k < kSums; ++k) {
        for (int64_t i = 0; i < chunk.channels; ++i) totals[k][i] += sums[k][i];
      }
    });
    for (int k = 0; k < kSums; ++k) {
      std::copy_n(totals[k], item.channels,
                  partials + (block * kSums + k) * shape.c + item.channel);
    }
  });
}

constexpr int64_t kColumns = 128;  // of partials, per item of stage 2

// Stage 2: emit(column, sum) for the columns of partials [rows, columns].
template <class Emit>
void sum_stage2(const double* partials, int64_t rows, int64_t columns, int threads,
                const Emit& emit) {
  parallel_for(ceil_div(columns, kColumns), rows * columns, threads, [&](int64_t tile) {
    const int64_t begin = tile * kColumns, width = std::min(kColumns, columns - begin);
    double sums[kColumns] = {};
    for (int64_t row = 0; row < rows; ++row) {
      const double* source = partials + row * columns + begin;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) sums[i] += source[i];
    }
    for (int64_t i = 0; i < width; ++i) emit(begin + i, sums[i]);
  });
}

// Chan's merge of (count, mean, M2) for a row of channels: the second sample joins the first.
inline void merge_moments(double count, double* mean, double* m2, double other_count,
                          const double* other_mean, const double* other_m2, int64_t channels) {
  const double total = count + other_count;
  const double share = total > 0 ? other_count / total : 0;
#pragma omp simd
  for (int64_t i = 0; i < channels; ++i) {
    const double delta = other_mean[i] - mean[i];
    mean[i] += delta * share;
    m2[i] += other_m2[i] + delta * delta * (count * share);
  }
}

}  // namespace fusedres::FUSEDRES_CPU_LEVEL
