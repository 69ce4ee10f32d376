// The weight gradient of a convolution on the CPU, with the activation in front of it computed on
// the way: dw = dy^T a as a sum of outer products over pixels, tap by tap. In NHWC a pixel's
// channels lie side by side in both operands, so neither is transposed.
//
// Work is split over slices of pixels and blocks of filters. An item takes kDepth pixels
// at a time: dy goes into panels of some filters; then for every tap and every 32 channels the
// activation goes into a panel that fits the L1 cache, and meets all panels of dy. A microkernel
// holds 8 x 32 sums in registers over the depth. Slices are added in order at the end. In bf16,
// where the machine multiplies pairs of it, two pixels share a word of a panel; else panels are
// float.
//
// Reads dy once, and x once for each block of filters and each tap, from cache but for the first.
#include <algorithm>
#include <stdexcept>

#include "cpu/panels.h"
#include "cpu/traversal.h"
#include "fusedres/conv_bn.h"

namespace fusedres::FUSEDRES_CPU_LEVEL {
namespace {

constexpr int kRows = ConvBnWgradParams::kOutBlock;    // filters of a microkernel
constexpr int kColumns = ConvBnWgradParams::kInBlock;  // channels of a microkernel
constexpr int64_t kSteps = 128, kChannels = 512;
constexpr int64_t kMostFilters = 256;  // of an item

using L = WordLanes;
using Values = WordValues;
constexpr int kVectors = kColumns / L::kCount;
constexpr int64_t kLeft = std::max(kRows, L::kCount);  // filters side by side in a panel

// tile[8][32] += left panel [steps][8 of kLeft] x right panel [steps][32]; = if fresh.
template <class T>
void microkernel(const uint32_t* left, const uint32_t* right, int64_t steps, float* tile,
                 bool fresh, Ahead ahead) {
  // Few registers hold few sums: a narrow vector goes over its columns in turns.
  constexpr int kAtOnce = kVectorBytes == 64 ? kVectors : 1;
  for (int first = 0; first < kVectors; first += kAtOnce) {
    Values sums[kRows][kAtOnce];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kAtOnce; ++v) {
        const float* const start = tile + r * kColumns + (first + v) * L::kCount;
        sums[r][v] = fresh ? Values{} : L::load_acc(start);
      }
    }
    for (int64_t step = 0; step < steps; ++step) {
      __builtin_prefetch(ahead.line + step * ahead.pitch);
      Words columns[kAtOnce];
#pragma GCC unroll 2
      for (int v = 0; v < kAtOnce; ++v) {
        memcpy(&columns[v], right + step * kColumns + (first + v) * L::kCount, sizeof columns[v]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Words row = Words{} + left[step * kLeft + r];
#pragma GCC unroll 2
        for (int v = 0; v < kAtOnce; ++v) {
          sums[r][v] = multiply_add<T>(row, columns[v], sums[r][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kAtOnce; ++v) {
        L::store_acc(tile + r * kColumns + (first + v) * L::kCount, sums[r][v]);
      }
    }
  }
}

struct Range {
  int64_t begin, end;
};

enum class Prologue { kNone, kAffine, kRelu };

template <class T>
struct Wgrad {
  const ConvBnWgradParams& p;
  const T* dy;
  const T* x;
  const float *mean, *scale, *bias;

  static constexpr int64_t kDepth = kSteps * kPair<T>;  // pixels

  explicit Wgrad(const ConvBnWgradParams& params)
      : p(params),
        dy(static_cast<const T*>(p.dy)),
        x(static_cast<const T*>(p.x)),
        mean(static_cast<const float*>(p.mean)),
        scale(static_cast<const float*>(p.scale)),
        bias(static_cast<const float*>(p.bias)) {}

  using Lane = Vector<T, true>;
  static_assert(Lane::kCount == L::kCount);

  // Panels [filters / kLeft][steps][kLeft] of dy's pixels from `row` on, filters from `filter` on.
  void pack_left(int64_t row, int64_t rows, int64_t filter, int64_t filters,
                 uint32_t* panels) const {
    const int64_t steps = ceil_div(rows, kPair<T>), width = p.output.c;
    for (int64_t step = 0; step < steps; ++step) {
      const T* const first = dy + (row + step * kPair<T>)*width + filter;
      const T* const second = kPair<T> == 2 && step * 2 + 1 < rows ? first + width : nullptr;
      int64_t k = 0;
      constexpr int64_t kTwo = 2 * L::kCount;
      for (; k + kTwo <= filters; k += kTwo) {
        Words words[2];
        two_words<T>(first + k, second == nullptr ? nullptr : second + k, words);
        for (int64_t i = 0; i < 2; ++i) {
          const int64_t at = k + i * L::kCount;
          memcpy(panels + at / kLeft * kLeft * steps + step * kLeft + at % kLeft, &words[i],
                 sizeof words[i]);
        }
      }
      for (; k < filters; ++k) {
        uint32_t one = bits_as<uint32_t>(Single::load(first + k));
        if (kPair<T> == 2) {
          one >>= 16;
          if (second != nullptr) one |= bits_as<uint32_t>(Single::load(second + k));
        }
        panels[k / kLeft * kLeft * steps + step * kLeft + k % kLeft] = one;
      }
    }
  }
  using Single = Scalar<T, true>;

  // The panel [steps][32] of the activation for channels from `channel` on. A pixel outside of the
  // input has offset -1.
  template <Prologue kPrologue>
  void pack_right(const int64_t* offsets, int64_t rows, int64_t channel, uint32_t* panel) const {
    const T* const own = x + channel;
    Values center[kVectors], factor[kVectors], shift[kVectors];
    for (int v = 0; v < kVectors && kPrologue != Prologue::kNone; ++v) {
      center[v] = L::load_acc(mean + channel + v * L::kCount);
      factor[v] = L::load_acc(scale + channel + v * L::kCount);
      shift[v] = L::load_acc(bias + channel + v * L::kCount);
    }
    const auto activation = [&](int64_t offset, int v) {
      const Values u =
          L::fma(Lane::load(own + offset + v * L::kCount) - center[v], factor[v], shift[v]);
      return kPrologue == Prologue::kRelu ? L::gate(u, u) : u;
    };
    int64_t row = 0;
    for (; row + kPair<T> <= rows; row += kPair<T>, panel += kColumns) {
      const int64_t first = offsets[row], second = offsets[row + kPair<T> - 1];
      const bool inside = (first | second) >= 0;  // neither is negative
      if constexpr (kPrologue == Prologue::kNone) {
        for (int v = 0; v < kVectors; v += 2) {
          const int64_t at = v * L::kCount;
          Words words[2];
          two_words<T>(first < 0 ? nullptr : own + first + at,
                       second < 0 ? nullptr : own + second + at, words);
          memcpy(panel + at, words, sizeof words);
        }
      } else {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const Words words = inside ? word<T>(activation(first, v), activation(second, v))
                                     : word<T>(first < 0 ? Values{} : activation(first, v),
                                               second < 0 ? Values{} : activation(second, v));
          memcpy(panel + v * L::kCount, &words, sizeof words);
        }
      }
    }
    if (row == rows) return;
    const int64_t last = offsets[row];  // without a partner
    for (int v = 0; v < kVectors; ++v) {
      Words words{};
      if (last >= 0 && kPrologue == Prologue::kNone) {
        words = word<T>(own + last + v * L::kCount, nullptr);
      } else if (last >= 0) {
        words = word<T>(activation(last, v), Values{});
      }
      memcpy(panel + v * L::kCount, &words, sizeof words);
    }
  }

  // Where a window's corner lies for some output pixels, one after the other.
  struct Corners {
    int64_t image[kDepth], ih[kDepth], iw[kDepth];
  };
  void find_corners(int64_t row, int64_t rows, Corners& corners) const {
    const Shape& out = p.output;
    int64_t ow = row % out.w, oh = row / out.w % out.h, n = row / out.hw();
    for (int64_t i = 0; i < rows; ++i) {
      corners.image[i] = n * p.input.hw();
      corners.ih[i] = oh * p.window.stride_h - p.window.top;
      corners.iw[i] = ow * p.window.stride_w - p.window.left;
      if (++ow < out.w) continue;
      ow = 0;
      if (++oh < out.h) continue;
      oh = 0;
      ++n;
    }
  }

  // Where the input pixels of a tap begin, -1 outside of the input.
  void find_inputs(const Corners& corners, int64_t rows, int64_t tap, int64_t* offsets) const {
    const int64_t down = tap / p.window.width * p.window.dilation_h;
    const int64_t right = tap % p.window.width * p.window.dilation_w;
    const int64_t height = p.input.h, width = p.input.w, channels = p.input.c;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t ih = corners.ih[i] + down, iw = corners.iw[i] + right;
      const bool inside = (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width);
      offsets[i] = inside ? (corners.image[i] + ih * width + iw) * channels : -1;
    }
  }

  // The sums of a microkernel, of [taps, K / 8, C / 32, 8, 32].
  float* tile(float* out, int64_t tap, int64_t filter, int64_t channel) const {
    const int64_t across = p.input.c / kColumns, down = p.output.c / kRows;
    return out + ((tap * down + filter / kRows) * across + channel / kColumns) * kRows * kColumns;
  }

  // The pixels that come after those from `row` on, to be fetched meanwhile: evenly over `turns`
  // microkernels, a line of each pixel (of every other one where two share a word) at a turn.
  class NextPixels {
   public:
    NextPixels(const Wgrad& w, const Corners& corners, int64_t row, Range filters, Range channels,
               int64_t turns)
        : turns_(turns) {
      const Shape &in = w.p.input, &out = w.p.output;
      if (row + kDepth >= out.rows()) return;  // where there is no memory, a fetch costs a search
      const int64_t step = w.p.window.stride_w * in.c;
      const int64_t pixel = corners.image[0] + corners.ih[0] * in.w + corners.iw[0];
      streams_[0] = stream(w.x + pixel * in.c + kDepth * step, step, channels);
      streams_[1] = stream(w.dy + (row + kDepth) * out.c, out.c, filters);
    }
    Ahead next() {
      const int64_t lines = streams_[0].lines + streams_[1].lines;
      if (fetched_ * turns_ >= ++turn_ * lines) return {reinterpret_cast<const char*>(this), 0};
      const bool second = fetched_ >= streams_[0].lines;
      const Stream& s = streams_[second];
      const int64_t line = fetched_++ - (second ? streams_[0].lines : 0);
      return {s.first + line % kPair<T> * s.pitch + line / kPair<T> * kLine, s.pitch * kPair<T>};
    }

   private:
    static constexpr int64_t kLine = 64;
    struct Stream {
      const char* first;
      int64_t pitch, lines;  // bytes from pixel to pixel; turns
    };
    static Stream stream(const T* pixel, int64_t pitch, Range range) {
      constexpr int64_t kSize = sizeof(T);
      return {reinterpret_cast<const char*>(pixel + range.begin), pitch * kSize,
              ceil_div((range.end - range.begin) * kSize, kLine) * kPair<T>};
    }
    Stream streams_[2]{};
    int64_t turns_, turn_ = 0, fetched_ = 0;
  };

  // dw over pixels [begin, end), of some filters and channels.
  template <Prologue kPrologue>
  void item(int64_t begin, int64_t end, Range filters, Range channels, float* out) const {
    alignas(64) uint32_t left[kSteps * kMostFilters], right[kSteps * kColumns];
    int64_t offsets[kDepth];
    Corners corners;
    const int64_t taps = p.window.taps();
    for (int64_t row = begin; row < end; row += kDepth) {
      const int64_t rows = std::min(kDepth, end - row), steps = ceil_div(rows, kPair<T>);
      pack_left(row, rows, filters.begin, filters.end - filters.begin, left);
      find_corners(row, rows, corners);
      const int64_t turns = taps * ((channels.end - channels.begin) / kColumns) *
                            ((filters.end - filters.begin) / kRows);
      NextPixels next(*this, corners, row, filters, channels, turns);
      for (int64_t tap = 0; tap < taps; ++tap) {
        find_inputs(corners, rows, tap, offsets);
        for (int64_t c = channels.begin; c < channels.end; c += kColumns) {
          pack_right<kPrologue>(offsets, rows, c, right);
          for (int64_t k = 0; k < filters.end - filters.begin; k += kRows) {
            const uint32_t* const panel = left + k / kLeft * kLeft * steps + k % kLeft;
            microkernel<T>(panel, right, steps, tile(out, tap, filters.begin + k, c), row == begin,
                           next.next());
          }
        }
      }
    }
  }
};

// Filters of an item: for many of them the activation is packed less often.
int64_t item_filters(const ConvBnWgradParams& p) {
  return p.output.c < 2 * kMostFilters ? kMostFilters / 2 : kMostFilters;
}
int64_t blocks_down(const ConvBnWgradParams& p) { return ceil_div(p.output.c, item_filters(p)); }
int64_t blocks_across(const ConvBnWgradParams& p) { return ceil_div(p.input.c, kChannels); }

// Pixels are cut into so many slices, each with a dw of its own, by sizes alone: for 16 items.
int64_t slices(const ConvBnWgradParams& p) {
  constexpr int64_t kLeastRows = 512, kItems = 16, kMostBytes = 8 << 20;
  const int64_t bytes = p.window.taps() * p.input.c * p.output.c * 4;
  const int64_t most = std::max<int64_t>(kMostBytes / std::max<int64_t>(bytes, 1), 1);
  const int64_t wanted = ceil_div(kItems, std::max<int64_t>(blocks_down(p) * blocks_across(p), 1));
  return std::clamp<int64_t>(p.output.rows() / kLeastRows, 1, std::min(most, wanted));
}

template <class T>
void conv_bn_wgrad(const ConvBnWgradParams& p, int threads) {
  const Wgrad<T> wgrad(p);
  const int64_t parts = slices(p), rows = p.output.rows();
  const int64_t filters = p.output.c, channels = p.input.c, taps = p.window.taps();
  const int64_t down = blocks_down(p), across = blocks_across(p), width = item_filters(p);
  const int64_t size = taps * filters * channels;
  float* const partials = static_cast<float*>(p.workspace);
  parallel_for(parts * down * across, rows * filters, threads, [&](int64_t i) {
    const int64_t part = i / (down * across), k = i / across % down * width;
    const int64_t c = i % across * kChannels;
    const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
    const Range own{k, std::min(filters, k + width)}, in{c, std::min(channels, c + kChannels)};
    float* const out = partials + part * size;
    if (p.mean == nullptr) {
      wgrad.template item<Prologue::kNone>(begin, end, own, in, out);
    } else if (p.relu) {
      wgrad.template item<Prologue::kRelu>(begin, end, own, in, out);
    } else {
      wgrad.template item<Prologue::kAffine>(begin, end, own, in, out);
    }
  });
  parallel_for(filters, parts * size, threads, [&](int64_t k) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      float* const target = p.dw + k * p.stride_k + tap / p.window.width * p.stride_r +
                            tap % p.window.width * p.stride_s;
      // read next by an optimizer, when no cache holds it any more
      const bool aligned = p.stride_c == 1 && reinterpret_cast<uintptr_t>(target) % 64 == 0;
      for (int64_t c = 0; c < channels; c += kColumns) {
        const float* const source = wgrad.tile(partials, tap, k, c) + k % kRows * kColumns;
        float sums[kColumns];
        std::copy_n(source, kColumns, sums);
        for (int64_t part = 1; part < parts; ++part) {
          const float* const other = source + part * size;
#pragma omp simd
          for (int i = 0; i < kColumns; ++i) sums[i] += other[i];
        }
        if (aligned) {
          for (int i = 0; i < kColumns; i += L::kCount) {
            L::stream(target + c + i, L::load_acc(sums + i));
          }
        } else {
          for (int64_t i = 0; i < kColumns; ++i) target[(c + i) * p.stride_c] = sums[i];
        }
      }
    }
    end_of_stream();
  });
}

}  // namespace

int64_t conv_bn_wgrad_workspace(const ConvBnWgradParams& p) {
  return slices(p) * p.window.taps() * p.input.c * p.output.c * static_cast<int64_t>(sizeof(float));
}

void launch_conv_bn_wgrad(const ConvBnWgradParams& params, int threads) {
  const bool blocks = params.input.c % ConvBnWgradParams::kInBlock == 0 &&
                      params.output.c % ConvBnWgradParams::kOutBlock == 0;
  const bool nhwc = params.input.channels_inner() && params.output.channels_inner();
  if (!blocks || !nhwc) {
    throw std::invalid_argument("conv_bn_wgrad: needs NHWC, channels in blocks of 32 and 8");
  }
  switch (params.dtype) {
    case DType::kFloat32:
      return conv_bn_wgrad<float>(params, threads);
    case DType::kBFloat16:
      return conv_bn_wgrad<BFloat16>(params, threads);
    default:
      throw std::invalid_argument("conv_bn_wgrad: serves float32 and bfloat16");
  }
}

}  // namespace fusedres::FUSEDRES_CPU_LEVEL
