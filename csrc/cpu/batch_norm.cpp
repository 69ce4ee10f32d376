// BatchNorm's statistics with all that follows from them per channel, and the gradient of its
// input, on the CPU.
//
// Statistics: one pass. A chunk (see cpu/reduction.h) sums the deviations from its first value and
// their squares; as that value is one of the chunk's own, what cancels in
// M2 = sum d^2 - (sum d)^2 / n is at most n + 1 times M2, and n is small. Chunks, then blocks, are
// merged by Chan's formula in double, in fixed order. E[x^2] - E[x]^2 would cancel without bound.
// Reads y once: 2 bytes per bf16 element, 4 per float.
// Backward: element by element, split over pixels (NHWC) or planes (NCHW). Reads g and y, writes
// dy; the reductions it needs, sums, come from whichever kernel wrote g.
#include "cpu/batch_norm.h"

#include "common/dispatch.h"

namespace fusedres::FUSEDRES_CPU_LEVEL {
namespace {

// Stage 1: count, mean and M2 of each block into partials [partial_rows, 1 + 2*C].
template <class T>
void moments_stage1(const Shape& shape, int threads, const T* y, double* partials) {
  for_each_item(shape, threads, [&](int64_t block, const Tile& item) {
    double* const row = partials + block * moments_columns(shape.c);
    double* const mean = row + 1 + item.channel;
    double* const m2 = mean + shape.c;
    std::fill_n(mean, item.channels, 0.0);
    std::fill_n(m2, item.channels, 0.0);
    for_each_chunk(shape, item, [&](const Tile& chunk) {
      add_moments(shape, chunk, y, chunk.row - item.row, mean, m2);
    });
    if (item.channel == 0) row[0] = item.rows;
  });
}

template <class T>
void batch_norm_fwd(const BatchNormFwdParams& p, int threads) {
  double* const partials = static_cast<double*>(p.workspace);
  if (p.training) moments_stage1<T>(p.shape, threads, static_cast<const T*>(p.y), partials);
  settle_statistics<T>(p, partials, partial_rows(p.shape), threads);
}

template <class T>
void batch_norm_bwd(const BatchNormBwdParams& p, int threads) {
  T* const dy = static_cast<T*>(p.dy);
  settle_coefficients<T>(p);
  with_input_gradient<T>(p, [&](const auto& value) {
    dispatch(streams(p.shape, dy), [&](auto stream) {
      elementwise<T>(p.shape, threads, [=](auto lanes, int64_t o, int64_t c) {
        using L = decltype(lanes);
        stream ? L::stream(dy + o, value(lanes, o, c)) : L::store(dy + o, value(lanes, o, c));
      });
    });
  });
}

}  // namespace

void launch_batch_norm_fwd(const BatchNormFwdParams& params, int threads) {
  dispatch(params.dtype,
           [&](auto tag) { batch_norm_fwd<typename decltype(tag)::type>(params, threads); });
}

void launch_batch_norm_bwd(const BatchNormBwdParams& params, int threads) {
  dispatch(params.dtype,
           [&](auto tag) { batch_norm_bwd<typename decltype(tag)::type>(params, threads); });
}

}  // namespace fusedres::FUSEDRES_CPU_LEVEL
