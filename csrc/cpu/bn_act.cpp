// BatchNorm apply, residual add and ReLU on the CPU, in one pass each way.
//
// Forward: element by element. Reads y [and residual], writes a: 2 or 3 tensors of traffic where
// three separate passes would move 5 to 7. Nothing is saved beyond what the caller already holds.
// Backward: reads grad [grad_extra] [a] y [res_y], writes g, and in the same pass sums what the
// gradients of weight, bias and mean need, over g as it was rounded, so that the sums belong to the
// gradient that flows on. Split as common/reduction.h describes.
#include "fusedres/bn_act.h"

#include "common/activation.h"
#include "common/dispatch.h"
#include "common/reduction.h"

namespace fusedres {
namespace {

template <class T, bool kRelu>
void bn_act_fwd(const BnActFwdParams& p, int threads) {
  using Acc = acc_t<T>;
  const T* const y = static_cast<const T*>(p.y);
  const Acc* const mean = static_cast<const Acc*>(p.mean);
  const Acc* const scale = static_cast<const Acc*>(p.scale);
  const Acc* const bias = static_cast<const Acc*>(p.bias);
  const T* const residual = static_cast<const T*>(p.residual);
  const Acc* const res_mean = static_cast<const Acc*>(p.res_mean);
  const Acc* const res_scale = static_cast<const Acc*>(p.res_scale);
  const Acc* const res_bias = static_cast<const Acc*>(p.res_bias);
  T* const a = static_cast<T*>(p.a);

  const auto act = [](Acc u) {
    const T rounded = from_acc<T>(u);
    return kRelu ? relu_gate(u, rounded) : rounded;
  };
  const auto normed = [=](int64_t o, int64_t c) {
    return (to_acc(y[o]) - mean[c]) * scale[c] + bias[c];
  };
  if (residual == nullptr) {
    elementwise(p.shape, threads, [=](int64_t o, int64_t c) { a[o] = act(normed(o, c)); });
  } else if (res_mean == nullptr) {
    elementwise(p.shape, threads,
                [=](int64_t o, int64_t c) { a[o] = act(normed(o, c) + to_acc(residual[o])); });
  } else {
    elementwise(p.shape, threads, [=](int64_t o, int64_t c) {
      const Acc shortcut = (to_acc(residual[o]) - res_mean[c]) * res_scale[c] + res_bias[c];
      a[o] = act(normed(o, c) + shortcut);
    });
  }
}

template <class T, bool kMask, bool kExtra, bool kResidual>
void bn_act_bwd(const BnActBwdParams& p, int threads) {
  using Acc = acc_t<T>;
  constexpr int kSums = kResidual ? 3 : 2;
  const T* const grad = static_cast<const T*>(p.grad);
  const T* const extra = static_cast<const T*>(p.grad_extra);
  const T* const a = static_cast<const T*>(p.a);
  const T* const y = static_cast<const T*>(p.y);
  const Acc* const mean = static_cast<const Acc*>(p.mean);
  const T* const res_y = static_cast<const T*>(p.res_y);
  const Acc* const res_mean = static_cast<const Acc*>(p.res_mean);
  T* const g = static_cast<T*>(p.g);
  double* const workspace = static_cast<double*>(p.workspace);

  sum_stage1<kSums, Acc>(
      p.shape, threads, workspace, [](const Tile&) {},
      [=](int64_t o, int64_t c) {
        Acc da = to_acc(grad[o]);
        if constexpr (kExtra) da += to_acc(extra[o]);
        if constexpr (kExtra || kMask) {
          T rounded = from_acc<T>(da);
          if constexpr (kMask) rounded = relu_gate(to_acc(a[o]), rounded);
          g[o] = rounded;
          da = to_acc(rounded);
        }
        Terms<Acc> terms{da, da * (to_acc(y[o]) - mean[c])};
        if constexpr (kResidual) terms.third = da * (to_acc(res_y[o]) - res_mean[c]);
        return terms;
      });

  const int64_t channels = p.shape.c;
  Acc* const sums = static_cast<Acc*>(p.sums);
  Acc* const res_sums = static_cast<Acc*>(p.res_sums);
  sum_stage2(workspace, partial_rows(p.shape), kSums * channels, threads,
             [=](int64_t column, double value) {
               const Acc sum = static_cast<Acc>(value);
               if (column < 2 * channels) sums[column] = sum;
               if constexpr (kResidual) {
                 if (column < channels) res_sums[column] = sum;
                 if (column >= 2 * channels) res_sums[column - channels] = sum;
               }
             });
}

}  // namespace

void launch_bn_act_fwd(const BnActFwdParams& params, int threads) {
  dispatch(params.dtype, [&](auto tag) {
    dispatch(params.relu, [&](auto relu) {
      bn_act_fwd<typename decltype(tag)::type, decltype(relu)::value>(params, threads);
    });
  });
}

void launch_bn_act_bwd(const BnActBwdParams& params, int threads) {
  dispatch(params.dtype, [&](auto tag) {
    // By res_sums: an empty tensor has a null pointer too, and its sums are still to be written.
    dispatch(params.a != nullptr, [&](auto mask) {
      dispatch(params.grad_extra != nullptr, [&](auto extra) {
        dispatch(params.res_sums != nullptr, [&](auto residual) {
          bn_act_bwd<typename decltype(tag)::type, decltype(mask)::value, decltype(extra)::value,
                     decltype(residual)::value>(params, threads);
        });
      });
    });
  });
}

}  // namespace fusedres
