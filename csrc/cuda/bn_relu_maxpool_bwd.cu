// Backward of the stem's BatchNorm, ReLU and max pool in one pass on the GPU.
//
//   g = gradient of u = (y - mean)*scale + bias, rounded;  sums = (sum g, sum g*(y - mean)) over it
//
// Each window's gradient goes to its first maximum in row-major order, or to its last NaN. The
// activations are recomputed, and rounded before they are compared. Each pixel gathers from the
// windows that hold it, so that g is written once and nothing is added across threads but the sums:
// a block writes one partial row, finish_sums adds the rows up.
//
// 3x3 windows two apart, NHWC, all but double: a cell is the 2x2 pixels at the start of a window. A
// thread owns 4 bytes of channels and kWide neighbouring cells, and goes down the rows of cells of
// its chunk of the image. Of each row of windows it reads two rows of pixels, as it has kept what
// the first row of taps, shared with the windows above, is needed for. It has also kept who won the
// windows above: with these and the new winners it knows the g of the cells' pixels. It finds again
// the winners left of its cells, and once those above its chunk.
// Any other window or layout, and double: a thread takes one pixel at a time, and compares it with
// every tap of the windows around it.
// Both walk as cuda/walk.h says, with as many blocks as the device holds.
//
// Reads y and grad, writes g: 4.5 bytes per element of y of a half type, 9 per float. What threads
// share comes from cache. Saved for backward: y, mean, scale, bias.
#include "cuda/bn_relu_maxpool.h"
#include "cuda/finish_sums.h"

namespace fusedres {
namespace {

template <class T>
__device__ __forceinline__ acc_t<T> activation(T y, acc_t<T> mean, acc_t<T> scale, acc_t<T> bias) {
  const acc_t<T> u[1] = {normalized(to_acc(y), mean, scale, bias)};
  const acc_t<T> a = to_acc(rounded<T, 1>(u).values[0]);
  return relu_gate(a, a);
}

// Adds up the block's sums [2][kVector] and writes them to its row of part [parts, 2, C].
template <int kVector, class Acc>
__device__ void store_sums(const Strip<kVector>& strip, Acc (&sums)[2 * kVector], Acc* part) {
  sum_lanes(strip, sums);
  if (strip.lane > 0 || !strip.active) return;
  Acc* const row = part + strip.part * 2 * strip.walk.channels + strip.channel;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    row[i] = sums[i];
    row[strip.walk.channels + i] = sums[kVector + i];
  }
}

}  // namespace

// The walk's rows are pixels.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    bn_relu_maxpool_bwd_kernel(PoolInput<T> in, const T* grad, bool nhwc, T* g, acc_t<T>* part,
                               Walk walk) {
  using Acc = acc_t<T>;
  using Vec = Vector<T, 1>;
  const Strip<1> strip(walk);
  Acc mean[1], scale[1], bias[1];
  load_channels(strip, in.mean, mean);
  load_channels(strip, in.scale, scale);
  load_channels(strip, in.bias, bias);
  const auto value = [](const T* p) { return load(reinterpret_cast<const Vec*>(p)).values[0]; };
  Acc sums[2] = {};
  for (int64_t pixel = strip.begin; pixel < strip.end; pixel += walk.lanes) {
    const int64_t line = pixel / in.w, image = line / in.h;
    const int ih = static_cast<int>(line - image * in.h);
    const int iw = static_cast<int>(pixel - line * in.w);
    const T* const y = in.y + image * in.image_step + strip.channel * in.channel_step;
    const int64_t offset = strip.offset(pixel);
    const Acc centered = to_acc(value(in.y + offset)) - mean[0];
    const Acc a = activation(value(in.y + offset), mean[0], scale[0], bias[0]);
    // Whether the tap at (kh, kw) takes the window from this pixel.
    const auto takes = [&](int kh, int kw) {
      FUSEDRES_DEVICE_CHECK(0 <= kh && kh < in.h && 0 <= kw && kw < in.w);
      const T tap = value(y + kh * in.row_step + kw * in.pixel_step);
      const Acc other = activation(tap, mean[0], scale[0], bias[0]);
      if (kh > ih || (kh == ih && kw > iw)) return other > a || other != other;
      return (kh != ih || kw != iw) && a == a && !(other < a);
    };
    // Windows from the last to the first, so this pixel's place in them goes up.
    const int last_h = (ih + in.padding) / in.stride, last_w = (iw + in.padding) / in.stride;
    Acc total[1] = {};
    for (int oh = last_h < in.pooled_h ? last_h : in.pooled_h - 1;
         oh >= 0 && oh * in.stride - in.padding + in.size > ih && !(a <= Acc(0)); --oh) {
      const Side rows(oh * in.stride - in.padding, in.size, in.h);
      for (int ow = last_w < in.pooled_w ? last_w : in.pooled_w - 1;
           ow >= 0 && ow * in.stride - in.padding + in.size > iw; --ow) {
        const Side columns(ow * in.stride - in.padding, in.size, in.w);
        bool taken = false;
        for (int kh = rows.begin; kh < rows.end && !taken; ++kh) {
          for (int kw = columns.begin; kw < columns.end && !taken; ++kw) taken = takes(kh, kw);
        }
        if (taken) continue;
        const int64_t at =
            nhwc ? ((image * in.pooled_h + oh) * in.pooled_w + ow) * in.channels + strip.channel
                 : ((image * in.channels + strip.channel) * in.pooled_h + oh) * in.pooled_w + ow;
        total[0] += to_acc(value(grad + at));
      }
    }
    const Vec out = rounded<T, 1>(total);
    store(reinterpret_cast<Vec*>(g + offset), out);
    sums[0] += to_acc(out.values[0]);
    sums[1] += to_acc(out.values[0]) * centered;
  }
  store_sums(strip, sums, part);
}

// How an image is cut: into chunks of `rows` rows of cells, and these into strips.
struct StemCut {
  int rows, chunks, strips;
  int cell_rows;  // of the image
};

// The walk's rows are strips of chunks.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    bn_relu_maxpool_bwd_stem_kernel(PoolInput<T> in, const T* grad, T* g, acc_t<T>* part,
                                    StemCut cut, Walk walk) {
  using Acc = acc_t<T>;
  constexpr int kVector = 4 / sizeof(T);
  using S = Stem<T, kVector>;
  using Tap = typename S::Tap;
  using Pack = typename S::Pack;
  const Strip<kVector> strip(walk);
  S stem;
  load_channels(strip, in.mean, stem.mean);
  load_channels(strip, in.scale, stem.scale);
  load_channels(strip, in.bias, stem.bias);
  const int h = in.h, w = in.w;
  const unsigned pixel = static_cast<unsigned>(in.channels / kVector);  // in vectors
  Acc sums[2 * kVector] = {};
  for (int64_t item = strip.begin; item < strip.end; item += walk.lanes) {
    const int64_t rest = item / cut.strips, image = rest / cut.chunks;
    const int first = static_cast<int>(item - rest * cut.strips) * kWide;
    const int begin = static_cast<int>(rest - image * cut.chunks) * cut.rows;
    const int end = begin + cut.rows < cut.cell_rows ? begin + cut.rows : cut.cell_rows;
    const int left = 2 * (first - 1) - in.padding;  // column of tap 0
    const int64_t image_at = image * in.image_step + strip.channel;
    const int64_t grad_at = image * in.pooled_h * in.pooled_w * in.channels + strip.channel;
    const Pack* const y = reinterpret_cast<const Pack*>(in.y + image_at);
    const Pack* const grad_image = reinterpret_cast<const Pack*>(grad + grad_at);
    auto* const g_image = reinterpret_cast<Vector<T, kVector>*>(g + image_at);
    unsigned columns[kTaps];
    unsigned exists = 0;  // bit j: the column of tap j; bit kTaps + k: the column of window k
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      const int column = clamped(left + j, w);
      columns[j] = column * pixel;
      exists |= static_cast<unsigned>(column == left + j) << j;
    }
#pragma unroll
    for (int k = 0; k <= kWide; ++k) {
      const int ow = first - 1 + k;
      exists |= static_cast<unsigned>(ow >= 0 && ow < in.pooled_w) << (kTaps + k);
    }
    // A tap in the padding reads the nearest pixel. To the right and below, that pixel comes first
    // and wins; to the left, where only tap 2 is of a window that exists, and above, the tap has
    // that pixel's place.
    const int left_place = column_place(left + 2 < 0 ? 3 : 2);

    typename S::Taps shared;              // of the row that windows share with those above
    Pack upper[2 * kWide];                // the cells' pixels in it
    int places[kWide + 1][kVector] = {};  // of the windows above: who won, and what it gets
    Acc gains[kWide + 1][kVector] = {};
    const auto row_winners = [&](int ih, int place, typename S::Taps& largest,
                                 Pack(&pixels)[2 * kWide]) {
      stem.row_winners(y, clamped(ih, h) * w * pixel, columns, place, left_place, largest, pixels);
    };
    row_winners(2 * (begin - 1) - in.padding, 0, shared, upper);
    for (int oh = begin - 1; oh < end; ++oh) {
      const int top = 2 * oh - in.padding;
      const unsigned windows = oh >= 0 && oh < in.pooled_h ? exists : 0;
      const unsigned grad_row = oh * in.pooled_w * pixel;
      Pack grads[kWide + 1] = {};
#pragma unroll
      for (int k = 0; k <= kWide; ++k) {
        const unsigned at = grad_row + (first - 1 + k) * pixel;
        if (windows >> (kTaps + k) & 1) grads[k] = load(grad_image + at);
      }
      typename S::Taps best, middle;
      Pack lower[2 * kWide], next[2 * kWide];
      const int above = top < 0 ? kRow : 2 * kRow;
      row_winners(top + 1, kRow, middle, lower);
#pragma unroll
      for (int k = 0; k <= kWide; ++k) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) best[k][i] = larger(shared[k][i] + above, middle[k][i]);
      }
      row_winners(top + 2, 0, shared, next);
      Tap largest = kLowest<Tap>;
      int won[kWide + 1][kVector];
      Acc gain[kWide + 1][kVector];
#pragma unroll
      for (int k = 0; k <= kWide; ++k) {
        unpack(grads[k], gain[k]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          best[k][i] = larger(best[k][i], shared[k][i]);
          largest = larger(largest, best[k][i]);
          won[k][i] = static_cast<int>(best[k][i]) & kPlaceMask;
          gain[k][i] = zero_if(best[k][i] < kPositive<T>, gain[k][i]);
        }
      }
      if (largest >= kNan<T>) {
#pragma unroll 1
        for (int n = 0; n <= kWide; ++n) {
          int nans[kVector];
          stem.last_nans(y, h, w, pixel, top, left, 2 * n, nans);
#pragma unroll
          for (int k = 0; k <= kWide; ++k) {
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
              if (k == n && nans[i] >= 0) won[k][i] = nans[i];
            }
          }
        }
      }
      if (oh >= begin) {
        const unsigned stored[2] = {top >= 0 ? exists : 0u, top + 1 < h ? exists : 0u};
#pragma unroll
        for (int j = 2; j < kTaps - 1; ++j) {
          const int k = j / 2;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            Acc total[kVector];
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
              total[i] = 0;
              // Windows from the last to the first, so this pixel's place in them goes up.
              const int here = (2 - r) * kRow + column_place(j);
              if (won[k][i] == here) total[i] += gain[k][i];
              if (j % 2 == 0 && won[k - 1][i] == here) total[i] += gain[k - 1][i];
              if (r == 0 && places[k][i] == here - 2 * kRow) total[i] += gains[k][i];
              if (r == 0 && j % 2 == 0 && places[k - 1][i] == here - 2 * kRow) {
                total[i] += gains[k - 1][i];
              }
            }
            const Vector<T, kVector> value = rounded<T, kVector>(total);
            Acc pixels[kVector];
            unpack(r == 0 ? upper[j - 2] : lower[j - 2], pixels);
            // What does not exist has g = 0, and y of a pixel that does: its term is 0, or NaN
            // where that y is infinite. To leave it out costs two instructions for each element.
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
              const Acc rounded_total = to_acc(value.values[i]);
              sums[i] += rounded_total;
              sums[kVector + i] += rounded_total * (pixels[i] - stem.mean[i]);
            }
            // Outside the `if`, so that the store is not a branch of its own.
            auto* const at = g_image + ((top + r) * w * pixel + columns[j]);
            if (stored[r] >> j & 1) store(at, value);
          }
        }
      }
#pragma unroll
      for (int k = 0; k <= kWide; ++k) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          places[k][i] = won[k][i];
          gains[k][i] = gain[k][i];
        }
      }
#pragma unroll
      for (int j = 0; j < 2 * kWide; ++j) upper[j] = next[j];
    }
  }
  store_sums(strip, sums, part);
}

namespace {

template <class T>
constexpr size_t kSumBytes = 2 * kThreads * sizeof(acc_t<T>);

template <class T>
cudaError_t plan_pixels(const Shape& shape, int device, Walk* walk) {
  return fit_walk<1, bn_relu_maxpool_bwd_kernel<T>, kSumBytes<T>>(shape, device, walk);
}

// The cut with the least work for the busiest thread: with few chunks some lanes have a strip more
// than others, and each chunk activates 3 rows of pixels again.
template <class T>
cudaError_t plan_stem(const Shape& shape, const PoolWindow& window, int device, StemCut* cut,
                      Walk* walk) {
  constexpr int kVector = 4 / sizeof(T), kMostChunks = 32;
  int64_t resident = 0;
  const cudaError_t status =
      resident_blocks<bn_relu_maxpool_bwd_stem_kernel<T>, kVector * kSumBytes<T>>(device,
                                                                                  &resident);
  if (status != cudaSuccess) return status;
  const int64_t cell_rows = ceil_div(shape.h + window.padding, 2);
  const int64_t strips = ceil_div(ceil_div(shape.w + window.padding, 2), kWide);
  int64_t least = INT64_MAX;
  for (int64_t most = 1; most <= kMostChunks && most <= cell_rows; ++most) {
    const int64_t rows = ceil_div(cell_rows, most), chunks = ceil_div(cell_rows, rows);
    const Shape items = {shape.n, shape.c, chunks, strips, Layout::kNHWC};
    const Walk candidate = make_walk<kVector>(items, resident);
    const int64_t cost = ceil_div(candidate.chunk, candidate.lanes) * (2 * rows + 3);
    if (cost >= least) continue;
    least = cost;
    *cut = {static_cast<int>(rows), static_cast<int>(chunks), static_cast<int>(strips),
            static_cast<int>(cell_rows)};
    *walk = candidate;
  }
  return cudaSuccess;
}

template <class T>
constexpr bool kHasStem = sizeof(T) <= 4;

template <class T>
bool is_bwd_stem(const BnReluMaxpoolBwdParams& params) {
  if constexpr (kHasStem<T>) {
    return is_stem<T, 4 / sizeof(T)>(params.shape, params.window);
  }
  return false;
}

template <class T>
cudaError_t launch_typed(const BnReluMaxpoolBwdParams& params, const CudaTarget& target,
                         LaunchConfig* config) {
  using Acc = acc_t<T>;
  const PoolInput<T> in(params);
  const T* const grad = static_cast<const T*>(params.grad);
  T* const g = static_cast<T*>(params.g);
  Acc* const part = static_cast<Acc*>(params.workspace);
  Walk walk = {};
  if constexpr (kHasStem<T>) {
    if (is_bwd_stem<T>(params) && aligned_16(params.grad, params.y, params.g)) {
      StemCut cut = {};
      cudaError_t status = plan_stem<T>(params.shape, params.window, target.device, &cut, &walk);
      if (status != cudaSuccess) return status;
      *config = {"bn_relu_maxpool_bwd_stem", walk.blocks(), kThreads, 4 / sizeof(T) * kSumBytes<T>};
      status = launch(bn_relu_maxpool_bwd_stem_kernel<T>, *config, target.stream, in, grad, g, part,
                      cut, walk);
      if (status != cudaSuccess) return status;
      return launch_finish_sums<Acc>(part, walk.chunks, 2, in.channels,
                                     static_cast<Acc*>(params.sums), nullptr, target.stream,
                                     config);
    }
  }
  cudaError_t status = plan_pixels<T>(params.shape, target.device, &walk);
  if (status != cudaSuccess) return status;
  if (walk.blocks() > 0) {
    *config = {"bn_relu_maxpool_bwd", walk.blocks(), kThreads, kSumBytes<T>};
    status = launch(bn_relu_maxpool_bwd_kernel<T>, *config, target.stream, in, grad,
                    params.shape.layout == Layout::kNHWC, g, part, walk);
    if (status != cudaSuccess) return status;
  }
  return launch_finish_sums<Acc>(part, walk.chunks, 2, in.channels, static_cast<Acc*>(params.sums),
                                 nullptr, target.stream, config);
}

}  // namespace

// For either kernel, as the pointers may not be known yet that decide between them.
cudaError_t bn_relu_maxpool_bwd_workspace(const BnReluMaxpoolBwdParams& params, int device,
                                          int64_t* bytes) {
  if (!params.window.valid()) return cudaErrorInvalidValue;
  *bytes = 0;
  if (params.shape.c == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  return dispatch_cuda(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Walk pixels = {}, stem = {};
    cudaError_t status = plan_pixels<T>(params.shape, device, &pixels);
    if constexpr (kHasStem<T>) {
      StemCut cut = {};
      if (status == cudaSuccess && is_bwd_stem<T>(params)) {
        status = plan_stem<T>(params.shape, params.window, device, &cut, &stem);
      }
    }
    const int64_t parts = pixels.chunks > stem.chunks ? pixels.chunks : stem.chunks;
    *bytes = parts * 2 * params.shape.c * static_cast<int64_t>(sizeof(acc_t<T>));
    return status;
  });
}

cudaError_t launch_bn_relu_maxpool_bwd(const BnReluMaxpoolBwdParams& params,
                                       const CudaTarget& target, LaunchConfig* config) {
  if (!params.window.valid()) return cudaErrorInvalidValue;
  if (params.shape.h > kMostPixels || params.shape.w > kMostPixels) return cudaErrorInvalidValue;
  if (params.shape.c == 0) return cudaSuccess;
  const bool some = params.shape.numel() > 0;
  const bool pooled =
      some && params.window.pooled(params.shape.h) > 0 && params.window.pooled(params.shape.w) > 0;
  if (!params.sums || (pooled && !params.grad) ||
      (some &&
       any_null(params.y, params.mean, params.scale, params.bias, params.g, params.workspace))) {
    return cudaErrorInvalidValue;
  }
  const DeviceGuard guard(target.device);
  if (guard.status() != cudaSuccess) return guard.status();
  return dispatch_cuda(params.dtype, [&](auto tag) {
    return launch_typed<typename decltype(tag)::type>(params, target, config);
  });
}

}  // namespace fusedres
