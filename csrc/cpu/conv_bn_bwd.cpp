// The gradient of a 1x1 convolution's input on the CPU, in one walk over its pixels: a chunk of dy
// is made from g and y and written for the weight gradient, multiplied by the packed weight, and
// what comes out goes through the shortcut's join, ReLU's mask and the sums while a cache still
// holds it.
//
// Reads g, y [shortcut's gradient] [a] [x] [res_y] once, writes dy and g_in once.
#include <stdexcept>

#include "cpu/batch_norm.h"
#include "cpu/bn_act.h"
#include "cpu/gemm.h"
#include "fusedres/conv_bn.h"

namespace fusedres::FUSEDRES_CPU_LEVEL {
namespace {

// Stands in for the gate of an input that was no Deferred: the shortcut's gradient joins, no more.
struct Ungated {
  static constexpr int kSums = 0;
};

template <class T>
struct Dgrad {
  const ConvBnDgradParams& p;
  const Shape& in = p.input.shape;
  const Shape& out = p.output.shape;
  const PixelBlocks cut{in.rows()};
  uint32_t* const panels = static_cast<uint32_t*>(p.workspace);
  acc_t<T>* const coefficients =
      reinterpret_cast<acc_t<T>*>(panels + panel_bytes(out.c, in.c) / sizeof(uint32_t));
  double* const partials = reinterpret_cast<double*>(coefficients + 2 * out.c);

  // A sampled gradient joins the chunk of da.
  void join_samples(int64_t first, int64_t rows, T* da) const {
    const T* const sampled = static_cast<const T*>(p.sampled);
    const int64_t height = ceil_div(in.h, p.step_h), width = ceil_div(in.w, p.step_w);
    for (int64_t row = first; row < first + rows; ++row) {
      const int64_t w = row % in.w, h = row / in.w % in.h, n = row / in.hw();
      if (h % p.step_h != 0 || w % p.step_w != 0) continue;
      const int64_t pixel = (n * height + h / p.step_h) * width + w / p.step_w;
      for_lanes<T, true>(0, in.c, [&](auto lanes, int64_t c) {
        using L = decltype(lanes);
        T* const target = da + row * in.c + c;
        L::store(target, L::load(target) + L::load(sampled + pixel * in.c + c));
      });
    }
  }

  template <class Value, class Gradient>
  void block(int64_t index, const Value& value, const Gradient& gradient) const {
    constexpr int kSums = Gradient::kSums;
    T *const dy = static_cast<T*>(p.output.dy), *const da = static_cast<T*>(p.input.g);
    double* const totals = partials + index * kSums * in.c;
    std::fill_n(totals, kSums * in.c, 0.0);
    cut.for_each_chunk(index, 1, [&](int64_t first, int64_t rows) {
      const Value local = value;
      for (int64_t row = first; row < first + rows; ++row) {
        for_lanes<T, true>(0, out.c, [&](auto lanes, int64_t c) {
          using L = decltype(lanes);
          const int64_t o = row * out.c + c;
          L::store(dy + o, local(lanes, o, c));
        });
      }
      Fetches fetches;
      const int64_t here = first * in.c, bytes = rows * in.c * sizeof(T);
      for (const void* read : {p.input.grad_extra, p.input.a, p.input.y, p.input.res_y}) {
        if (read != nullptr) fetches.add(static_cast<const T*>(read) + here, bytes);
      }
      const int64_t next = (first + rows) * out.c;
      const int64_t after = std::min(rows, cut.rows - first - rows) * out.c * sizeof(T);
      for (const void* read : {p.output.g, p.output.y}) {
        fetches.add(static_cast<const T*>(read) + next, after);
      }
      multiply(static_cast<const T*>(dy) + first * out.c, rows, out.c, panels, in.c, da + here,
               fetches);
      if (p.sampled != nullptr) join_samples(first, rows, da);
      if constexpr (kSums == 0) {
        const T* const extra = static_cast<const T*>(p.input.grad_extra);
        if (extra == nullptr) return;
        for_lanes<T, true>(here, here + rows * in.c, [&](auto lanes, int64_t o) {
          using L = decltype(lanes);
          L::store(da + o, L::load(da + o) + L::load(extra + o));
        });
      } else {
        const Gradient own = gradient;
        alignas(64) acc_t<T> sums[kSums][kTileRow];
        for (int64_t c = 0; c < in.c; c += kTile) {
          const Tile tile{first, rows, c, std::min(kTile, in.c - c)};
          sum_tile<kSums, T>(in, tile, own, sums);
          for (int k = 0; k < kSums; ++k) {
            for (int64_t i = 0; i < tile.channels; ++i) totals[k * in.c + c + i] += sums[k][i];
          }
        }
      }
    });
  }

  template <class Gradient>
  void run(int threads, const Gradient& gradient) const {
    BatchNormBwdParams output = p.output;
    output.workspace = coefficients;
    settle_coefficients<T>(output);
    with_input_gradient<T>(output, [&](const auto& value) {
      parallel_for(cut.blocks, in.numel() + out.numel(), threads,
                   [&](int64_t index) { block(index, value, gradient); });
    });
  }
};

template <class T>
void conv_bn_dgrad(const ConvBnDgradParams& p, int threads) {
  if constexpr (!kRowsAreWords<T>) {
    throw std::invalid_argument("conv_bn_dgrad: bfloat16 needs instructions that multiply it");
  } else {
    const Dgrad<T> dgrad{p};
    const int64_t filters = dgrad.out.c, channels = dgrad.in.c;
    if (p.weight.dtype == DType::kFloat32) {
      pack_channels<T>(static_cast<const float*>(p.weight.data), filters, channels, threads,
                       dgrad.panels);
    } else {
      pack_channels<T>(static_cast<const T*>(p.weight.data), filters, channels, threads,
                       dgrad.panels);
    }
    if (p.input.sums == nullptr) return dgrad.run(threads, Ungated{});
    with_gated_gradient<T>(p.input, [&](const auto& gradient) {
      constexpr int kSums = std::decay_t<decltype(gradient)>::kSums;
      dgrad.run(threads, gradient);
      settle_sums<T, kSums>(p.input, dgrad.partials, dgrad.cut.blocks, threads);
    });
  }
}

}  // namespace

int64_t conv_bn_dgrad_workspace(const ConvBnDgradParams& p) {
  const int64_t sums = p.input.sums == nullptr ? 0 : p.input.res_sums == nullptr ? 2 : 3;
  const int64_t rows = PixelBlocks(p.input.shape.rows()).blocks;
  return panel_bytes(p.output.shape.c, p.input.shape.c) +
         static_cast<int64_t>(sizeof(double)) *
             (2 * p.output.shape.c + rows * sums * p.input.shape.c);
}

void launch_conv_bn_dgrad(const ConvBnDgradParams& p, int threads) {
  check_pointwise("conv_bn_dgrad", p.input.dtype, p.input.shape, p.output.shape, p.weight.dtype);
  if (p.input.dtype == DType::kFloat32) return conv_bn_dgrad<float>(p, threads);
  conv_bn_dgrad<BFloat16>(p, threads);
}

}  // namespace fusedres::FUSEDRES_CPU_LEVEL
