// BatchNorm's statistics and the gradient of its input on the GPU.
//
// Statistics, stage 1: a block merges its chunk of rows into one partial row of (mean, M2); reads y
// once, 2 bytes per element of a half type (cuda/walk.h, cuda/moments.h). Stage 2: 8 channels a
// block, whose lanes merge every 32nd partial row and then each other; in the same launch rstd,
// scale, bias and the running statistics follow.
// Backward: every thread makes the coefficients of its channels from the sums it is given, then
// goes up its rows, as the pass that took the sums went down; reads g and y, writes dy: 6 bytes per
// element of a half type. The blocks of the first chunk leave dweight and dbias, which need nothing
// but the sums.
#include <cmath>

#include "cuda/batch_norm_finish.h"
#include "cuda/moments.h"
#include "fusedres/batch_norm.h"

namespace fusedres {

constexpr int kFinishColumns = 8;  // a row of 32 bytes: a sector of memory

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads, 3)
    batch_norm_stats_kernel(const T* y, acc_t<T>* part, Walk walk) {
  using Acc = acc_t<T>;
  using Pack = Packed<T, kVector>;
  constexpr int kUnroll = 4;
  const Strip<kVector> strip(walk);
  Moments<kVector, Acc> moments;
  strip.template for_each_group<kUnroll>([&](int64_t row, auto count) {
    Pack rows[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) continue;  // the next pass reads y again: it may stay in the cache
      rows[u] = load(reinterpret_cast<const Pack*>(y + strip.offset(row + u * walk.lanes)));
    }
    moments.add_rows(rows, count);
  });
  moments.merge_lanes(strip, shared_memory<Acc>());
  if (strip.lane > 0 || !strip.active) return;
  Acc* const out = part + strip.part * 2 * walk.channels;
  store_channels(strip, out, moments.mean);
  store_channels(strip, out + walk.channels, moments.m2);
}

// Acc is float or double, as the statistics; part [walk.chunks, 2, C].
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    batch_norm_finish_kernel(BatchNormFwdParams p, const Acc* part, Walk walk) {
  // a walk over the partial rows: one channel a thread
  Walk across = {};
  across.rows = walk.chunks;
  across.channels = walk.channels;
  across.columns = kFinishColumns;
  across.lanes = kThreads / kFinishColumns;
  across.groups = static_cast<int>(gridDim.x);
  const Strip<1> strip(across);
  const int64_t c = strip.channel;
  Moments<1, Acc> total;
  if (p.training && strip.active) total.merge_parts(strip, part, walk);
  total.merge_lanes(strip, shared_memory<Acc>());
  if (strip.lane > 0 || !strip.active) return;
  Acc mean, var;
  if (p.training) {
    mean = total.mean[0];
    var = total.count > Acc(0) ? total.m2[0] / total.count : Acc(0);
  } else {
    mean = static_cast<Acc>(value_of(p.running_mean, c));
    var = static_cast<Acc>(value_of(p.running_var, c));
  }
  finish_channel(p, c, mean, var, true);
}

template <class T, int kVector, bool kMask>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_bwd_kernel(BatchNormBwdParams p, Walk walk) {
  using Acc = acc_t<T>;
  using Pack = Packed<T, kVector>;
  constexpr int kUnroll = 4;
  const Strip<kVector> strip(walk);
  const T* const g = static_cast<const T*>(p.g);
  const T* const y = static_cast<const T*>(p.y);
  T* const dy = static_cast<T*>(p.dy);
  const Acc* const sums = static_cast<const Acc*>(p.sums);
  Acc mean[kVector], scale[kVector], rstd[kVector], c0[kVector], c1[kVector];
  load_channels(strip, static_cast<const Acc*>(p.mean), mean);
  load_channels(strip, static_cast<const Acc*>(p.scale), scale);
  load_channels(strip, static_cast<const Acc*>(p.rstd), rstd);
  load_channels(strip, sums, c0);
  load_channels(strip, sums + walk.channels, c1);
  if (strip.part == 0 && strip.lane == 0 && strip.active) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (p.dbias.data != nullptr) set_value(p.dbias, strip.channel + i, c0[i]);
      if (p.dweight.data != nullptr) set_value(p.dweight, strip.channel + i, c1[i] * rstd[i]);
    }
  }
  [[maybe_unused]] Acc bias[kVector];
  if constexpr (kMask) load_channels(strip, static_cast<const Acc*>(p.bias), bias);
  const Acc inverse = Acc(1) / static_cast<Acc>(walk.rows);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    c0[i] = p.training ? -scale[i] * (c0[i] * inverse) : Acc(0);
    c1[i] = p.training ? -scale[i] * rstd[i] * rstd[i] * (c1[i] * inverse) : Acc(0);
  }
  const bool training = p.training;

  strip.template for_each_group_upwards<kUnroll>([&](int64_t row, auto count) {
    Pack gs[kUnroll], ys[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) continue;
      const int64_t at = strip.offset(row + u * walk.lanes);
      gs[u] = load_once(reinterpret_cast<const Pack*>(g + at));
      if (kMask || training) ys[u] = load_once(reinterpret_cast<const Pack*>(y + at));
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) continue;
      Acc values[kVector], centered[kVector];
      unpack(gs[u], values);
      if (kMask || training) unpack(ys[u], centered);
      if constexpr (kMask) mask_from_y<T>(centered, mean, scale, bias, values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] *= scale[i];
      if (training) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] += c0[i] + c1[i] * (centered[i] - mean[i]);
      }
      store(reinterpret_cast<Vector<T, kVector>*>(dy + strip.offset(row + u * walk.lanes)),
            rounded<T, kVector>(values));
    }
  });
}

namespace {

template <class Acc>
cudaError_t finish(const BatchNormFwdParams& p, const Acc* part, const Walk& walk,
                   cudaStream_t stream, LaunchConfig* config) {
  const int64_t blocks = ceil_div(p.shape.c, kFinishColumns);
  *config = {"batch_norm_finish", static_cast<unsigned>(blocks), kThreads,
             Moments<1, Acc>::kShared};
  return launch(batch_norm_finish_kernel<Acc>, *config, stream, p, part, walk);
}

// Stage 1 of the statistics for one dtype and vector width.
template <class T, int kVector>
struct Statistics {
  using Acc = acc_t<T>;
  static constexpr auto kKernel = batch_norm_stats_kernel<T, kVector>;
  static constexpr size_t kShared = Moments<kVector, Acc>::kShared;

  static cudaError_t workspace(const BatchNormFwdParams& p, int device, int64_t* bytes) {
    Walk walk;
    const cudaError_t status = fit_walk<kVector, kKernel, kShared>(p.shape, device, &walk);
    *bytes = walk.chunks * 2 * p.shape.c * static_cast<int64_t>(sizeof(Acc));
    return status;
  }

  static cudaError_t run(const BatchNormFwdParams& p, const CudaTarget& target,
                         LaunchConfig* config) {
    Acc* const part = static_cast<Acc*>(p.workspace);
    Walk walk = {};
    walk.channels = p.shape.c;
    cudaError_t status = cudaSuccess;
    if (p.training && p.shape.numel() > 0) {
      status = fit_walk<kVector, kKernel, kShared>(p.shape, target.device, &walk);
      if (status != cudaSuccess) return status;
      *config = {"batch_norm_stats", walk.blocks(), kThreads, kShared};
      status = launch(kKernel, *config, target.stream, static_cast<const T*>(p.y), part, walk);
      if (status != cudaSuccess) return status;
    }
    return finish(p, const_cast<const Acc*>(part), walk, target.stream, config);
  }
};

template <class T, int kVector, bool kMask>
cudaError_t backward(const BatchNormBwdParams& p, const CudaTarget& target, LaunchConfig* config) {
  constexpr auto kKernel = batch_norm_bwd_kernel<T, kVector, kMask>;
  Walk walk;
  const cudaError_t status = fit_walk<kVector, kKernel, 0>(p.shape, target.device, &walk);
  if (status != cudaSuccess) return status;
  *config = {"batch_norm_bwd", walk.blocks(), kThreads};
  return launch(kKernel, *config, target.stream, p, walk);
}

template <class F>
cudaError_t dispatch_statistics(const BatchNormFwdParams& p, const F& f) {
  return dispatch_cuda(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return dispatch_vector<T>(takes_vectors<T>(p.shape, p.y), [&](auto vector) {
      return f(Statistics<T, decltype(vector)::value>{});
    });
  });
}

}  // namespace

cudaError_t launch_batch_norm_fwd(const BatchNormFwdParams& p, const CudaTarget& target,
                                  LaunchConfig* config) {
  if (p.shape.c == 0) return cudaSuccess;
  if (any_null(p.mean, p.var, p.rstd, p.scale, p.shift)) return cudaErrorInvalidValue;
  if ((p.running_mean.data == nullptr) != (p.running_var.data == nullptr)) {
    return cudaErrorInvalidValue;
  }
  if (!p.training && p.running_mean.data == nullptr) return cudaErrorInvalidValue;
  if (p.training && p.shape.numel() > 0 && any_null(p.y, p.workspace)) return cudaErrorInvalidValue;
  const DeviceGuard guard(target.device);
  if (guard.status() != cudaSuccess) return guard.status();
  return dispatch_statistics(p, [&](auto statistics) { return statistics.run(p, target, config); });
}

cudaError_t launch_batch_norm_finish(const BatchNormFwdParams& p, const float* part, int64_t chunks,
                                     int64_t chunk, cudaStream_t stream, LaunchConfig* config) {
  Walk walk = {};
  walk.rows = p.shape.rows();
  walk.channels = p.shape.c;
  walk.chunk = chunk;
  walk.chunks = static_cast<int>(chunks);
  return finish(p, part, walk, stream, config);
}

cudaError_t batch_norm_fwd_workspace(const BatchNormFwdParams& p, int device, int64_t* bytes) {
  *bytes = 0;
  if (!p.training || p.shape.numel() == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  return dispatch_statistics(
      p, [&](auto statistics) { return statistics.workspace(p, device, bytes); });
}

cudaError_t launch_batch_norm_bwd(const BatchNormBwdParams& p, const CudaTarget& target,
                                  LaunchConfig* config) {
  if (p.shape.numel() == 0) return cudaSuccess;
  if (any_null(p.g, p.y, p.mean, p.scale, p.rstd, p.sums, p.dy)) return cudaErrorInvalidValue;
  const DeviceGuard guard(target.device);
  if (guard.status() != cudaSuccess) return guard.status();
  return dispatch_cuda(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return dispatch_vector<T>(takes_vectors<T>(p.shape, p.g, p.y, p.dy), [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      if (p.bias != nullptr) return backward<T, kVector, true>(p, target, config);
      return backward<T, kVector, false>(p, target, config);
    });
  });
}

}  // namespace fusedres
