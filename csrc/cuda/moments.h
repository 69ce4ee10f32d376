// Mean and variance by Chan's formula, from a thread to a grid, and what follows from them.
//
// A sample is (count, mean, M2), M2 the sum of squared deviations from the mean; two samples merge
// without cancellation, which E[x^2] - E[x]^2 has. Every order of merging is fixed by the sizes and
// the grid.
#pragma once

#include "cuda/walk.h"
#include "fusedres/batch_norm.h"

namespace fusedres {

// The second sample joins the first; it makes up `share` of both. The caller moves the count.
template <class Acc>
__device__ __forceinline__ void merge_moments(Acc count, Acc share, Acc* mean, Acc* m2,
                                              Acc other_mean, Acc other_m2) {
  const Acc delta = other_mean - *mean;
  *mean += delta * share;
  *m2 += other_m2 + delta * (delta * (count * share));  // delta squared may overflow
}

// other / (count + other); 0 where both are.
template <class Acc>
__device__ __forceinline__ Acc share_of(Acc count, Acc other) {
  return other > Acc(0) ? other / (count + other) : Acc(0);
}

// Rows of which part `index` has the moments.
__device__ __forceinline__ int64_t rows_of_part(const Walk& walk, int64_t index) {
  const int64_t begin = index * walk.chunk, end = begin + walk.chunk;
  return (end < walk.rows ? end : walk.rows) - begin;
}

template <int kVector, class Acc>
struct Moments {
  Acc count = 0, mean[kVector] = {}, m2[kVector] = {};

  // `used` of the rows join as one sample: their mean first, then deviations from it.
  template <int kRows, class T, class Used>
  __device__ __forceinline__ void add_rows(const Packed<T, kVector> (&rows)[kRows], Used used) {
    const Acc n = static_cast<Acc>(static_cast<int>(used));
    const Acc inverse = Acc(1) / n, share = share_of(count, n);
    Acc center[kVector] = {}, deviations[kVector] = {};
    Acc x[kVector];  // unpacked twice: kept for all rows, it would take the registers of a block
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      if (u >= used) continue;
      unpack(rows[u], x);
#pragma unroll
      for (int i = 0; i < kVector; ++i) center[i] += x[i];
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) center[i] *= inverse;
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      if (u >= used) continue;
      unpack(rows[u], x);
#pragma unroll
      for (int i = 0; i < kVector; ++i) deviations[i] += (x[i] - center[i]) * (x[i] - center[i]);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      merge_moments(count, share, &mean[i], &m2[i], center[i], deviations[i]);
    }
    count += n;
  }

  // Every lane joins its share of the partial rows, [walk.chunks, 2, C], of this thread's channels.
  // Several rows are in flight: one after the other, each would wait for memory.
  __device__ void merge_parts(const Strip<kVector>& strip, const Acc* part, const Walk& walk) {
    constexpr int kRows = 4;
    const int64_t channels = walk.channels;
    for (int64_t row = strip.lane; row < walk.chunks; row += kRows * strip.walk.lanes) {
      Acc other_mean[kRows][kVector], other_m2[kRows][kVector];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t at = row + u * strip.walk.lanes;
        if (at >= walk.chunks) continue;
        const Acc* const sample = part + at * 2 * channels + strip.channel;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          other_mean[u][i] = sample[i];
          other_m2[u][i] = sample[channels + i];
        }
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t at = row + u * strip.walk.lanes;
        if (at >= walk.chunks) continue;
        const Acc n = static_cast<Acc>(rows_of_part(walk, at));
        const Acc share = share_of(count, n);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          merge_moments(count, share, &mean[i], &m2[i], other_mean[u][i], other_m2[u][i]);
        }
        count += n;
      }
    }
  }

  // Bytes of shared memory that merge_lanes needs.
  static constexpr size_t kShared = (2 * kVector + 1) * kThreads * sizeof(Acc);

  // The lanes of each column join lane 0, in a tree. `shared` is kShared bytes for the block. One
  // barrier a step: what a step reads, no thread changes before the next one.
  __device__ void merge_lanes(const Strip<kVector>& strip, Acc* shared) {
    Acc* const own = shared + threadIdx.x;  // [2*kVector + 1][kThreads]
    for (int left = strip.walk.lanes;; left = (left + 1) / 2) {
      own[0] = count;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        own[(1 + i) * kThreads] = mean[i];
        own[(1 + kVector + i) * kThreads] = m2[i];
      }
      if (left == 1) return;
      __syncthreads();
      const int half = (left + 1) / 2;
      if (strip.lane < left - half) {
        const Acc* const other = own + half * strip.walk.columns;
        const Acc share = share_of(count, other[0]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          merge_moments(count, share, &mean[i], &m2[i], other[(1 + i) * kThreads],
                        other[(1 + kVector + i) * kThreads]);
        }
        count += other[0];
      }
    }
  }
};

__device__ __forceinline__ double value_of(ConstVector v, int64_t i) {
  switch (v.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(v.data)[i];
    case DType::kFloat16:
      return to_acc(static_cast<const Float16*>(v.data)[i]);
    case DType::kBFloat16:
      return to_acc(static_cast<const BFloat16*>(v.data)[i]);
    case DType::kFloat64:
      return static_cast<const double*>(v.data)[i];
  }
  return 0;
}

__device__ __forceinline__ double value_of(MutableVector v, int64_t i) {
  return value_of(ConstVector{v.dtype, v.data}, i);
}

__device__ __forceinline__ void set_value(MutableVector v, int64_t i, double value) {
  switch (v.dtype) {
    case DType::kFloat32:
      static_cast<float*>(v.data)[i] = static_cast<float>(value);
      return;
    case DType::kFloat16:
      static_cast<Float16*>(v.data)[i] = from_acc<Float16>(static_cast<float>(value));
      return;
    case DType::kBFloat16:
      static_cast<BFloat16*>(v.data)[i] = from_acc<BFloat16>(static_cast<float>(value));
      return;
    case DType::kFloat64:
      static_cast<double*>(v.data)[i] = value;
      return;
  }
}

// mean, scale and bias of a channel as bn_act takes them.
template <class Acc>
struct Affine {
  Acc mean, scale, bias;
};

// What BatchNorm makes of channel c's batch statistics. If `write`, also leaves all its results.
template <class Acc>
__device__ Affine<Acc> finish_channel(const BatchNormFwdParams& p, int64_t c, Acc mean, Acc var,
                                      bool write) {
  const Acc rstd = Acc(1) / sqrt(var + static_cast<Acc>(p.eps));
  const Acc weight = p.weight.data == nullptr ? Acc(1) : static_cast<Acc>(value_of(p.weight, c));
  const Acc bias = p.bias.data == nullptr ? Acc(0) : static_cast<Acc>(value_of(p.bias, c));
  const Affine<Acc> result = {mean, weight * rstd, bias};
  if (!write) return result;
  static_cast<Acc*>(p.mean)[c] = mean;
  static_cast<Acc*>(p.var)[c] = var;
  static_cast<Acc*>(p.rstd)[c] = rstd;
  static_cast<Acc*>(p.scale)[c] = result.scale;
  static_cast<Acc*>(p.shift)[c] = bias;
  const int64_t count = p.shape.n * p.shape.h * p.shape.w;
  if (p.training && p.running_mean.data != nullptr && count > 0) {
    const double amount =
        p.momentum_vector.data == nullptr ? p.momentum : value_of(p.momentum_vector, 0);
    const double old_mean = value_of(p.running_mean, c), old_var = value_of(p.running_var, c);
    const double unbiased = static_cast<double>(var) * count / (count - 1);
    set_value(p.running_mean, c, old_mean + amount * (mean - old_mean));
    set_value(p.running_var, c, old_var + amount * (unbiased - old_var));
  }
  return result;
}

}  // namespace fusedres
