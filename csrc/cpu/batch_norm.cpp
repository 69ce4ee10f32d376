// BatchNorm's statistics, and the gradient of its input, on the CPU.
//
// Statistics: two passes over chunks of an item (see common/reduction.h), the second one from
// cache: first the chunk's mean, then its squared deviations from that mean; chunks, then blocks,
// are merged by Chan's formula in double, in fixed order. E[x^2] - E[x]^2 would cancel. Reads y
// once from memory: 2 bytes per bf16 element, 4 per float. Backward: element by element, split over
// pixels (NHWC) or planes (NCHW). Reads g and y, writes dy; the reductions it needs, sums, come
// from whichever kernel wrote g.
#include "fusedres/batch_norm.h"

#include "common/dispatch.h"
#include "common/reduction.h"

namespace fusedres {
namespace {

// (mean, M2) of one chunk. The deviations from the rounded mean also correct it.
template <class T>
void chunk_moments(const Shape& shape, const Tile& chunk, const T* y, double* mean, double* m2) {
  using Acc = acc_t<T>;
  Acc sums[1][kTile], pivot[kTile], deviations[2][kTile];
  clear(sums, chunk.channels);
  clear(deviations, chunk.channels);
  add_tile<1>(shape, chunk, [=](int64_t o, int64_t) { return Terms<Acc>{to_acc(y[o])}; }, sums);
  const double count = static_cast<double>(chunk.rows);
  for (int64_t i = 0; i < chunk.channels; ++i) pivot[i] = static_cast<Acc>(sums[0][i] / count);

  const Acc* const center = pivot;
  const int64_t first = chunk.channel;
  add_tile<2>(
      shape, chunk,
      [=](int64_t o, int64_t c) {
        const Acc d = to_acc(y[o]) - center[c - first];
        return Terms<Acc>{d, d * d};
      },
      deviations);
  for (int64_t i = 0; i < chunk.channels; ++i) {
    const double shift = deviations[0][i] / count;
    mean[i] = pivot[i] + shift;
    m2[i] = std::max(0.0, deviations[1][i] - shift * shift * count);
  }
}

template <class T>
void batch_norm_stats(const BatchNormStatsParams& p, int threads) {
  const Shape& shape = p.shape;
  const T* const y = static_cast<const T*>(p.y);
  double* const partials = static_cast<double*>(p.workspace);
  for_each_item(shape, threads, [&](int64_t block, const Tile& item) {
    double* const mean = partials + block * 2 * shape.c + item.channel;
    double* const m2 = mean + shape.c;
    std::fill_n(mean, item.channels, 0.0);
    std::fill_n(m2, item.channels, 0.0);
    double count = 0;
    for_each_chunk(shape, item, [&](const Tile& chunk) {
      double chunk_mean[kTile], chunk_m2[kTile];
      chunk_moments(shape, chunk, y, chunk_mean, chunk_m2);
      merge_moments(count, mean, m2, chunk.rows, chunk_mean, chunk_m2, chunk.channels);
      count += chunk.rows;
    });
  });

  using Acc = acc_t<T>;
  Acc* const out_mean = static_cast<Acc*>(p.mean);
  Acc* const out_var = static_cast<Acc*>(p.var);
  const int64_t blocks = partial_rows(shape);
  const double total = std::max<double>(1, shape.rows());
  parallel_for(ceil_div(shape.c, kTile), blocks * shape.c, threads, [&](int64_t tile) {
    const int64_t begin = tile * kTile, width = std::min(kTile, shape.c - begin);
    double mean[kTile] = {}, m2[kTile] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t before = block_begin(shape, block), after = block_begin(shape, block + 1);
      const double* const row = partials + block * 2 * shape.c + begin;
      merge_moments(before, mean, m2, after - before, row, row + shape.c, width);
    }
    for (int64_t i = 0; i < width; ++i) {
      out_mean[begin + i] = static_cast<Acc>(mean[i]);
      out_var[begin + i] = static_cast<Acc>(m2[i] / total);
    }
  });
}

template <class T>
void batch_norm_bwd(const BatchNormBwdParams& p, int threads) {
  using Acc = acc_t<T>;
  const T* const g = static_cast<const T*>(p.g);
  const T* const y = static_cast<const T*>(p.y);
  const Acc* const mean = static_cast<const Acc*>(p.mean);
  const Acc* const scale = static_cast<const Acc*>(p.scale);
  const Acc* const rstd = static_cast<const Acc*>(p.rstd);
  const Acc* const sums = static_cast<const Acc*>(p.sums);
  T* const dy = static_cast<T*>(p.dy);
  if (!p.training) {
    elementwise(p.shape, threads,
                [=](int64_t o, int64_t c) { dy[o] = from_acc<T>(scale[c] * to_acc(g[o])); });
    return;
  }
  const int64_t channels = p.shape.c;
  const double count = std::max<double>(1, p.shape.rows());
  Acc* const c0 = static_cast<Acc*>(p.workspace);
  Acc* const c1 = c0 + channels;
  for (int64_t c = 0; c < channels; ++c) {
    const double r = rstd[c];
    c0[c] = static_cast<Acc>(-scale[c] * (sums[c] / count));
    c1[c] = static_cast<Acc>(-scale[c] * r * r * (sums[channels + c] / count));
  }
  elementwise(p.shape, threads, [=](int64_t o, int64_t c) {
    dy[o] = from_acc<T>(scale[c] * to_acc(g[o]) + c0[c] + c1[c] * (to_acc(y[o]) - mean[c]));
  });
}

}  // namespace

void launch_batch_norm_stats(const BatchNormStatsParams& params, int threads) {
  dispatch(params.dtype,
           [&](auto tag) { batch_norm_stats<typename decltype(tag)::type>(params, threads); });
}

void launch_batch_norm_bwd(const BatchNormBwdParams& params, int threads) {
  dispatch(params.dtype,
           [&](auto tag) { batch_norm_bwd<typename decltype(tag)::type>(params, threads); });
}

}  // namespace fusedres
