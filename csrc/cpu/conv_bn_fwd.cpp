// A 1x1 convolution forward on the CPU, in one walk over its pixels: a chunk of them is normalised
// into a scratch (and written, where it is emitted), multiplied by the packed weight, and summed up
// for the statistics while a cache still holds it. Memory is fetched ahead during products, which
// have none of their own to wait for.
//
// Reads x [and residual] once, writes y [and a] once; the weight is read once, and from cache for
// every chunk.
#include <stdexcept>

#include "cpu/batch_norm.h"
#include "cpu/bn_act.h"
#include "cpu/gemm.h"
#include "fusedres/conv_bn.h"

namespace fusedres::FUSEDRES_CPU_LEVEL {
namespace {

// What stands in for the activation of an input that is one.
struct AsItIs {};

template <class T>
struct Forward {
  const ConvBnFwdParams& p;
  const Shape& in = p.input.shape;
  const Shape& out = p.output.shape;
  const PixelBlocks cut{in.rows()};
  uint32_t* const panels = static_cast<uint32_t*>(p.workspace);
  double* const partials =
      reinterpret_cast<double*>(panels + panel_bytes(out.c, in.c) / sizeof(uint32_t));

  template <class Value>
  void block(int64_t index, const Value& value) const {
    constexpr bool kDeferred = !std::is_same_v<Value, AsItIs>;
    alignas(64) T scratch[PixelBlocks::kScratch];
    const T* const x = static_cast<const T*>(p.input.y);
    T* const emitted = static_cast<T*>(p.input.a);
    T* const y = static_cast<T*>(p.y);
    const bool stream = emitted != nullptr && streams(in, emitted);
    double* const count = partials + index * moments_columns(out.c);
    double *const mean = count + 1, *const m2 = mean + out.c;
    if (p.output.training) std::fill_n(count, moments_columns(out.c), 0.0);
    cut.for_each_chunk(index, in.c, [&](int64_t first, int64_t rows) {
      const T* a = x + first * in.c;
      if constexpr (kDeferred) {
        const Value local = value;
        const int64_t begin = first * in.c;
        for (int64_t row = 0; row < rows; ++row) {
          for_lanes<T, true>(0, in.c, [&](auto lanes, int64_t c) {
            using L = decltype(lanes);
            const int64_t o = row * in.c + c;
            const auto u = local(lanes, begin + o, c);
            L::store(scratch + o, u);
            if (stream) {
              L::stream(emitted + begin + o, u);
            } else if (emitted != nullptr) {
              L::store(emitted + begin + o, u);
            }
          });
        }
        a = scratch;
      }
      Fetches fetches;
      const int64_t next = (first + rows) * in.c;
      const int64_t bytes = std::min(rows, cut.rows - first - rows) * in.c * sizeof(T);
      fetches.add(x + next, bytes);
      if (p.input.residual != nullptr) {
        fetches.add(static_cast<const T*>(p.input.residual) + next, bytes);
      }
      multiply(a, rows, in.c, panels, out.c, y + first * out.c, fetches);
      if (!p.output.training) return;
      for (int64_t c = 0; c < out.c; c += kTile) {
        const Tile tile{first, rows, c, std::min(kTile, out.c - c)};
        add_moments(out, tile, static_cast<const T*>(y), *count, mean + c, m2 + c);
      }
      *count += rows;
    });
    end_of_stream();
  }

  template <class Value>
  void run(int threads, const Value& value) const {
    parallel_for(cut.blocks, in.numel() + out.numel(), threads,
                 [&](int64_t index) { block(index, value); });
  }
};

template <class T>
void conv_bn_fwd(const ConvBnFwdParams& p, int threads) {
  if constexpr (!kRowsAreWords<T>) {
    throw std::invalid_argument("conv_bn_fwd: bfloat16 needs instructions that multiply it");
  } else {
    const Forward<T> forward{p};
    const int64_t filters = forward.out.c, channels = forward.in.c;
    if (p.weight.dtype == DType::kFloat32) {
      pack_filters<T>(static_cast<const float*>(p.weight.data), filters, channels, threads,
                      forward.panels);
    } else {
      pack_filters<T>(static_cast<const T*>(p.weight.data), filters, channels, threads,
                      forward.panels);
    }
    if (p.input.mean == nullptr) {
      forward.run(threads, AsItIs{});
    } else {
      with_activation<T>(p.input, [&](const auto& value) { forward.run(threads, value); });
    }
    if (p.output.training) {
      settle_statistics<T>(p.output, forward.partials, forward.cut.blocks, threads);
    }
  }
}

}  // namespace

int64_t conv_bn_fwd_workspace(const ConvBnFwdParams& p) {
  const int64_t row = moments_columns(p.output.shape.c) * static_cast<int64_t>(sizeof(double));
  return panel_bytes(p.output.shape.c, p.input.shape.c) +
         (p.output.training ? PixelBlocks(p.input.shape.rows()).blocks * row : 0);
}

void launch_conv_bn_fwd(const ConvBnFwdParams& p, int threads) {
  check_pointwise("conv_bn_fwd", p.input.dtype, p.input.shape, p.output.shape, p.weight.dtype);
  if (p.input.dtype == DType::kFloat32) return conv_bn_fwd<float>(p, threads);
  conv_bn_fwd<BFloat16>(p, threads);
}

}  // namespace fusedres::FUSEDRES_CPU_LEVEL
