// BatchNorm apply with residual add and ReLU, and its backward, as functions of an element: what
// the light pass runs over a tensor, and a convolution over a chunk that a cache holds.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dispatch.h"
#include "cpu/lanes.h"
#include "cpu/reduction.h"
#include "fusedres/bn_act.h"

namespace fusedres::FUSEDRES_CPU_LEVEL {

// Calls body(value), value(lanes, offset, channel) being the activation before it is rounded.
template <class T, class Body>
void with_activation(const BnActFwdParams& p, const Body& body) {
  using Acc = acc_t<T>;
  const T* const y = static_cast<const T*>(p.y);
  const Acc* const mean = static_cast<const Acc*>(p.mean);
  const Acc* const scale = static_cast<const Acc*>(p.scale);
  const Acc* const bias = static_cast<const Acc*>(p.bias);
  const T* const residual = static_cast<const T*>(p.residual);
  const Acc* const res_mean = static_cast<const Acc*>(p.res_mean);
  const Acc* const res_scale = static_cast<const Acc*>(p.res_scale);
  const Acc* const res_bias = static_cast<const Acc*>(p.res_bias);
  const auto normed = [=](auto lanes, int64_t o, int64_t c) {
    using L = decltype(lanes);
    const auto centered = L::load(y + o) - L::channel(mean, c);
    return L::fma(centered, L::channel(scale, c), L::channel(bias, c));
  };
  dispatch(p.relu, [&](auto relu) {
    const auto gated = [=](auto lanes, auto u) {
      using L = decltype(lanes);
      return decltype(relu)::value ? L::gate(u, u) : u;
    };
    if (residual == nullptr) {
      body([=](auto lanes, int64_t o, int64_t c) { return gated(lanes, normed(lanes, o, c)); });
    } else if (res_mean == nullptr) {
      body([=](auto lanes, int64_t o, int64_t c) {
        return gated(lanes, normed(lanes, o, c) + decltype(lanes)::load(residual + o));
      });
    } else {
      body([=](auto lanes, int64_t o, int64_t c) {
        using L = decltype(lanes);
        const auto centered = L::load(residual + o) - L::channel(res_mean, c);
        const auto shortcut = L::fma(centered, L::channel(res_scale, c), L::channel(res_bias, c));
        return gated(lanes, normed(lanes, o, c) + shortcut);
      });
    }
  });
}

enum class Mask { kNone, kActivation, kAffine };  // no ReLU; by a; by what a was computed from

template <class F>
void dispatch_mask(const BnActBwdParams& p, const F& f) {
  if (p.scale != nullptr) return f(std::integral_constant<Mask, Mask::kAffine>{});
  if (p.a != nullptr) return f(std::integral_constant<Mask, Mask::kActivation>{});
  f(std::integral_constant<Mask, Mask::kNone>{});
}

// g of one element, which is written, and what it adds to the sums.
template <class T, Mask kMask, bool kExtra, bool kResidual>
struct GatedGradient {
  using Acc = acc_t<T>;
  static constexpr int kSums = kResidual ? 3 : 2;
  const T *grad, *extra, *a, *y, *res_y;
  const Acc *mean, *scale, *bias, *res_mean;
  T* g;
  bool write;

  explicit GatedGradient(const BnActBwdParams& p)
      : grad(static_cast<const T*>(p.grad)),
        extra(static_cast<const T*>(p.grad_extra)),
        a(static_cast<const T*>(p.a)),
        y(static_cast<const T*>(p.y)),
        res_y(static_cast<const T*>(p.res_y)),
        mean(static_cast<const Acc*>(p.mean)),
        scale(static_cast<const Acc*>(p.scale)),
        bias(static_cast<const Acc*>(p.bias)),
        res_mean(static_cast<const Acc*>(p.res_mean)),
        g(static_cast<T*>(p.g)),
        write(kExtra || kMask != Mask::kNone || g != grad) {}

  template <class L>
  FUSEDRES_HOST_DEVICE Factors<typename L::Values> operator()(L, int64_t o, int64_t c) const {
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
  }
};

// Calls body(gradient), a GatedGradient.
template <class T, class Body>
void with_gated_gradient(const BnActBwdParams& p, const Body& body) {
  dispatch_mask(p, [&](auto mask) {
    dispatch(p.grad_extra != nullptr, [&](auto extra) {
      // By res_sums: an empty tensor has a null pointer too, and its sums are to be written.
      dispatch(p.res_sums != nullptr, [&](auto residual) {
        body(GatedGradient<T, decltype(mask)::value, decltype(extra)::value,
                           decltype(residual)::value>(p));
      });
    });
  });
}

// Stage 2 of its sums.
template <class T, int kSums>
void settle_sums(const BnActBwdParams& p, const double* partials, int64_t blocks, int threads) {
  using Acc = acc_t<T>;
  const int64_t channels = p.shape.c;
  Acc* const sums = static_cast<Acc*>(p.sums);
  Acc* const res_sums = static_cast<Acc*>(p.res_sums);
  sum_stage2(partials, blocks, kSums * channels, threads, [=](int64_t column, double value) {
    const Acc sum = static_cast<Acc>(value);
    if (column < 2 * channels) sums[column] = sum;
    if constexpr (kSums == 3) {
      if (column < channels) res_sums[column] = sum;
      if (column >= 2 * channels) res_sums[column - channels] = sum;
    }
  });
}

}  // namespace fusedres::FUSEDRES_CPU_LEVEL
