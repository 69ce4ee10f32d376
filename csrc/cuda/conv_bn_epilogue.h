// What happens to the product between a warp's registers and memory.
//
// A warp has 16 rows of the tile, its lanes two neighbours of a row here and there. It turns them
// by a buffer of its own into rows of 128 bytes, of which 8 lanes take one: accesses are of whole
// sectors then, a lane keeps its columns, and sums over the rows are sums over its registers and
// two shuffles. What a warp finds goes to `scratch` [kWarps][sums][kBN], and from there, in the
// order of the warps, to `running` [sums][columns of the block].
#pragma once

#include "cuda/conv_bn_product.h"
#include "cuda/moments.h"
#include "cuda/walk.h"

namespace fusedres {

// The sum over the lanes that have the same lane % 8, to all of them.
__device__ __forceinline__ float sum_over_rows(float x) {
  x += __shfl_xor_sync(~0u, x, 8);
  return x + __shfl_xor_sync(~0u, x, 16);
}

// Forward: y as it is stored, and (mean, M2) of it.
template <class T, int kBN>
struct Statistics {
  using Params = ConvBnFwdParams;
  static constexpr int kResidents = kBN <= 64 ? kMostResidents : 1;  // by mma.sync

  T* y;
  int columns;
  bool wanted;

  __device__ Statistics(const Params& p, const ProductPlan& plan)
      : y(static_cast<T*>(p.y)), columns(plan.columns), wanted(plan.sums > 0) {}

  // What a lane has of row r.
  __device__ static Packed<T, 8> staged(const unsigned char* staging, int r, int lane) {
    return *reinterpret_cast<const Packed<T, 8>*>(staging + staging_offset(r, lane % 8));
  }

  // `rows` rows of the warp exist, from `row` on; `column` is the first of kBN.
  __device__ __forceinline__ void run(const float (&d)[kBN / 2], unsigned char* staging,
                                      float* scratch, int64_t row, int rows, int column) const {
    constexpr int kGroup = 64;  // columns: 128 bytes
    int lane = static_cast<int>(threadIdx.x) % 32;
    const float inverse = 1.0f / static_cast<float>(rows);
#pragma unroll
    for (int group = 0; group < kBN / kGroup; ++group) {
      forget(lane);
#pragma unroll
      for (int j = 0; j < kGroup / 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = (group * (kGroup / 8) + j) * 4 + half * 2;
          const float pair[2] = {d[at], d[at + 1]};
          unsigned char* const to = staging + staging_offset(fragment_row(lane) + half * 8, j);
          *reinterpret_cast<uint32_t*>(to + fragment_pair(lane) * 4) = pack_pair<T>(pair);
        }
      }
      __syncwarp();
      const int first = group * kGroup + (lane % 8) * 8;
      float mean[8] = {}, m2[8] = {};
#pragma unroll
      for (int pass = 0; pass < 4; ++pass) {
        const int r = pass * 4 + lane / 8;
        if (r >= rows) continue;
        const Packed<T, 8> values = staged(staging, r, lane);
        store(reinterpret_cast<Packed<T, 8>*>(y + (row + r) * columns + column + first), values);
        if (!wanted) continue;
        float x[8];
        unpack(values, x);
#pragma unroll
        for (int i = 0; i < 8; ++i) mean[i] += x[i];
      }
      if (wanted) {
#pragma unroll
        for (int i = 0; i < 8; ++i) mean[i] = sum_over_rows(mean[i]) * inverse;
#pragma unroll
        for (int pass = 0; pass < 4; ++pass) {
          const int r = pass * 4 + lane / 8;
          if (r >= rows) continue;
          float x[8];
          unpack(staged(staging, r, lane), x);  // read again: the accumulators leave no room
#pragma unroll
          for (int i = 0; i < 8; ++i) m2[i] += (x[i] - mean[i]) * (x[i] - mean[i]);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) m2[i] = sum_over_rows(m2[i]);
      }
      __syncwarp();
      if (!wanted) continue;
      if (lane < 8) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          scratch[first + i] = mean[i];
          scratch[kBN + first + i] = m2[i];
        }
      }
    }
  }

  // The warps' samples of a column join the block's, which is of `before` rows.
  __device__ static void merge(const ProductPlan& plan, const float* scratch, float* running,
                               int width, int64_t tile, int before) {
    float count = static_cast<float>(before), mean = running[0], m2 = running[width];
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const int rows = rows_of_warp(plan, tile, warp);
      if (rows == 0) break;
      const float* const sample = scratch + warp * 2 * kBN;
      const float n = static_cast<float>(rows);
      merge_moments(count, share_of(count, n), &mean, &m2, sample[0], sample[kBN]);
      count += n;
    }
    running[0] = mean;
    running[width] = m2;
  }
};

// Backward: da joined with the gradient of what was emitted, masked, rounded; and the sums of
// BatchNorm over it.
template <class T, int kBN>
struct MaskAndSum {
  using Params = ConvBnDgradParams;
  static constexpr int kResidents = 1;  // by mma.sync

  const Params& p;
  int columns;
  int sums;

  __device__ MaskAndSum(const Params& p, const ProductPlan& plan)
      : p(p), columns(plan.columns), sums(plan.sums) {}

  // Row of `sampled` that belongs to row m of the input, or -1.
  __device__ int sampled_row(int m) const {
    const int width = static_cast<int>(p.input.shape.w), height = static_cast<int>(p.input.shape.h);
    const int step_h = static_cast<int>(p.step_h), step_w = static_cast<int>(p.step_w);
    const int line = m / width, w = m - line * width, image = line / height;
    const int h = line - image * height;
    if (h % step_h != 0 || w % step_w != 0) return -1;
    const int kept_w = (width + step_w - 1) / step_w, kept_h = (height + step_h - 1) / step_h;
    return (image * kept_h + h / step_h) * kept_w + w / step_w;
  }

  __device__ static void load_four(const void* vector, int c, float (&x)[4]) {
    const Vector<float, 4> four =
        load(reinterpret_cast<const Vector<float, 4>*>(static_cast<const float*>(vector) + c));
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = four.values[i];
  }

  __device__ __forceinline__ void run(const float (&d)[kBN / 2], unsigned char* staging,
                                      float* scratch, int64_t row, int rows, int column) const {
    constexpr int kGroup = 32;  // columns of fp32: 128 bytes
    using Pack = Packed<T, 4>;
    int lane = static_cast<int>(threadIdx.x) % 32;
    const T* const grad_extra = static_cast<const T*>(p.input.grad_extra);
    const T* const a = static_cast<const T*>(p.input.a);
    const T* const x = sums > 0 ? static_cast<const T*>(p.input.y) : nullptr;
    const T* const res = sums > 2 ? static_cast<const T*>(p.input.res_y) : nullptr;
    const T* const sampled = static_cast<const T*>(p.sampled);
    T* const g_in = static_cast<T*>(p.input.g);
    const bool affine = p.input.scale != nullptr;
#pragma unroll
    for (int group = 0; group < kBN / kGroup; ++group) {
      forget(lane);
#pragma unroll
      for (int j = 0; j < kGroup / 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = (group * (kGroup / 8) + j) * 4 + half * 2;
          const int chunk = (2 * j) ^ (fragment_pair(lane) / 2);
          unsigned char* const to = staging + staging_offset(fragment_row(lane) + half * 8, chunk);
          *reinterpret_cast<Vector<float, 2>*>(to +
                                               fragment_pair(lane) % 2 * 8) = {{d[at], d[at + 1]}};
        }
      }
      __syncwarp();
      const int first = group * kGroup + lane % 8 * 4, c = column + first;
      float mean[4] = {}, scale[4] = {}, bias[4] = {}, res_mean[4] = {}, found[3][4] = {};
      if (x != nullptr) load_four(p.input.mean, c, mean);
      if (affine) load_four(p.input.scale, c, scale);
      if (affine) load_four(p.input.bias, c, bias);
      if (res != nullptr) load_four(p.input.res_mean, c, res_mean);
      // Two passes' loads are in flight at once.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Pack extras[2] = {}, masks[2] = {}, xs[2] = {}, rs[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int pass = half * 2 + i, r = pass * 4 + lane / 8;
          if (r >= rows) continue;
          const int64_t at = (row + r) * columns + c;
          if (grad_extra != nullptr) {
            extras[i] = load_once(reinterpret_cast<const Pack*>(grad_extra + at));
          }
          if (sampled != nullptr) {
            const int64_t kept = sampled_row(static_cast<int>(row) + r);
            if (kept >= 0) {
              extras[i] = load_once(reinterpret_cast<const Pack*>(sampled + kept * columns + c));
            }
          }
          if (a != nullptr) masks[i] = load(reinterpret_cast<const Pack*>(a + at));
          if (x != nullptr) xs[i] = load(reinterpret_cast<const Pack*>(x + at));
          if (res != nullptr) rs[i] = load(reinterpret_cast<const Pack*>(res + at));
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int r = (half * 2 + i) * 4 + lane / 8;
          const Vector<float, 4> value =
              *reinterpret_cast<const Vector<float, 4>*>(staging + staging_offset(r, lane % 8));
          if (r >= rows) continue;
          float da[4], other[4], ys[4];
          unpack(extras[i], other);
#pragma unroll
          for (int n = 0; n < 4; ++n) da[n] = value.values[n] + other[n];
          if (a != nullptr) {  // rounding keeps zero, so the mask may come first
            unpack(masks[i], other);
#pragma unroll
            for (int n = 0; n < 4; ++n) da[n] = relu_gate(other[n], da[n]);
          }
          unpack(xs[i], ys);
          if (affine) mask_from_y<T>(ys, mean, scale, bias, da);
          const Vector<T, 4> out = rounded<T, 4>(da);
          store(reinterpret_cast<Vector<T, 4>*>(g_in + (row + r) * columns + c), out);
          unpack(rs[i], other);
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const float g = to_acc(out.values[n]);
            found[0][n] += g;
            found[1][n] += g * (ys[n] - mean[n]);
            found[2][n] += g * (other[n] - res_mean[n]);
          }
        }
        __syncwarp();
      }
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        if (k >= sums) break;
#pragma unroll
        for (int i = 0; i < 4; ++i) found[k][i] = sum_over_rows(found[k][i]);
        if (lane < 8) {
#pragma unroll
          for (int i = 0; i < 4; ++i) scratch[k * kBN + first + i] = found[k][i];
        }
      }
    }
  }

  __device__ static void merge(const ProductPlan& plan, const float* scratch, float* running,
                               int width, int64_t tile, int) {
    for (int k = 0; k < plan.sums; ++k) {
      float sum = running[k * width];
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        if (rows_of_warp(plan, tile, warp) == 0) break;
        sum += scratch[(warp * plan.sums + k) * kBN];
      }
      running[k * width] = sum;
    }
  }
};

// Of one piece of a tile, by the threads that multiply: to memory, and to the block's sums.
// `barrier` holds them up for each other.
template <int kBN, class Epilogue, class BarrierOf>
__device__ __forceinline__ void finish_piece(const Epilogue& epilogue, const ProductPlan& plan,
                                             const float (&d)[kBN / 2], unsigned char* staging,
                                             float* scratch, float* running, int thread, int tile,
                                             int piece, const BarrierOf& barrier) {
  forget(thread);
  const int warp = thread / 32, width = plan.n_tiles * kBN;
  const BlockPart part(plan, kBN);
  const int64_t at = part.first_tile + tile;
  const int rows = rows_of_warp(plan, at, warp);
  if (rows > 0) {
    epilogue.run(d, staging + warp * kStagingBytes, scratch + warp * plan.sums * kBN,
                 at * kTileRows + warp * kWarpRows, rows, part.column + piece * kBN);
  }
  if (plan.sums == 0) return;
  barrier();
  forget(thread);
  if (thread < kBN) {
    Epilogue::merge(plan, scratch + thread, running + piece * kBN + thread, width,
                    BlockPart(plan, kBN).first_tile + tile, tile * kTileRows);
  }
  barrier();
}

// The block's sums become its partial row of part [chunks, sums, columns]. A thread writes the
// columns that it merged.
template <int kBN>
__device__ __forceinline__ void leave_sums(const ProductPlan& plan, const float* running,
                                           float* out, int thread) {
  if (thread >= kBN) return;
  const BlockPart part(plan, kBN);
  const int width = plan.n_tiles * kBN;
  for (int k = 0; k < plan.sums; ++k) {
    float* const row = out + (static_cast<int64_t>(part.chunk) * plan.sums + k) * plan.columns;
    for (int c = thread; c < width; c += kBN) row[part.column + c] = running[k * width + c];
  }
}

}  // namespace fusedres
