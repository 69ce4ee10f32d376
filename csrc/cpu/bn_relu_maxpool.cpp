// The stem's BatchNorm, ReLU and max pool in one pass each way, on the CPU.
//
// Forward: split over rows of the output. Reads y, writes p (a quarter of y's size at stride 2);
// the activation is recomputed for each window it lies in and never stored. ReLU and rounding keep
// order, so the window's maximum is taken first and both are applied to it alone.
// Backward: 1. finds each window's winner again and stores its place as one byte; here the rounded
// activations are compared, as ties are decided after rounding. 2. Every input pixel gathers from
// the windows it won, so no two threads add to one place; it masks, rounds, writes g once, and sums
// while the chunk is in cache. Reads y twice and grad once, writes g. Saved for backward: y.
//
// Inner loops run over channels in NHWC and along a row of the image in NCHW ("lanes" below).
#include "fusedres/bn_relu_maxpool.h"

#include <limits>

#include "common/activation.h"
#include "common/dispatch.h"
#include "common/reduction.h"

namespace fusedres {
namespace {

struct Range {
  int64_t begin, end;
};

// Outputs o in [0, pooled) whose window holds an input i in [begin, end) at place k:
// i = o*stride - padding + k.
Range outputs_at(const PoolWindow& window, int64_t k, int64_t begin, int64_t end, int64_t pooled) {
  const int64_t shift = window.padding - k, stride = window.stride;
  return {begin + shift <= 0 ? 0 : ceil_div(begin + shift, stride),
          std::min(pooled, end + shift <= 0 ? 0 : ceil_div(end + shift, stride))};
}

template <class T>
struct Pool {
  using Acc = acc_t<T>;
  // Of one width with Acc, so that a vector of the one masks a vector of the other.
  using Place = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
  Shape shape;
  PoolWindow window;
  int64_t pooled_h, pooled_w;
  const T* y;
  const Acc *mean, *scale, *bias;

  template <class Params>
  explicit Pool(const Params& p)
      : shape(p.shape),
        window(p.window),
        pooled_h(p.window.pooled(p.shape.h)),
        pooled_w(p.window.pooled(p.shape.w)),
        y(static_cast<const T*>(p.y)),
        mean(static_cast<const Acc*>(p.mean)),
        scale(static_cast<const Acc*>(p.scale)),
        bias(static_cast<const Acc*>(p.bias)) {}

  Acc normed(int64_t offset, int64_t c) const {
    return (to_acc(y[offset]) - mean[c]) * scale[c] + bias[c];
  }
  Acc activation(int64_t offset, int64_t c) const {
    const Acc u = normed(offset, c);
    return to_acc(relu_gate(u, from_acc<T>(u)));
  }

  // Calls f(place, lane, offset, channel) for every input of `lanes` neighbouring windows, place by
  // place in row-major order. NHWC: the windows at (n, oh, ow) of channels lane0, lane0 + 1, ...
  // NCHW: the windows at (n, c, oh) of columns lane0, lane0 + 1, ...
  template <class F>
  void for_each_input(int64_t n, int64_t oh, int64_t ow, int64_t c, int64_t lane0, int64_t lanes,
                      const F& f) const {
    const F local = f;
    for (int64_t kh = 0; kh < window.size; ++kh) {
      const int64_t ih = oh * window.stride - window.padding + kh;
      if (ih < 0 || ih >= shape.h) continue;
      for (int64_t kw = 0; kw < window.size; ++kw) {
        const Place place = static_cast<Place>(kh * window.size + kw);
        if (shape.layout == Layout::kNHWC) {
          const int64_t iw = ow * window.stride - window.padding + kw;
          if (iw < 0 || iw >= shape.w) continue;
          const int64_t offset = ((n * shape.h + ih) * shape.w + iw) * shape.c + lane0;
#pragma omp simd
          for (int64_t i = 0; i < lanes; ++i) local(place, i, offset + i, lane0 + i);
        } else {
          const int64_t row = ((n * shape.c + c) * shape.h + ih) * shape.w;
          const int64_t stride = window.stride, shift = kw - window.padding;
          const Range inside = outputs_at(window, kw, 0, shape.w, pooled_w);
          const int64_t end = std::min(inside.end, lane0 + lanes);
#pragma omp simd
          for (int64_t o = std::max(inside.begin, lane0); o < end; ++o) {
            local(place, o - lane0, row + o * stride + shift, c);
          }
        }
      }
    }
  }

  // Calls body(n, oh, ow, c, lane0, lanes, out) for groups of windows that cover the output; `out`
  // is the offset of the first one there.
  template <class Body>
  void for_each_group(int threads, const Body& body) const {
    const bool nhwc = shape.layout == Layout::kNHWC;
    const int64_t inner = nhwc ? shape.c : pooled_w;
    const int64_t rows = shape.n * pooled_h * (nhwc ? pooled_w : shape.c);
    const int64_t work = rows * inner * window.size * window.size;
    parallel_for(rows, work, threads, [&](int64_t row) {
      const int64_t oh = nhwc ? row / pooled_w % pooled_h : row % pooled_h;
      const int64_t ow = nhwc ? row % pooled_w : 0;
      const int64_t c = nhwc ? 0 : row / pooled_h % shape.c;
      const int64_t n = nhwc ? row / (pooled_w * pooled_h) : row / (pooled_h * shape.c);
      for (int64_t lane0 = 0; lane0 < inner; lane0 += kTile) {
        body(n, oh, ow, c, lane0, std::min(kTile, inner - lane0), row * inner + lane0);
      }
    });
  }

  void forward(T* p, int threads) const {
    for_each_group(threads, [&](int64_t n, int64_t oh, int64_t ow, int64_t c, int64_t lane0,
                                int64_t lanes, int64_t out) {
      Acc best[kTile];
      std::fill_n(best, lanes, -std::numeric_limits<Acc>::infinity());
      Acc* const best_ptr = best;
      const Pool self = *this;
      for_each_input(n, oh, ow, c, lane0, lanes, [=](Place, int64_t i, int64_t o, int64_t channel) {
        const Acc u = self.normed(o, channel);
        const Acc before = best_ptr[i];
        best_ptr[i] = u > before || u != u ? u : before;
      });
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) p[out + i] = relu_gate(best[i], from_acc<T>(best[i]));
    });
  }

  void find_winners(uint8_t* winners, int threads) const {
    for_each_group(threads, [&](int64_t n, int64_t oh, int64_t ow, int64_t c, int64_t lane0,
                                int64_t lanes, int64_t out) {
      Acc best[kTile];
      std::fill_n(best, lanes, -std::numeric_limits<Acc>::infinity());
      Acc* const best_ptr = best;
      Place places[kTile];
      Place* const winner = places;
      const Pool self = *this;
      for_each_input(n, oh, ow, c, lane0, lanes,
                     [=](Place place, int64_t i, int64_t o, int64_t channel) {
                       const Acc a = self.activation(o, channel), before = best_ptr[i];
                       const Place winner_before = winner[i];
                       const bool wins = a > before || a != a;
                       best_ptr[i] = wins ? a : before;
                       winner[i] = wins ? place : winner_before;
                     });
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) winners[out + i] = static_cast<uint8_t>(places[i]);
    });
  }

  // g of the pixels of one image row: columns [iw, iw + pixels) of row (n, ih), for the tile's
  // channels.
  void gather_nhwc(const T* grad, const uint8_t* winners, T* g, int64_t n, int64_t ih, int64_t iw,
                   const Tile& tile) const {
    Acc total[kTile];
    std::fill_n(total, tile.channels, Acc(0));
    for (int64_t kh = 0; kh < window.size; ++kh) {
      const Range rows = outputs_at(window, kh, ih, ih + 1, pooled_h);
      for (int64_t kw = 0; kw < window.size && rows.begin < rows.end; ++kw) {
        const Range columns = outputs_at(window, kw, iw, iw + 1, pooled_w);
        if (columns.begin >= columns.end) continue;
        const Place place = static_cast<Place>(kh * window.size + kw);
        const int64_t out =
            ((n * pooled_h + rows.begin) * pooled_w + columns.begin) * shape.c + tile.channel;
#pragma omp simd
        for (int64_t i = 0; i < tile.channels; ++i) {
          total[i] += to_acc(zero_if(static_cast<Place>(winners[out + i]) != place, grad[out + i]));
        }
      }
    }
    const int64_t offset = ((n * shape.h + ih) * shape.w + iw) * shape.c + tile.channel;
    const Pool self = *this;
#pragma omp simd
    for (int64_t i = 0; i < tile.channels; ++i) {
      g[offset + i] =
          relu_gate(self.activation(offset + i, tile.channel + i), from_acc<T>(total[i]));
    }
  }

  void gather_nchw(const T* grad, const uint8_t* winners, T* g, int64_t n, int64_t c, int64_t ih,
                   int64_t iw, int64_t pixels) const {
    Acc total[kTile];
    std::fill_n(total, pixels, Acc(0));
    for (int64_t kh = 0; kh < window.size; ++kh) {
      const Range rows = outputs_at(window, kh, ih, ih + 1, pooled_h);
      for (int64_t kw = 0; kw < window.size && rows.begin < rows.end; ++kw) {
        const Range columns = outputs_at(window, kw, iw, iw + pixels, pooled_w);
        const Place place = static_cast<Place>(kh * window.size + kw);
        const int64_t out = ((n * shape.c + c) * pooled_h + rows.begin) * pooled_w;
        const int64_t stride = window.stride, shift = kw - window.padding - iw;
#pragma omp simd
        for (int64_t o = columns.begin; o < columns.end; ++o) {
          total[o * stride + shift] +=
              to_acc(zero_if(static_cast<Place>(winners[out + o]) != place, grad[out + o]));
        }
      }
    }
    const int64_t offset = ((n * shape.c + c) * shape.h + ih) * shape.w + iw;
    const Pool self = *this;
#pragma omp simd
    for (int64_t i = 0; i < pixels; ++i) {
      g[offset + i] = relu_gate(self.activation(offset + i, c), from_acc<T>(total[i]));
    }
  }

  void gather(const T* grad, const uint8_t* winners, T* g, const Tile& tile) const {
    const int64_t end = tile.row + tile.rows;
    for (int64_t row = tile.row, step; row < end; row += step) {
      const int64_t iw = row % shape.w, ih = row / shape.w % shape.h, n = row / shape.hw();
      if (shape.layout == Layout::kNHWC) {
        step = 1;
        gather_nhwc(grad, winners, g, n, ih, iw, tile);
      } else {
        step = std::min({end - row, shape.w - iw, kTile});
        for (int64_t c = tile.channel; c < tile.channel + tile.channels; ++c) {
          gather_nchw(grad, winners, g, n, c, ih, iw, step);
        }
      }
    }
  }
};

template <class T>
void bn_relu_maxpool_bwd(const BnReluMaxpoolBwdParams& p, int threads) {
  using Acc = acc_t<T>;
  const Pool<T> pool(p);
  const T* const grad = static_cast<const T*>(p.grad);
  T* const g = static_cast<T*>(p.g);
  double* const workspace = static_cast<double*>(p.workspace);
  pool.find_winners(p.winners, threads);

  const T* const y = pool.y;
  const Acc* const mean = pool.mean;
  sum_stage1<2, Acc>(
      p.shape, threads, workspace, [&](const Tile& tile) { pool.gather(grad, p.winners, g, tile); },
      [=](int64_t o, int64_t c) {
        const Acc value = to_acc(g[o]);
        return Terms<Acc>{value, value * (to_acc(y[o]) - mean[c])};
      });
  Acc* const sums = static_cast<Acc*>(p.sums);
  sum_stage2(workspace, partial_rows(p.shape), 2 * p.shape.c, threads,
             [=](int64_t column, double value) { sums[column] = static_cast<Acc>(value); });
}

void check(const PoolWindow& window) {
  if (!window.valid()) {
    throw std::invalid_argument(
        "bn_relu_maxpool: kernel_size must be 1 to 16, stride at least 1, padding at most half of "
        "kernel_size");
  }
}

}  // namespace

void launch_bn_relu_maxpool_fwd(const BnReluMaxpoolFwdParams& params, int threads) {
  check(params.window);
  dispatch(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Pool<T>(params).forward(static_cast<T*>(params.p), threads);
  });
}

void launch_bn_relu_maxpool_bwd(const BnReluMaxpoolBwdParams& params, int threads) {
  check(params.window);
  dispatch(params.dtype,
           [&](auto tag) { bn_relu_maxpool_bwd<typename decltype(tag)::type>(params, threads); });
}

}  // namespace fusedres
