// Per-channel sums and moments on the CPU, in two stages without atomics.
//
// Stage 1 cuts the tensor into items (NHWC: a block of pixels, kTile channels at most; NCHW: one
// plane), walks each item in chunks that fit the L2 cache, sums a chunk in the accumulation type
// and chunks in double, and writes one row of partials per block. Stage 2 merges the rows of each
// channel in order. A block has at least 64 pixels, so partials stay small beside the tensor.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/numeric.h"
#include "common/traversal.h"
#include "fusedres/types.h"

namespace fusedres {

constexpr int64_t kTile = 1024;  // channels per item: their accumulators stay in the L1 cache

// Pixels [row, row + rows), counted through N, H, W, of channels [channel, channel + channels).
struct Tile {
  int64_t row, rows, channel, channels;
};

// What one element adds to up to three sums.
template <class Acc>
struct Terms {
  Acc first{}, second{}, third{};
};

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
  const int64_t step = shape.channels_inner() ? std::clamp<int64_t>(pixels, 32, 64) : 4096;
  for (int64_t done = 0; done < tile.rows; done += step) {
    body(Tile{tile.row + done, std::min(step, tile.rows - done), tile.channel, tile.channels});
  }
}

// sums[k][i] += the k-th term of f(offset, channel) over the pixels of channel tile.channel + i.
template <int kSums, class Acc, class F>
void add_tile(const Shape& shape, const Tile& tile, const F& f, Acc (&sums)[kSums][kTile]) {
  const int64_t channels = shape.c, end = tile.row + tile.rows;
  if (shape.channels_inner()) {
    for (int64_t row = tile.row; row < end; ++row) {
      const int64_t offset = row * channels + tile.channel;
#pragma omp simd
      for (int64_t i = 0; i < tile.channels; ++i) {
        const Terms<Acc> t = f(offset + i, tile.channel + i);
        sums[0][i] += t.first;
        if constexpr (kSums > 1) sums[1][i] += t.second;
        if constexpr (kSums > 2) sums[2][i] += t.third;
      }
    }
  } else {
    const int64_t c = tile.channel, n = tile.row / shape.hw();
    const int64_t offset = (n * channels + c - n) * shape.hw() + tile.row;
    Acc first = 0, second = 0, third = 0;
#pragma omp simd reduction(+ : first, second, third)
    for (int64_t i = 0; i < tile.rows; ++i) {
      const Terms<Acc> t = f(offset + i, c);
      first += t.first;
      second += t.second;
      third += t.third;
    }
    sums[0][0] += first;
    if constexpr (kSums > 1) sums[1][0] += second;
    if constexpr (kSums > 2) sums[2][0] += third;
  }
}

template <int kSums, class T>
void clear(T (&sums)[kSums][kTile], int64_t channels) {
  for (auto& row : sums) std::fill_n(row, channels, T(0));
}

// Stage 1 of kSums per-channel sums of f into partials [partial_rows, kSums, C]. prepare(tile) runs
// on each chunk first: it may write what f then reads from cache.
template <int kSums, class Acc, class Prepare, class F>
void sum_stage1(const Shape& shape, int threads, double* partials, const Prepare& prepare,
                const F& f) {
  for_each_item(shape, threads, [&](int64_t block, const Tile& item) {
    const F local = f;
    double totals[kSums][kTile];
    clear(totals, item.channels);
    for_each_chunk(shape, item, [&](const Tile& chunk) {
      Acc sums[kSums][kTile];
      clear(sums, chunk.channels);
      prepare(chunk);
      add_tile<kSums>(shape, chunk, local, sums);
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

// Stage 2: emit(column, sum) for the columns of partials [rows, columns].
template <class Emit>
void sum_stage2(const double* partials, int64_t rows, int64_t columns, int threads,
                const Emit& emit) {
  parallel_for(ceil_div(columns, kTile), rows * columns, threads, [&](int64_t tile) {
    const int64_t begin = tile * kTile, width = std::min(kTile, columns - begin);
    double sums[kTile] = {};
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

}  // namespace fusedres
