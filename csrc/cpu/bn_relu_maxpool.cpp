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
#include <stdexcept>

#include "common/dispatch.h"
#include "cpu/reduction.h"

namespace fusedres::FUSEDRES_CPU_LEVEL {
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

// Outputs o in [0, pooled) whose window holds input i.
Range outputs_over(const PoolWindow& window, int64_t i, int64_t pooled) {
  const uint32_t last = static_cast<uint32_t>(i + window.padding), stride = window.stride;
  const uint32_t size = window.size, begin = last < size ? 0 : (last - size) / stride + 1;
  return {begin, std::min<int64_t>(pooled, last / stride + 1)};
}

// Places k of the window of output o that lie on inputs in [0, extent).
Range places_inside(const PoolWindow& window, int64_t o, int64_t extent) {
  const int64_t begin = o * window.stride - window.padding;
  return {std::max<int64_t>(0, -begin), std::min<int64_t>(window.size, extent - begin)};
}

template <class T>
struct Pool {
  using Acc = acc_t<T>;
  using Place = signed_t<Acc>;  // of one width with Acc: vectors of the one mask the other
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

  template <class L>
  typename L::Values normed(L, int64_t offset, int64_t c) const {
    const auto centered = L::load(y + offset) - L::channel(mean, c);
    return L::fma(centered, L::channel(scale, c), L::channel(bias, c));
  }
  // The activation as it would be stored: ties are decided after rounding.
  template <class L>
  typename L::Values activation(L lanes, int64_t offset, int64_t c) const {
    const auto u = normed(lanes, offset, c);
    return L::gate(u, L::rounded(u));
  }

  // The largest normalised value of a window (kWinners: the largest activation, and its place), one
  // candidate after the other: later ones win where they are larger, or NaN.
  template <bool kWinners, class L>
  struct Best {
    typename L::Values value = L::all(-std::numeric_limits<Acc>::infinity());
    typename L::Ints place{};

    void meet(typename L::Values candidate, int64_t at) {
      if constexpr (L::kCount == 1) {
        const bool wins = candidate > value || candidate != candidate;
        value = wins ? candidate : value;
        if constexpr (kWinners) place = wins ? static_cast<Place>(at) : place;
      } else {
        const auto larger = candidate > value;
        if constexpr (kWinners) {
          place = larger ? L::all_ints(at) : place;
          place = candidate != candidate ? L::all_ints(at) : place;
        }
        value = larger ? candidate : value;
        value = candidate != candidate ? candidate : value;
      }
    }
  };

  // Calls emit(lanes, best, out) for every window of a row of outputs in NHWC: row (n, oh).
  template <bool kWinners, class Emit>
  void windows_nhwc(int64_t n, int64_t oh, const Emit& emit) const {
    const Pool self = *this;
    const Range rows = places_inside(window, oh, shape.h);
    for (int64_t ow = 0; ow < pooled_w; ++ow) {
      const Range columns = places_inside(window, ow, shape.w);
      const int64_t out = ((n * pooled_h + oh) * pooled_w + ow) * shape.c;
      const int64_t ih = oh * window.stride - window.padding;
      const int64_t iw = ow * window.stride - window.padding;
      const int64_t corner = ((n * shape.h + ih) * shape.w + iw) * shape.c;
      for_lanes<T, true>(0, shape.c, [&](auto lanes, int64_t c) {
        using L = decltype(lanes);
        Best<kWinners, L> best;
        for (int64_t kh = rows.begin; kh < rows.end; ++kh) {
          for (int64_t kw = columns.begin; kw < columns.end; ++kw) {
            const int64_t o = corner + (kh * self.shape.w + kw) * self.shape.c + c;
            best.meet(kWinners ? self.activation(lanes, o, c) : self.normed(lanes, o, c),
                      kh * self.window.size + kw);
          }
        }
        emit(lanes, best, out + c);
      });
    }
  }

  // The same in NCHW for row (n, c, oh): columns side by side, one place after the other.
  template <bool kWinners, class Emit>
  void windows_nchw(int64_t n, int64_t c, int64_t oh, const Emit& emit) const {
    using L = Scalar<T, false>;
    const Pool self = *this;
    const Range rows = places_inside(window, oh, shape.h);
    const int64_t first = ((n * shape.c + c) * pooled_h + oh) * pooled_w;
    for (int64_t ow = 0; ow < pooled_w; ow += kTile) {
      const int64_t width = std::min(kTile, pooled_w - ow);
      Best<kWinners, L> best[kTile];
      for (int64_t kh = rows.begin; kh < rows.end; ++kh) {
        const int64_t ih = oh * window.stride - window.padding + kh;
        const int64_t row = ((n * shape.c + c) * shape.h + ih) * shape.w;
        for (int64_t kw = 0; kw < window.size; ++kw) {
          const Range inside = outputs_at(window, kw, 0, shape.w, pooled_w);
          const int64_t end = std::min(inside.end, ow + width), shift = kw - window.padding;
          const int64_t place = kh * window.size + kw, stride = window.stride;
#pragma omp simd
          for (int64_t o = std::max(inside.begin, ow); o < end; ++o) {
            const int64_t at = row + o * stride + shift;
            best[o - ow].meet(kWinners ? self.activation(L{}, at, c) : self.normed(L{}, at, c),
                              place);
          }
        }
      }
      for (int64_t i = 0; i < width; ++i) emit(L{}, best[i], first + ow + i);
    }
  }

  template <bool kWinners, class Emit>
  void for_each_window(int threads, const Emit& emit) const {
    const bool nhwc = shape.layout == Layout::kNHWC;
    const int64_t rows = shape.n * pooled_h * (nhwc ? 1 : shape.c);
    const int64_t work = shape.n * shape.c * pooled_h * pooled_w * window.size * window.size;
    parallel_for(rows, work, threads, [&](int64_t row) {
      const Emit local = emit;
      const int64_t oh = row % pooled_h, plane = row / pooled_h;
      if (nhwc) {
        windows_nhwc<kWinners>(plane, oh, local);
      } else {
        windows_nchw<kWinners>(plane / shape.c, plane % shape.c, oh, local);
      }
    });
  }

  void forward(T* p, int threads) const {
    for_each_window<false>(threads, [=](auto lanes, const auto& best, int64_t out) {
      using L = decltype(lanes);
      L::store(p + out, L::gate(best.value, best.value));
    });
  }

  void find_winners(uint8_t* winners, int threads) const {
    for_each_window<true>(threads, [=](auto lanes, const auto& best, int64_t out) {
      decltype(lanes)::store_bytes(winners + out, best.place);
    });
  }

  // g of one pixel (n, ih, iw), for the tile's channels; `rows` are the outputs over ih.
  void gather_nhwc(const T* grad, const uint8_t* winners, T* g, int64_t n, int64_t ih, int64_t iw,
                   Range rows, const Tile& tile) const {
    struct Window {
      int64_t out;
      Place place;
    } windows[PoolWindow::kMaxSize * PoolWindow::kMaxSize];
    int count = 0;
    const Range columns = outputs_over(window, iw, pooled_w);
    for (int64_t oh = rows.begin; oh < rows.end; ++oh) {
      const int64_t kh = ih + window.padding - oh * window.stride;
      for (int64_t ow = columns.begin; ow < columns.end; ++ow) {
        const int64_t kw = iw + window.padding - ow * window.stride;
        windows[count++] = {((n * pooled_h + oh) * pooled_w + ow) * shape.c,
                            static_cast<Place>(kh * window.size + kw)};
      }
    }
    const int64_t offset = ((n * shape.h + ih) * shape.w + iw) * shape.c;
    const Pool self = *this;
    for_lanes<T, true>(tile.channel, tile.channel + tile.channels, [&](auto lanes, int64_t c) {
      using L = decltype(lanes);
      typename L::Values total{};
      for (int i = 0; i < count; ++i) {
        const int64_t o = windows[i].out + c;
        const auto won = L::equals(L::load_bytes(winners + o), L::all_ints(windows[i].place));
        total += L::keep_if(won, L::load(grad + o));
      }
      const auto u = L::rounded(self.normed(lanes, offset + c, c));
      L::store(g + offset + c, L::gate(u, total));
    });
  }

  void gather_nchw(const T* grad, const uint8_t* winners, T* g, int64_t n, int64_t c, int64_t ih,
                   int64_t iw, int64_t pixels) const {
    using L = Scalar<T, false>;
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
          const auto won = L::equals(static_cast<Place>(winners[out + o]), place);
          total[o * stride + shift] += L::keep_if(won, to_acc(grad[out + o]));
        }
      }
    }
    const int64_t offset = ((n * shape.c + c) * shape.h + ih) * shape.w + iw;
    const Pool self = *this;
    for_lanes<T, false>(0, pixels, [&](auto lanes, int64_t i) {
      using W = decltype(lanes);
      const auto u = W::rounded(self.normed(lanes, offset + i, c));
      W::store(g + offset + i, W::gate(u, W::load_acc(total + i)));
    });
  }

  void gather(const T* grad, const uint8_t* winners, T* g, const Tile& tile) const {
    const int64_t end = tile.row + tile.rows;
    int64_t iw = tile.row % shape.w, ih = tile.row / shape.w % shape.h, n = tile.row / shape.hw();
    for (int64_t row = tile.row, step; row < end; row += step) {
      step = std::min({end - row, shape.w - iw, kTile});
      if (shape.layout == Layout::kNHWC) {
        const Range rows = outputs_over(window, ih, pooled_h);
        for (int64_t i = 0; i < step; ++i) {
          gather_nhwc(grad, winners, g, n, ih, iw + i, rows, tile);
        }
      } else {
        for (int64_t c = tile.channel; c < tile.channel + tile.channels; ++c) {
          gather_nchw(grad, winners, g, n, c, ih, iw, step);
        }
      }
      iw += step;
      if (iw < shape.w) continue;
      iw = 0;
      n += ++ih == shape.h;
      ih = ih == shape.h ? 0 : ih;
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
  sum_stage1<2, T>(
      p.shape, threads, workspace, [&](const Tile& tile) { pool.gather(grad, p.winners, g, tile); },
      [=](auto lanes, int64_t o, int64_t c) {
        using L = decltype(lanes);
        const auto value = L::load(g + o);
        return Factors<typename L::Values>{value, L::load(y + o) - L::channel(mean, c), {}};
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

}  // namespace fusedres::FUSEDRES_CPU_LEVEL
