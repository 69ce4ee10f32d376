// What every contract header speaks of: storage types, memory layouts, sizes.
#pragma once

#include <cstdint>

namespace fusedres {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The values are part of the Python side's contract (fusedres/native/_args.py).
enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };
enum class Layout : int { kNHWC = 0, kNCHW = 1 };

// An activation is always [N, C, H, W]; the layout says how it is stored, densely.
struct Shape {
  int64_t n, c, h, w;
  Layout layout;

  int64_t hw() const { return h * w; }
  int64_t rows() const { return n * h * w; }  // values per channel: M = N*H*W
  int64_t numel() const { return rows() * c; }

  // Maps of one pixel are rows of channels in either layout, and run faster as such.
  bool channels_inner() const { return layout == Layout::kNHWC || h * w == 1; }
};

// A [C] vector of a dtype of its own, as parameters and running statistics have one; data may be
// null.
struct ConstVector {
  DType dtype;
  const void* data;
};
struct MutableVector {
  DType dtype;
  void* data;
};

// Rows of the partial results that a per-channel reduction leaves for its second stage, from the
// sizes alone: neither the thread count nor the machine may change the order of a sum. An NHWC
// tensor is cut into blocks of at least 128 pixels, an NCHW tensor into its images.
inline int64_t partial_rows(const Shape& shape) {
  constexpr int64_t kMinRows = 128, kMaxPartials = 256;
  if (!shape.channels_inner()) return shape.n;
  const int64_t blocks = ceil_div(shape.rows(), kMinRows);
  return blocks < kMaxPartials ? blocks : kMaxPartials;
}

}  // namespace fusedres
