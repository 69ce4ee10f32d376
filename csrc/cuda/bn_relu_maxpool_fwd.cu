// The stem's BatchNorm, ReLU and max pool in one pass on the GPU.
//
//   p = maxpool(round(relu((y - mean)*scale + bias)))
//
// ReLU and rounding keep order, so both are applied to the maximum alone.
//
// 3x3 windows two apart, NHWC: a thread owns 16 bytes of channels and kStrip neighbouring windows
// of a row. It goes along their 2*kStrip + 1 columns, reads each of its pixels once and takes the
// maximum down the column first, as neighbouring windows share it. A tap that falls into the
// padding reads the nearest pixel instead, which is in the window too: no load needs a mask.
// Any other window or layout: a thread takes one window at a time.
// Both walk over channels and windows as cuda/walk.h says, with as many blocks as the device holds.
//
// Reads y, writes p: 2.5 bytes per element of y of a half type, 5 per float. The pixels that
// strips and rows of windows share (each is read 27/16 times) come from cache. Saved for backward:
// y, mean, scale, bias.
#include "cuda/bn_relu_maxpool.h"

namespace fusedres {

// The walk's rows are windows, in the order of p.
template <class T>
__global__ void __launch_bounds__(kThreads)
    bn_relu_maxpool_fwd_kernel(PoolInput<T> in, T* p, Walk walk) {
  using Acc = acc_t<T>;
  const Strip<1> strip(walk);
  Acc mean[1], scale[1], bias[1];
  load_channels(strip, in.mean, mean);
  load_channels(strip, in.scale, scale);
  load_channels(strip, in.bias, bias);
  for (int64_t window = strip.begin; window < strip.end; window += walk.lanes) {
    const int64_t line = window / in.pooled_w, image = line / in.pooled_h;
    const int oh = static_cast<int>(line - image * in.pooled_h);
    const int ow = static_cast<int>(window - line * in.pooled_w);
    const Side rows(oh * in.stride - in.padding, in.size, in.h);
    const Side columns(ow * in.stride - in.padding, in.size, in.w);
    const T* const y = in.y + image * in.image_step + strip.channel * in.channel_step;
    bits_t<Acc> best = kLowest<bits_t<Acc>>;
    for (int ih = rows.begin; ih < rows.end; ++ih) {
#pragma unroll 2  // more spill on sm_120
      for (int iw = columns.begin; iw < columns.end; ++iw) {
        FUSEDRES_DEVICE_CHECK(0 <= ih && ih < in.h && 0 <= iw && iw < in.w);
        const T* const at = y + ih * in.row_step + iw * in.pixel_step;
        const Acc tap = to_acc(load(reinterpret_cast<const Vector<T, 1>*>(at)).values[0]);
        best = larger(best, ordered(normalized(tap, mean[0], scale[0], bias[0])));
      }
    }
    const Acc a[1] = {relu_of<Acc>(best)};
    store(reinterpret_cast<Vector<T, 1>*>(p + strip.offset(window)), rounded<T, 1>(a));
  }
}

constexpr int kStrip = 4;

// The walk's rows are strips: `strips` to a row of windows.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    bn_relu_maxpool_fwd_stem_kernel(PoolInput<T> in, T* p, int strips, Walk walk) {
  using Acc = acc_t<T>;
  using Bits = bits_t<Acc>;
  constexpr int kVector = 16 / sizeof(T);
  using Pack = Packed<T, kVector>;
  const Strip<kVector> strip(walk);
  Acc mean[kVector], scale[kVector], bias[kVector];
  load_channels(strip, in.mean, mean);
  load_channels(strip, in.scale, scale);
  load_channels(strip, in.bias, bias);
  const int pixel = static_cast<int>(in.channels / kVector);  // in vectors
  for (int64_t item = strip.begin; item < strip.end; item += walk.lanes) {
    const int64_t line = item / strips, image = line / in.pooled_h;
    const int oh = static_cast<int>(line - image * in.pooled_h);
    const int ow = static_cast<int>(item - line * strips) * kStrip;
    const int top = 2 * oh - in.padding, left = 2 * ow - in.padding;
    const Pack* const y =
        reinterpret_cast<const Pack*>(in.y + image * in.image_step + strip.channel);
    unsigned rows[3];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      rows[k] = clamped(top + k, in.h) * in.w * pixel;
    }
    auto* const out = reinterpret_cast<Vector<T, kVector>*>(
        p + (line * in.pooled_w + ow) * in.channels + strip.channel);
    Bits best[kVector];  // of the window that the next column belongs to
#pragma unroll
    for (int j = 0; j < 2 * kStrip + 1; ++j) {
      const unsigned column = clamped(left + j, in.w) * pixel;
      Acc taps[3][kVector];
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        unpack(load(y + (rows[k] + column)), taps[k]);
      }
      Bits tallest[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        Bits u[3];
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          u[k] = ordered(normalized(taps[k][i], mean[i], scale[i], bias[i]));
        }
        tallest[i] = larger(larger(u[0], u[1]), u[2]);
      }
      Acc a[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const Bits both = j == 0 ? tallest[i] : larger(best[i], tallest[i]);
        a[i] = relu_of<Acc>(both);
        best[i] = j % 2 == 0 ? tallest[i] : both;  // an even column begins a window, and ends one
      }
      if (j > 0 && j % 2 == 0 && ow + j / 2 <= in.pooled_w) {
        store(out + (j / 2 - 1) * pixel, rounded<T, kVector>(a));
      }
    }
  }
}

namespace {

template <class T>
cudaError_t launch_typed(const BnReluMaxpoolFwdParams& params, const CudaTarget& target,
                         LaunchConfig* config) {
  constexpr int kVector = 16 / sizeof(T);
  const PoolInput<T> in(params);
  T* const p = static_cast<T*>(params.p);
  Walk walk;
  if (is_stem<T, kVector>(params.shape, params.window) && aligned_16(params.y, params.p)) {
    constexpr auto kKernel = bn_relu_maxpool_fwd_stem_kernel<T>;
    const int64_t strips = ceil_div(in.pooled_w, kStrip);
    const Shape items = {params.shape.n, params.shape.c, in.pooled_h, strips, Layout::kNHWC};
    const cudaError_t status = fit_walk<kVector, kKernel, 0>(items, target.device, &walk);
    if (status != cudaSuccess) return status;
    *config = {"bn_relu_maxpool_fwd_stem", walk.blocks(), kThreads, 0};
    return launch(kKernel, *config, target.stream, in, p, static_cast<int>(strips), walk);
  }
  constexpr auto kKernel = bn_relu_maxpool_fwd_kernel<T>;
  Shape pooled = params.shape;
  pooled.h = in.pooled_h;
  pooled.w = in.pooled_w;
  const cudaError_t status = fit_walk<1, kKernel, 0>(pooled, target.device, &walk);
  if (status != cudaSuccess) return status;
  *config = {"bn_relu_maxpool_fwd", walk.blocks(), kThreads, 0};
  return launch(kKernel, *config, target.stream, in, p, walk);
}

}  // namespace

cudaError_t launch_bn_relu_maxpool_fwd(const BnReluMaxpoolFwdParams& params,
                                       const CudaTarget& target, LaunchConfig* config) {
  if (!params.window.valid()) return cudaErrorInvalidValue;
  const int64_t windows = params.shape.n * params.shape.c * params.window.pooled(params.shape.h) *
                          params.window.pooled(params.shape.w);
  if (windows == 0) return cudaSuccess;
  if (params.shape.h > kMostPixels || params.shape.w > kMostPixels) return cudaErrorInvalidValue;
  if (any_null(params.y, params.mean, params.scale, params.bias, params.p)) {
    return cudaErrorInvalidValue;
  }
  const DeviceGuard guard(target.device);
  if (guard.status() != cudaSuccess) return guard.status();
  return dispatch_cuda(params.dtype, [&](auto tag) {
    return launch_typed<typename decltype(tag)::type>(params, target, config);
  });
}

}  // namespace fusedres
