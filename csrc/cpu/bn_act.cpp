// BatchNorm apply, residual add and ReLU on the CPU, in one pass each way.
//
// Forward: element by element. Reads y [and residual], writes a: 2 or 3 tensors of traffic where
// three separate passes would move 5 to 7. Nothing is saved beyond what the caller already holds.
// Backward: reads grad [grad_extra] [a] y [res_y], writes g, and in the same pass sums what the
// gradients of weight, bias and mean need, over g as it was rounded, so that the sums belong to the
// gradient that flows on. Split as cpu/reduction.h describes.
#include "fusedres/bn_act.h"

#include "common/dispatch.h"
#include "cpu/reduction.h"

namespace fusedres::FUSEDRES_CPU_LEVEL {
namespace {

template <class T, bool kRelu, bool kStream>
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

  const auto normed = [=](auto lanes, int64_t o, int64_t c) {
    using L = decltype(lanes);
    const auto centered = L::load(y + o) - L::channel(mean, c);
    return L::fma(centered, L::channel(scale, c), L::channel(bias, c));
  };
  const auto store = [=](auto lanes, int64_t o, auto u) {
    using L = decltype(lanes);
    const auto value = kRelu ? L::gate(u, u) : u;
    kStream ? L::stream(a + o, value) : L::store(a + o, value);
  };
  if (residual == nullptr) {
    elementwise<T>(p.shape, threads,
                   [=](auto lanes, int64_t o, int64_t c) { store(lanes, o, normed(lanes, o, c)); });
  } else if (res_mean == nullptr) {
    elementwise<T>(p.shape, threads, [=](auto lanes, int64_t o, int64_t c) {
      store(lanes, o, normed(lanes, o, c) + decltype(lanes)::load(residual + o));
    });
  } else {
    elementwise<T>(p.shape, threads, [=](auto lanes, int64_t o, int64_t c) {
      using L = decltype(lanes);
      const auto centered = L::load(residual + o) - L::channel(res_mean, c);
      const auto shortcut = L::fma(centered, L::channel(res_scale, c), L::channel(res_bias, c));
      store(lanes, o, normed(lanes, o, c) + shortcut);
    });
  }
}

enum class Mask { kNone, kActivation, kAffine };  // no ReLU; by a; by what a was computed from

template <class T, Mask kMask, bool kExtra, bool kResidual>
void bn_act_bwd(const BnActBwdParams& p, int threads) {
  using Acc = acc_t<T>;
  constexpr int kSums = kResidual ? 3 : 2;
  const T* const grad = static_cast<const T*>(p.grad);
  const T* const extra = static_cast<const T*>(p.grad_extra);
  const T* const a = static_cast<const T*>(p.a);
  const T* const y = static_cast<const T*>(p.y);
  const Acc* const mean = static_cast<const Acc*>(p.mean);
  const Acc* const scale = static_cast<const Acc*>(p.scale);
  const Acc* const bias = static_cast<const Acc*>(p.bias);
  const T* const res_y = static_cast<const T*>(p.res_y);
  const Acc* const res_mean = static_cast<const Acc*>(p.res_mean);
  T* const g = static_cast<T*>(p.g);
  double* const partials = static_cast<double*>(p.workspace);
  const int64_t channels = p.shape.c;
  const bool write = kExtra || kMask != Mask::kNone || g != grad;

  sum_stage1<kSums, T>(
      p.shape, threads, partials, [](const Tile&) {},
      [=](auto lanes, int64_t o, int64_t c) {
        using L = decltype(lanes);
        auto da = L::load(grad + o);
        const auto centered = L::load(y + o) - L::channel(mean, c);
        if constexpr (kExtra) da += L::load(extra + o);
        if constexpr (kMask == Mask::kActivation) da = L::gate(L::load(a + o), da);
        if constexpr (kMask == Mask::kAffine) {
          da = L::gate(L::fma(centered, L::channel(scale, c), L::channel(bias, c)), da);
        }
        if constexpr (kExtra) da = L::rounded(da);
        if (write) L::put(g + o, da);
        Factors<typename L::Values> factors{da, centered, {}};
        if constexpr (kResidual) factors.third = L::load(res_y + o) - L::channel(res_mean, c);
        return factors;
      });

  Acc* const sums = static_cast<Acc*>(p.sums);
  Acc* const res_sums = static_cast<Acc*>(p.res_sums);
  sum_stage2(partials, partial_rows(p.shape), kSums * channels, threads,
             [=](int64_t column, double value) {
               const Acc sum = static_cast<Acc>(value);
               if (column < 2 * channels) sums[column] = sum;
               if constexpr (kResidual) {
                 if (column < channels) res_sums[column] = sum;
                 if (column >= 2 * channels) res_sums[column - channels] = sum;
               }
             });
}

template <class F>
void dispatch_mask(const BnActBwdParams& p, const F& f) {
  if (p.scale != nullptr) return f(std::integral_constant<Mask, Mask::kAffine>{});
  if (p.a != nullptr) return f(std::integral_constant<Mask, Mask::kActivation>{});
  f(std::integral_constant<Mask, Mask::kNone>{});
}

}  // namespace

void launch_bn_act_fwd(const BnActFwdParams& params, int threads) {
  dispatch(params.dtype, [&](auto tag) {
    dispatch(params.relu, [&](auto relu) {
      using T = typename decltype(tag)::type;
      dispatch(streams(params.shape, static_cast<const T*>(params.a)), [&](auto stream) {
        bn_act_fwd<T, decltype(relu)::value, decltype(stream)::value>(params, threads);
      });
    });
  });
}

void launch_bn_act_bwd(const BnActBwdParams& params, int threads) {
  dispatch(params.dtype, [&](auto tag) {
    dispatch_mask(params, [&](auto mask) {
      dispatch(params.grad_extra != nullptr, [&](auto extra) {
        // By res_sums: an empty tensor has a null pointer too, and its sums are to be written.
        dispatch(params.res_sums != nullptr, [&](auto residual) {
          bn_act_bwd<typename decltype(tag)::type, decltype(mask)::value, decltype(extra)::value,
                     decltype(residual)::value>(params, threads);
        });
      });
    });
  });
}

}  // namespace fusedres::FUSEDRES_CPU_LEVEL
