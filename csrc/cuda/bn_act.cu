// BatchNorm apply, residual add and ReLU on the GPU, in one pass each way.
//
// Work is split as cuda/walk.h describes: a thread keeps the constants of its channels in registers
// and has the loads of several rows in flight.
// Forward: reads y [and residual], writes a: 4 or 6 bytes per element of a half type; rows upwards,
// as the pass that took y's statistics went down. Saved for backward beyond what the caller holds:
// nothing.
// Backward: reads grad [grad_extra] [a] y [res_y], writes g: 8 bytes per element with a mask; 6
// where the mask comes from y, 4 where g is not wanted. Takes the sums that the gradients of
// weight, bias and mean need over g as it was rounded. A block leaves one partial row;
// cuda/finish_sums.cu adds the rows.
#include "cuda/finish_sums.h"
#include "cuda/walk.h"
#include "fusedres/bn_act.h"

namespace fusedres {

enum ResidualKind { kNoResidual, kTensorResidual, kNormalizedResidual };

template <class T, int kVector, int kResidual>
__global__ void __launch_bounds__(kThreads, 2) bn_act_fwd_kernel(BnActFwdParams p, Walk walk) {
  using Acc = acc_t<T>;
  using Pack = Packed<T, kVector>;
  constexpr int kUnroll = 4;
  const Strip<kVector> strip(walk);
  const T* const y = static_cast<const T*>(p.y);
  const T* const residual = static_cast<const T*>(p.residual);
  T* const a = static_cast<T*>(p.a);
  Acc mean[kVector], scale[kVector], bias[kVector];
  Acc res_mean[kVector], res_scale[kVector], res_bias[kVector];
  load_channels(strip, static_cast<const Acc*>(p.mean), mean);
  load_channels(strip, static_cast<const Acc*>(p.scale), scale);
  load_channels(strip, static_cast<const Acc*>(p.bias), bias);
  if constexpr (kResidual == kNormalizedResidual) {
    load_channels(strip, static_cast<const Acc*>(p.res_mean), res_mean);
    load_channels(strip, static_cast<const Acc*>(p.res_scale), res_scale);
    load_channels(strip, static_cast<const Acc*>(p.res_bias), res_bias);
  }
  const bool relu = p.relu;

  strip.template for_each_group_upwards<kUnroll>([&](int64_t row, auto count) {
    Pack ys[kUnroll];
    [[maybe_unused]] Pack rs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) continue;
      const int64_t at = strip.offset(row + u * walk.lanes);
      ys[u] = load_once(reinterpret_cast<const Pack*>(y + at));
      if constexpr (kResidual != kNoResidual) {
        rs[u] = load_once(reinterpret_cast<const Pack*>(residual + at));
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) continue;
      Acc values[kVector];
      [[maybe_unused]] Acc r[kVector];
      unpack(ys[u], values);
      if constexpr (kResidual != kNoResidual) unpack(rs[u], r);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        Acc value = (values[i] - mean[i]) * scale[i] + bias[i];
        if constexpr (kResidual == kTensorResidual) value += r[i];
        if constexpr (kResidual == kNormalizedResidual) {
          value += (r[i] - res_mean[i]) * res_scale[i] + res_bias[i];
        }
        values[i] = relu ? relu_gate(value, value) : value;
      }
      store(reinterpret_cast<Vector<T, kVector>*>(a + strip.offset(row + u * walk.lanes)),
            rounded<T, kVector>(values));
    }
  });
}

// kFromY: the mask is that of round(relu((y - mean)*scale + bias)), as bn_act_fwd makes it.
enum BackwardKind { kPlainBackward, kResidualBackward, kFromY };

template <class T, int kVector, int kKind>
__global__ void __launch_bounds__(kThreads, 2) bn_act_bwd_kernel(BnActBwdParams p, Walk walk) {
  using Acc = acc_t<T>;
  using Pack = Packed<T, kVector>;
  constexpr bool kResidual = kKind == kResidualBackward;
  constexpr int kUnroll = 2, kSums = kResidual ? 3 : 2;
  const Strip<kVector> strip(walk);
  const T* const grad = static_cast<const T*>(p.grad);
  const T* const extra = static_cast<const T*>(p.grad_extra);
  const T* const a = static_cast<const T*>(p.a);
  const T* const y = static_cast<const T*>(p.y);
  const T* const res_y = static_cast<const T*>(p.res_y);
  T* const g = static_cast<T*>(p.g);
  Acc mean[kVector], res_mean[kVector];
  load_channels(strip, static_cast<const Acc*>(p.mean), mean);
  if constexpr (kResidual) load_channels(strip, static_cast<const Acc*>(p.res_mean), res_mean);
  [[maybe_unused]] Acc scale[kVector], bias[kVector];
  if constexpr (kKind == kFromY) {
    load_channels(strip, static_cast<const Acc*>(p.scale), scale);
    load_channels(strip, static_cast<const Acc*>(p.bias), bias);
  }
  const bool writes = g != nullptr && (kKind == kFromY || a != nullptr || extra != nullptr);
  Acc sums[kSums * kVector] = {};

  // No __restrict__ and no read-only loads of grad: g may be grad itself.
  strip.template for_each_group<kUnroll>([&](int64_t row, auto count) {
    Pack grads[kUnroll], extras[kUnroll], as[kUnroll], ys[kUnroll];
    [[maybe_unused]] Pack rs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) continue;
      const int64_t at = strip.offset(row + u * walk.lanes);
      grads[u] = load_once(reinterpret_cast<const Pack*>(grad + at));
      if (extra != nullptr) extras[u] = load_once(reinterpret_cast<const Pack*>(extra + at));
      if (a != nullptr) as[u] = load_once(reinterpret_cast<const Pack*>(a + at));
      ys[u] = load(reinterpret_cast<const Pack*>(y + at));  // the next pass reads y again
      if constexpr (kResidual) rs[u] = load(reinterpret_cast<const Pack*>(res_y + at));
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) continue;
      Acc da[kVector], other[kVector];
      unpack(grads[u], da);
      if (extra != nullptr) {
        unpack(extras[u], other);
#pragma unroll
        for (int i = 0; i < kVector; ++i) da[i] += other[i];
      }
      if (a != nullptr) {  // rounding keeps zero, so the mask may come first
        unpack(as[u], other);
#pragma unroll
        for (int i = 0; i < kVector; ++i) da[i] = relu_gate(other[i], da[i]);
      }
      if constexpr (kKind == kFromY) {
        unpack(ys[u], other);
        mask_from_y<T>(other, mean, scale, bias, da);
      }
      const Vector<T, kVector> out = rounded<T, kVector>(da);
      if (writes) {
        store(reinterpret_cast<Vector<T, kVector>*>(g + strip.offset(row + u * walk.lanes)), out);
      }
      unpack(ys[u], other);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        da[i] = to_acc(out.values[i]);
        sums[i] += da[i];
        sums[kVector + i] += da[i] * (other[i] - mean[i]);
      }
      if constexpr (kResidual) {
        unpack(rs[u], other);
#pragma unroll
        for (int i = 0; i < kVector; ++i) sums[2 * kVector + i] += da[i] * (other[i] - res_mean[i]);
      }
    }
  });

  sum_lanes(strip, sums);
  if (strip.lane > 0 || !strip.active) return;
  Acc* const part = static_cast<Acc*>(p.workspace) + strip.part * kSums * walk.channels;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      part[k * walk.channels + strip.channel + i] = sums[k * kVector + i];
    }
  }
}

namespace {

template <class T, int kVector, int kResidual>
cudaError_t forward(const BnActFwdParams& p, const CudaTarget& target, LaunchConfig* config) {
  constexpr auto kKernel = bn_act_fwd_kernel<T, kVector, kResidual>;
  Walk walk;
  const cudaError_t status = fit_walk<kVector, kKernel, 0>(p.shape, target.device, &walk);
  if (status != cudaSuccess) return status;
  *config = {"bn_act_fwd", walk.blocks(), kThreads};
  return launch(kKernel, *config, target.stream, p, walk);
}

template <class T, int kVector, int kKind>
struct Backward {
  using Acc = acc_t<T>;
  static constexpr auto kKernel = bn_act_bwd_kernel<T, kVector, kKind>;
  static constexpr int kSums = kKind == kResidualBackward ? 3 : 2;
  static constexpr size_t kShared = kSums * kVector * kThreads * sizeof(Acc);

  static cudaError_t workspace(const BnActBwdParams& p, int device, int64_t* bytes) {
    Walk walk;
    const cudaError_t status = fit_walk<kVector, kKernel, kShared>(p.shape, device, &walk);
    *bytes = walk.chunks * kSums * p.shape.c * static_cast<int64_t>(sizeof(Acc));
    return status;
  }

  static cudaError_t run(const BnActBwdParams& p, const CudaTarget& target, LaunchConfig* config) {
    Walk walk;
    cudaError_t status = fit_walk<kVector, kKernel, kShared>(p.shape, target.device, &walk);
    if (status != cudaSuccess) return status;
    if (walk.chunks > 0) {
      *config = {"bn_act_bwd", walk.blocks(), kThreads, kShared};
      status = launch(kKernel, *config, target.stream, p, walk);
      if (status != cudaSuccess) return status;
    }
    return launch_finish_sums(static_cast<const Acc*>(p.workspace), walk.chunks, kSums, p.shape.c,
                              static_cast<Acc*>(p.sums), static_cast<Acc*>(p.res_sums),
                              target.stream, config);
  }
};

// Calls f with the Backward that runs these parameters.
template <class F>
cudaError_t dispatch_backward(const BnActBwdParams& p, const F& f) {
  return dispatch_cuda(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool vectors = takes_vectors<T>(p.shape, p.grad, p.grad_extra, p.a, p.y, p.res_y, p.g);
    return dispatch_vector<T>(vectors, [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      // By res_sums: an empty tensor has a null pointer too, and its sums are still to be written.
      if (p.res_sums != nullptr) return f(Backward<T, kVector, kResidualBackward>{});
      if (p.scale != nullptr) return f(Backward<T, kVector, kFromY>{});
      return f(Backward<T, kVector, kPlainBackward>{});
    });
  });
}

}  // namespace

cudaError_t launch_bn_act_fwd(const BnActFwdParams& p, const CudaTarget& target,
                              LaunchConfig* config) {
  if (p.shape.numel() == 0) return cudaSuccess;
  if (any_null(p.y, p.mean, p.scale, p.bias, p.a)) return cudaErrorInvalidValue;
  const DeviceGuard guard(target.device);
  if (guard.status() != cudaSuccess) return guard.status();
  return dispatch_cuda(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return dispatch_vector<T>(takes_vectors<T>(p.shape, p.y, p.residual, p.a), [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      if (p.residual == nullptr) return forward<T, kVector, kNoResidual>(p, target, config);
      if (p.res_mean == nullptr) return forward<T, kVector, kTensorResidual>(p, target, config);
      if (any_null(p.res_scale, p.res_bias)) return cudaErrorInvalidValue;
      return forward<T, kVector, kNormalizedResidual>(p, target, config);
    });
  });
}

cudaError_t launch_bn_act_bwd(const BnActBwdParams& p, const CudaTarget& target,
                              LaunchConfig* config) {
  if (p.shape.c == 0) return cudaSuccess;
  if (p.sums == nullptr) return cudaErrorInvalidValue;
  if (p.shape.numel() > 0) {
    if (any_null(p.grad, p.y, p.mean, p.workspace)) return cudaErrorInvalidValue;
    if ((p.scale == nullptr) != (p.bias == nullptr)) return cudaErrorInvalidValue;
    if (p.scale != nullptr && (p.a != nullptr || p.res_sums != nullptr)) {
      return cudaErrorInvalidValue;
    }
    if (p.res_sums != nullptr && any_null(p.res_y, p.res_mean)) return cudaErrorInvalidValue;
  }
  const DeviceGuard guard(target.device);
  if (guard.status() != cudaSuccess) return guard.status();
  return dispatch_backward(p, [&](auto backward) { return backward.run(p, target, config); });
}

cudaError_t bn_act_bwd_workspace(const BnActBwdParams& p, int device, int64_t* bytes) {
  *bytes = 0;
  if (p.shape.numel() == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  return dispatch_backward(p, [&](auto backward) { return backward.workspace(p, device, bytes); });
}

}  // namespace fusedres
