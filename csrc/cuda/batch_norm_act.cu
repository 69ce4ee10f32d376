// BatchNorm and its activation in one kernel that reads y once, for tensors that fit on the chip.
//
// A cooperative launch of one block per multiprocessor. Each block loads its chunk of rows into its
// shared memory, merges their statistics and leaves a partial row; after a barrier of the whole
// grid it merges the partial rows of its own channels, in the order every other block does, and
// writes a from shared memory. Reads y [and residual], writes a: 4 or 6 bytes per element of a half
// type, where two kernels move 6 or 8. Blocks of the first chunk leave the statistics.
#include "cuda/grid_barrier.h"
#include "cuda/moments.h"
#include "fusedres/batch_norm.h"

namespace fusedres {

template <class T, int kVector, bool kResidual>
__global__ void __launch_bounds__(kThreads, 1)
    batch_norm_act_fwd_kernel(BatchNormFwdParams p, BnActFwdParams act, Walk walk) {
  using Acc = acc_t<T>;
  using Pack = Packed<T, kVector>;
  constexpr int kUnroll = 8, kWriteUnroll = 4;
  const Strip<kVector> strip(walk);
  const T* const y = static_cast<const T*>(p.y);
  const T* const residual = static_cast<const T*>(act.residual);
  T* const a = static_cast<T*>(act.a);
  Acc* const part = static_cast<Acc*>(p.workspace);
  Acc* const scratch = shared_memory<Acc>();
  // this thread's rows, one after the other: [rows of a lane][kThreads]
  Pack* const kept =
      reinterpret_cast<Pack*>(shared_memory<unsigned char>() + Moments<kVector, Acc>::kShared) +
      threadIdx.x;

  Moments<kVector, Acc> moments;
  int done = 0;
  strip.template for_each_group<kUnroll>([&](int64_t row, auto count) {
    Pack rows[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) continue;
      rows[u] = load_once(reinterpret_cast<const Pack*>(y + strip.offset(row + u * walk.lanes)));
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u < count) kept[(done + u) * kThreads] = rows[u];
    }
    done += count;
    moments.add_rows(rows, count);
  });
  moments.merge_lanes(strip, scratch);
  if (strip.lane == 0 && strip.active) {
    Acc* const out = part + strip.part * 2 * walk.channels;
    store_channels(strip, out, moments.mean);
    store_channels(strip, out + walk.channels, moments.m2);
  }
  grid_barrier();

  Moments<kVector, Acc> total;
  if (strip.active) total.merge_parts(strip, part, walk);
  total.merge_lanes(strip, scratch);
  __syncthreads();
  Acc* const affine = scratch + strip.column * kVector;  // [3][columns*kVector]
  const int width = walk.columns * kVector;
  if (strip.lane == 0 && strip.active) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const Affine<Acc> channel = finish_channel(p, strip.channel + i, total.mean[i],
                                                 total.m2[i] / total.count, strip.part == 0);
      affine[i] = channel.mean;
      affine[width + i] = channel.scale;
      affine[2 * width + i] = channel.bias;
    }
  }
  __syncthreads();
  if (!strip.active) return;
  Acc mean[kVector], scale[kVector], bias[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    mean[i] = affine[i];
    scale[i] = affine[width + i];
    bias[i] = affine[2 * width + i];
  }

  done = 0;
  strip.template for_each_group<kWriteUnroll>([&](int64_t row, auto count) {
    [[maybe_unused]] Pack rs[kWriteUnroll];
    if constexpr (kResidual) {
#pragma unroll
      for (int u = 0; u < kWriteUnroll; ++u) {
        if (u >= count) continue;
        const int64_t at = strip.offset(row + u * walk.lanes);
        rs[u] = load_once(reinterpret_cast<const Pack*>(residual + at));
      }
    }
#pragma unroll
    for (int u = 0; u < kWriteUnroll; ++u) {
      if (u >= count) continue;
      Acc values[kVector];
      [[maybe_unused]] Acc r[kVector];
      unpack(kept[(done + u) * kThreads], values);
      if constexpr (kResidual) unpack(rs[u], r);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        Acc value = (values[i] - mean[i]) * scale[i] + bias[i];
        if constexpr (kResidual) value += r[i];
        values[i] = act.relu ? relu_gate(value, value) : value;
      }
      store(reinterpret_cast<Vector<T, kVector>*>(a + strip.offset(row + u * walk.lanes)),
            rounded<T, kVector>(values));
    }
    done += count;
  });
}

namespace {

// How the tensor lies on the chip; no blocks where it does not fit.
template <class T>
struct OneRead {
  static constexpr int kVector = 16 / sizeof(T);
  Walk walk = {};
  size_t shared = 0;
  int most_shared = 0;  // that the device allows

  bool fits() const { return walk.chunks > 0; }

  static cudaError_t find(const BatchNormFwdParams& p, int device, OneRead* plan) {
    if (!p.training || p.shape.numel() == 0 || !takes_vectors<T>(p.shape, p.y)) return cudaSuccess;
    int multiprocessors = 0, cooperative = 0;
    const auto ask = [device](int* value, cudaDeviceAttr what) {
      return cudaDeviceGetAttribute(value, what, device);
    };
    cudaError_t status = ask(&multiprocessors, cudaDevAttrMultiProcessorCount);
    if (status == cudaSuccess)
      status = ask(&plan->most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (status == cudaSuccess) status = ask(&cooperative, cudaDevAttrCooperativeLaunch);
    if (status != cudaSuccess || cooperative == 0) return status;
    const Walk walk = make_walk<kVector>(p.shape, multiprocessors);
    const int64_t rows_of_a_lane = ceil_div(walk.chunk, walk.lanes);
    const int64_t bytes = rows_of_a_lane * kThreads * 16 + Moments<kVector, acc_t<T>>::kShared;
    if (walk.blocks() > static_cast<unsigned>(multiprocessors) || bytes > plan->most_shared) {
      return cudaSuccess;
    }
    plan->walk = walk;
    plan->shared = bytes;
    return cudaSuccess;
  }

  template <bool kResidual>
  cudaError_t run(const BatchNormFwdParams& p, const BnActFwdParams& act, const CudaTarget& target,
                  LaunchConfig* config) const {
    constexpr auto kKernel = batch_norm_act_fwd_kernel<T, kVector, kResidual>;
    *config = {"batch_norm_act_fwd", walk.blocks(), kThreads, shared, true};
    const cudaError_t status = allow_shared<kKernel>(target.device, most_shared);
    if (status != cudaSuccess) return status;
    return launch(kKernel, *config, target.stream, p, act, walk);
  }
};

}  // namespace

cudaError_t launch_batch_norm_act_fwd(const BatchNormFwdParams& p, const BnActFwdParams& act,
                                      const CudaTarget& target, LaunchConfig* config) {
  if (any_null(p.y, p.mean, p.var, p.rstd, p.scale, p.shift, p.workspace, act.a) ||
      act.res_mean != nullptr) {
    return cudaErrorInvalidValue;
  }
  if ((p.running_mean.data == nullptr) != (p.running_var.data == nullptr)) {
    return cudaErrorInvalidValue;
  }
  const DeviceGuard guard(target.device);
  if (guard.status() != cudaSuccess) return guard.status();
  return dispatch_cuda(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    OneRead<T> plan;
    const cudaError_t status = OneRead<T>::find(p, target.device, &plan);
    if (status != cudaSuccess) return status;
    if (!plan.fits() || !aligned_16(act.residual, act.a)) return cudaErrorInvalidValue;
    if (act.residual == nullptr) return plan.template run<false>(p, act, target, config);
    return plan.template run<true>(p, act, target, config);
  });
}

cudaError_t batch_norm_act_fwd_workspace(const BatchNormFwdParams& p, const BnActFwdParams& act,
                                         int device, int64_t* bytes) {
  *bytes = 0;
  if (!aligned_16(act.residual, act.a)) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  return dispatch_cuda(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    OneRead<T> plan;
    const cudaError_t status = OneRead<T>::find(p, device, &plan);
    if (plan.fits()) *bytes = plan.walk.chunks * 2 * p.shape.c * int64_t{sizeof(acc_t<T>)};
    return status;
  });
}

}  // namespace fusedres
