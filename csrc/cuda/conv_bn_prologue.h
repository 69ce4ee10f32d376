// What happens to a fragment of A between shared memory and its product.
//
//   Activation   a  = act((x - mean)*scale + bias [+ residual]), forward
//   Gradient     dy = scale*g + c0 + c1*(y - mean), backward; g masked first where it came unmasked
//
// Each of these rounds to the storage type. Constants of the channels lie in shared memory as
// [vectors][reduction] floats: a lane needs four channels of each vector for the 8 elements of its
// fragment, which other lanes of its warp read at the same time.
#pragma once

#include "cuda/conv_bn_product.h"
#include "cuda/moments.h"
#include "cuda/walk.h"

namespace fusedres {

__device__ __forceinline__ void load_pair(const float* p, float (&x)[2]) {
  const Vector<float, 2> pair = *reinterpret_cast<const Vector<float, 2>*>(p);
  x[0] = pair.values[0];
  x[1] = pair.values[1];
}

enum InputKind { kTensorInput, kDeferredInput, kJoinedInput };  // joined: with a residual

template <class T, int kKind>
struct Activation {
  static constexpr int kSources = kKind == kJoinedInput ? 2 : 1;
  static constexpr bool kChanges = kKind != kTensorInput;
  // mean, scale and bias, and the same of the residual
  static constexpr int kVectors = kKind == kTensorInput ? 0 : kKind == kDeferredInput ? 3 : 6;

  const float* table;
  int reduction;
  bool relu, normalized;  // the residual

  FUSEDRES_HOST_DEVICE static const T* source(const ConvBnFwdParams& p, int i) {
    return static_cast<const T*>(i == 0 ? p.input.y : p.input.residual);
  }

  // Where the fragments' values go as well; or null.
  __device__ static T* side_output(const ConvBnFwdParams& p) { return static_cast<T*>(p.input.a); }

  __device__ Activation(const ConvBnFwdParams& p, const ProductPlan& plan, float* table)
      : table(table),
        reduction(plan.reduction),
        relu(p.input.relu),
        normalized(p.input.res_mean != nullptr) {}

  // By all threads of the block, before its barrier.
  __device__ void fill(const ConvBnFwdParams& p, float* out, bool) const {
    if constexpr (kKind == kTensorInput) return;
    const void* const vectors[6] = {p.input.mean,     p.input.scale,     p.input.bias,
                                    p.input.res_mean, p.input.res_scale, p.input.res_bias};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (vectors[v] == nullptr) continue;
      for (int c = static_cast<int>(threadIdx.x); c < reduction;
           c += static_cast<int>(blockDim.x)) {
        out[v * reduction + c] = static_cast<const float*>(vectors[v])[c];
      }
    }
  }

  // Of the fragment at channels [k, k + 16); `second` is the residual's.
  __device__ __forceinline__ void apply(uint32_t (&a)[4], const uint32_t (&second)[4],
                                        int k) const {
    if constexpr (kKind == kTensorInput) return;
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* const at = table + k + half * 8 + fragment_pair(lane) * 2;
      float mean[2], scale[2], bias[2];
      load_pair(at, mean);
      load_pair(at + reduction, scale);
      load_pair(at + 2 * reduction, bias);
      [[maybe_unused]] float res_mean[2], res_scale[2], res_bias[2];
      if (kKind == kJoinedInput && normalized) {
        load_pair(at + 3 * reduction, res_mean);
        load_pair(at + 4 * reduction, res_scale);
        load_pair(at + 5 * reduction, res_bias);
      }
#pragma unroll
      for (int w = half * 2; w < half * 2 + 2; ++w) {
        float x[2];
        [[maybe_unused]] float r[2];
        unpack_pair<T>(a[w], x);
        if constexpr (kKind == kJoinedInput) unpack_pair<T>(second[w], r);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float value = (x[i] - mean[i]) * scale[i] + bias[i];
          if constexpr (kKind == kJoinedInput) {
            value += normalized ? (r[i] - res_mean[i]) * res_scale[i] + res_bias[i] : r[i];
          }
          x[i] = relu ? relu_gate(value, value) : value;
        }
        a[w] = pack_pair<T>(x);
      }
    }
  }
};

template <class T>
struct Gradient {
  static constexpr int kSources = 2, kVectors = 5;  // mean, scale, c0, c1, bias
  static constexpr bool kChanges = true;

  const float* table;
  int64_t rows;
  int reduction;
  bool training, masked;

  FUSEDRES_HOST_DEVICE static const T* source(const ConvBnDgradParams& p, int i) {
    return static_cast<const T*>(i == 0 ? p.output.g : p.output.y);
  }
  __device__ static T* side_output(const ConvBnDgradParams& p) {
    return static_cast<T*>(p.output.dy);
  }

  __device__ Gradient(const ConvBnDgradParams& p, const ProductPlan& plan, float* table)
      : table(table),
        rows(plan.rows),
        reduction(plan.reduction),
        training(p.output.training),
        masked(p.output.bias != nullptr) {}

  // One of the blocks, `first`, leaves dweight and dbias, which need nothing but the sums.
  __device__ void fill(const ConvBnDgradParams& p, float* out, bool first) const {
    const float inverse = 1.0f / static_cast<float>(rows);
    const float* const sums = static_cast<const float*>(p.output.sums);
    for (int c = static_cast<int>(threadIdx.x); c < reduction; c += static_cast<int>(blockDim.x)) {
      const float scale = static_cast<const float*>(p.output.scale)[c];
      const float rstd = static_cast<const float*>(p.output.rstd)[c];
      const float s0 = sums[c], s1 = sums[reduction + c];
      out[c] = static_cast<const float*>(p.output.mean)[c];
      out[reduction + c] = scale;
      out[2 * reduction + c] = -scale * (s0 * inverse);
      out[3 * reduction + c] = -scale * rstd * rstd * (s1 * inverse);
      if (masked) out[4 * reduction + c] = static_cast<const float*>(p.output.bias)[c];
      if (!first) continue;
      if (p.output.dbias.data != nullptr) set_value(p.output.dbias, c, s0);
      if (p.output.dweight.data != nullptr) set_value(p.output.dweight, c, s1 * rstd);
    }
  }

  // Of the fragment of g at channels [k, k + 16); `second` is y's.
  __device__ __forceinline__ void apply(uint32_t (&a)[4], const uint32_t (&second)[4],
                                        int k) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* const at = table + k + half * 8 + fragment_pair(lane) * 2;
      float mean[2], scale[2], c0[2], c1[2], bias[2];
      load_pair(at, mean);
      load_pair(at + reduction, scale);
      load_pair(at + 2 * reduction, c0);
      load_pair(at + 3 * reduction, c1);
      if (masked) load_pair(at + 4 * reduction, bias);
#pragma unroll
      for (int w = half * 2; w < half * 2 + 2; ++w) {
        float g[2], y[2];
        unpack_pair<T>(a[w], g);
        unpack_pair<T>(second[w], y);
        if (masked) mask_from_y<T>(y, mean, scale, bias, g);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          g[i] *= scale[i];
          if (training) g[i] += c0[i] + c1[i] * (y[i] - mean[i]);
        }
        a[w] = pack_pair<T>(g);
      }
    }
  }
};

// The words of a fragment, back to where load_matrices() took them from: rows `row` to row + 15 of
// a tile, k step kk of its rows.
template <int kRowBytes>
__device__ __forceinline__ void store_fragment(unsigned char* tile, int row, int kk,
                                               const uint32_t (&a)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t at =
        chunk_offset<kRowBytes>(row + fragment_row(lane) + (w % 2) * 8, kk * 2 + w / 2);
    *reinterpret_cast<uint32_t*>(tile + at + fragment_pair(lane) * 4) = a[w];
  }
}

// A warp's 16 rows of a tile of shared memory, of which `rows` exist, to global memory; they begin
// at `out`, `stride` elements apart. Whole rows of the tile: sectors leave whole.
template <int kRowBytes, class T>
__device__ __forceinline__ void store_rows(const unsigned char* tile, int row, int rows, T* out,
                                           int64_t stride) {
  constexpr int kChunks = kRowBytes / kChunkBytes, kAtOnce = 32 / kChunks;
  int lane = static_cast<int>(threadIdx.x) % 32;
  forget(lane);
#pragma unroll
  for (int pass = 0; pass < kWarpRows / kAtOnce; ++pass) {
    const int r = pass * kAtOnce + lane / kChunks, chunk = lane % kChunks;
    const auto* const from =
        reinterpret_cast<const Vector<T, 8>*>(tile + chunk_offset<kRowBytes>(row + r, chunk));
    if (r < rows) store(reinterpret_cast<Vector<T, 8>*>(out + r * stride + chunk * 8), *from);
  }
}

}  // namespace fusedres
