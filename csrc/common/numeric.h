// Storage types and the type each is computed in.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/activation.h"

namespace fusedres {

// Plain integer arithmetic, so that loops over it vectorise on any CPU.
struct BFloat16 {
  uint16_t bits;
};

// IEEE half precision; its conversions are the device's own (cuda/device.h).
struct Float16 {
  uint16_t bits;
};

FUSEDRES_HOST_DEVICE float to_acc(float x) { return x; }
FUSEDRES_HOST_DEVICE double to_acc(double x) { return x; }
FUSEDRES_HOST_DEVICE float to_acc(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
using acc_t = decltype(to_acc(T{}));

// Rounds to the storage type.
template <class T>
FUSEDRES_HOST_DEVICE T from_acc(acc_t<T> x) {
  return x;
}

// To nearest, ties to even. The carry out of a NaN's payload could reach infinity, or the sign, so
// NaN becomes the quiet one.
template <>
FUSEDRES_HOST_DEVICE BFloat16 from_acc<BFloat16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}

FUSEDRES_HOST_DEVICE BFloat16 zero_if(bool condition, BFloat16 x) {
  return {static_cast<uint16_t>(x.bits & (static_cast<uint32_t>(condition) - 1u))};
}

}  // namespace fusedres
