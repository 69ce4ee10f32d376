// How CPU kernels walk a tensor. Work is cut by sizes alone, never by the number of threads, and no
// two items write the same element: results do not depend on the thread count.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/lanes.h"
#include "fusedres/types.h"

namespace fusedres::FUSEDRES_CPU_LEVEL {

// Calls body(i) for i in [0, items). `work` is the number of elements behind all items: below a
// few microseconds of it, waking the other threads costs more than they save.
template <class Body>
void parallel_for(int64_t items, int64_t work, int threads, const Body& body) {
  constexpr int64_t kSerialWork = 1 << 14;
  const bool parallel = threads > 1 && items > 1 && work >= kSerialWork;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (int64_t i = 0; i < items; ++i) body(i);
}

// Calls f(lanes, offset) on every element of [0, numel).
template <class T, class F>
void for_each_element(int64_t numel, int threads, const F& f) {
  constexpr int64_t kPiece = 1 << 13;
  parallel_for(ceil_div(numel, kPiece), numel, threads, [&](int64_t i) {
    const F local = f;
    for_lanes<T, true>(i * kPiece, std::min(numel, (i + 1) * kPiece), local);
  });
}

// Whether to write out past the caches: it is larger than what they hold, so that its lines would
// be read to be written, and gone when they are read. Every vector lies on its own size.
template <class T>
bool streams(const Shape& shape, const T* out) {
  constexpr int64_t kCached = 8 << 20;
  const int64_t inner = shape.channels_inner() ? shape.c : shape.hw();
  const bool whole =
      inner * sizeof(T) % kVectorBytes == 0 && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
  return whole && shape.numel() * static_cast<int64_t>(sizeof(T)) > kCached;
}

// Calls f(lanes, offset, channel) for every element. f is copied into each item, so that what it
// captures by value sits in registers: through a reference, each store could change it.
template <class T, class F>
void elementwise(const Shape& shape, int threads, const F& f) {
  const int64_t channels = shape.c;
  if (shape.channels_inner()) {
    const int64_t rows = shape.rows();
    const int64_t block = std::max<int64_t>(1, (1 << 13) / std::max<int64_t>(1, channels));
    parallel_for(ceil_div(rows, block), shape.numel(), threads, [&](int64_t i) {
      const F local = f;
      const int64_t end = std::min(rows, (i + 1) * block);
      for (int64_t row = i * block; row < end; ++row) {
        const int64_t offset = row * channels;
        for_lanes<T, true>(0, channels,
                           [&](auto lanes, int64_t c) { local(lanes, offset + c, c); });
      }
      end_of_stream();
    });
  } else {
    const int64_t pixels = shape.hw();
    parallel_for(shape.n * channels, shape.numel(), threads, [&](int64_t plane) {
      const F local = f;
      const int64_t offset = plane * pixels, c = plane % channels;
      for_lanes<T, false>(0, pixels, [&](auto lanes, int64_t i) { local(lanes, offset + i, c); });
      end_of_stream();
    });
  }
}

}  // namespace fusedres::FUSEDRES_CPU_LEVEL
