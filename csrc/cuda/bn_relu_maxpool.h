// What the stem's forward and backward on the GPU share: the tensors' geometry, and an order of
// activations in integers; then how backward takes rows of the image apart.
//
// The bits of floating-point numbers, read as signed integers, order the positive ones, with NaN
// above infinity. They order the others backwards, and below; but what ReLU makes zero may come in
// any order: forward it is the same zero, backward a window whose maximum is zero has no gradient.
// So a maximum that keeps NaN is a maximum of integers, and backward the place of a tap can travel
// in the bits below its value.
#pragma once

#include <limits>
#include <type_traits>

#include "cuda/walk.h"
#include "fusedres/bn_relu_maxpool.h"

namespace fusedres {

// The sides of an image fit 32 bits, with room to add to them.
constexpr int64_t kMostPixels = int64_t{1} << 30;

// The normalised input and how it is laid out; steps are in elements.
template <class T>
struct PoolInput {
  using Acc = acc_t<T>;
  const T* y;
  const Acc *mean, *scale, *bias;
  int64_t channels, image_step, channel_step, row_step, pixel_step;
  int h, w, pooled_h, pooled_w, size, stride, padding;

  template <class Params>
  explicit PoolInput(const Params& p)
      : y(static_cast<const T*>(p.y)),
        mean(static_cast<const Acc*>(p.mean)),
        scale(static_cast<const Acc*>(p.scale)),
        bias(static_cast<const Acc*>(p.bias)),
        channels(p.shape.c),
        image_step(p.shape.hw() * p.shape.c),
        channel_step(p.shape.channels_inner() ? 1 : p.shape.hw()),
        row_step(p.shape.channels_inner() ? p.shape.w * p.shape.c : p.shape.w),
        pixel_step(p.shape.channels_inner() ? p.shape.c : 1),
        h(static_cast<int>(p.shape.h)),
        w(static_cast<int>(p.shape.w)),
        pooled_h(static_cast<int>(p.window.pooled(p.shape.h))),
        pooled_w(static_cast<int>(p.window.pooled(p.shape.w))),
        size(p.window.size),
        stride(p.window.stride),
        padding(p.window.padding) {}
};

// Coordinates in [0, extent): the part of a window's side that is not padding.
struct Side {
  int begin, end;

  __device__ __forceinline__ Side(int start, int size, int extent)
      : begin(start < 0 ? 0 : start), end(start + size < extent ? start + size : extent) {}
};

template <class Acc>
__device__ __forceinline__ Acc normalized(Acc y, Acc mean, Acc scale, Acc bias) {
  return (y - mean) * scale + bias;
}

template <class Acc>
constexpr Acc kPositiveNan = std::numeric_limits<Acc>::quiet_NaN();

// Without the sign of NaN. Arithmetic in float on the device makes but one NaN, the positive one.
template <class Acc>
__device__ __forceinline__ Acc positive_nan(Acc u) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(Acc) == 4) return u;
#endif
  return u != u ? kPositiveNan<Acc> : u;
}

template <class Acc>
using bits_t = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;

// The bits as above.
template <class Acc>
__device__ __forceinline__ bits_t<Acc> ordered(Acc u) {
  u = positive_nan(u);
  bits_t<Acc> bits;
  memcpy(&bits, &u, sizeof bits);
  return bits;
}

template <class Key>
__device__ __forceinline__ Key larger(Key a, Key b) {
  return a > b ? a : b;
}

// Below everything that is ordered.
template <class Key>
constexpr Key kLowest = std::numeric_limits<Key>::min();

// An activation to store, from the largest of ordered() values.
template <class Acc>
__device__ __forceinline__ Acc relu_of(bits_t<Acc> bits) {
  Acc u;
  memcpy(&u, &bits, sizeof u);
  return relu_gate(u, u);
}

__device__ __forceinline__ int clamped(int index, int extent) {
  return index < 0 ? 0 : index < extent ? index : extent - 1;
}

// 3x3 windows two apart are the stem's: kernels of their own take them where channels are
// innermost and come kVector at a time, as long as 32 bits count the vectors of an image.
template <class T, int kVector>
bool is_stem(const Shape& shape, const PoolWindow& window) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return window.size == 3 && window.stride == 2 && shape.channels_inner() &&
         shape.c % kVector == 0 && shape.hw() * shape.c < kMost * kVector && shape.n > 0 &&
         window.pooled(shape.h) > 0 && window.pooled(shape.w) > 0;
}

// --- The stem's backward ---

// A tap of a 3x3 window as an integer: the bits of its activation over those of its place, which
// counts down in row-major order. So the largest is the window's winner, and of equals the first;
// only among NaNs it should be the last.
template <class T>
using tap_t = std::conditional_t<sizeof(T) == 2, int32_t, int64_t>;

// The smallest tap of each kind, whatever its place.
template <class T>
constexpr tap_t<T> kPositive = tap_t<T>(1) << (4 * sizeof(tap_t<T>));
template <class T>
constexpr tap_t<T> kNan = tap_t<T>(sizeof(T) == 4                ? 0x7f800001
                                   : std::is_same_v<T, BFloat16> ? 0x7f81
                                                                 : 0x7c01) *
                          kPositive<T>;

constexpr int kWide = 3;              // cells of a thread
constexpr int kTaps = 2 * kWide + 3;  // of a row, with those of the window to the left
// A place is kRow times the window's rows below, plus the thread's columns to the right.
constexpr int kRow = 16, kPlaceMask = 4 * kRow - 1;
static_assert(kTaps <= kRow);
__device__ __forceinline__ int column_place(int tap) { return kTaps - 1 - tap; }

// What a thread does with rows of the image. A cell is the 2x2 pixels at the start of a window.
template <class T, int kVector>
struct Stem {
  using Acc = acc_t<T>;
  using Tap = tap_t<T>;
  using Pack = Packed<T, kVector>;
  using Taps = Tap[kWide + 1][kVector];  // one per window

  Acc mean[kVector], scale[kVector], bias[kVector];

  __device__ __forceinline__ void make_taps(const Pack& y, int place, Tap (&taps)[kVector]) const {
    Acc u[kVector];
    unpack(y, u);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      u[i] = positive_nan(normalized(u[i], mean[i], scale[i], bias[i]));
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if constexpr (sizeof(T) == 2) {
        // A rounding of two makes the tap: the bits of 1 + place*epsilon end with the place.
        constexpr float kEpsilon = std::is_same_v<T, BFloat16> ? 0x1p-7f : 0x1p-10f;
        const Acc both[2] = {1 + static_cast<float>(place) * kEpsilon, u[i]};
        const Vector<T, 2> tap = rounded<T, 2>(both);
        memcpy(&taps[i], &tap, sizeof tap);
      } else {
        taps[i] = static_cast<Tap>(static_cast<uint64_t>(ordered(u[i])) << 32 | place);
      }
    }
  }

  // Each window's largest tap of a row of the image, and the row's pixels in the cells.
  __device__ __forceinline__ void row_winners(const Pack* image, unsigned row,
                                              const unsigned (&columns)[kTaps], int place,
                                              int left_place, Taps& largest,
                                              Pack (&pixels)[2 * kWide]) const {
    Pack y[kTaps];
#pragma unroll
    for (int j = 0; j < kTaps; ++j) y[j] = load(image + (row + columns[j]));
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      if (j >= 2 && j < kTaps - 1) pixels[j - 2] = y[j];
      Tap taps[kVector];
      make_taps(y[j], place + (j == 2 ? left_place : column_place(j)), taps);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (j % 2 == 1) {
          largest[j / 2][i] = larger(largest[j / 2][i], taps[i]);
        } else {
          if (j > 0) largest[j / 2 - 1][i] = larger(largest[j / 2 - 1][i], taps[i]);
          if (j < kTaps - 1) largest[j / 2][i] = taps[i];
        }
      }
    }
  }

  // The place of a window's last NaN, -1 where it has none. The window's rows start at `top`, its
  // columns at tap `tap`, tap 0 being at `left`.
  __device__ __forceinline__ void last_nans(const Pack* image, int h, int w, unsigned pixel,
                                            int top, int left, int tap,
                                            int (&places)[kVector]) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) places[i] = -1;
#pragma unroll 1
    for (int k = 0; k < 9; ++k) {
      const int ih = top + k / 3, j = tap + k % 3, iw = left + j;
      if (ih < 0 || ih >= h || iw < 0 || iw >= w) continue;
      Acc u[kVector];
      unpack(load(image + (ih * w + iw) * pixel), u);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        u[i] = normalized(u[i], mean[i], scale[i], bias[i]);
        if (u[i] != u[i]) places[i] = (2 - k / 3) * kRow + column_place(j);
      }
    }
  }
};

}  // namespace fusedres
