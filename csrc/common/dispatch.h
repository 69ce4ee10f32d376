// From run-time values to template parameters: dispatch(value, [&](auto tag) { ... }).
#pragma once

#include <stdexcept>
#include <type_traits>

#include "common/numeric.h"
#include "fusedres/types.h"

namespace fusedres {

template <class T>
struct Tag {
  using type = T;
};

template <class F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Tag<float>{});
    case DType::kBFloat16:
      return f(Tag<BFloat16>{});
    case DType::kFloat64:
      return f(Tag<double>{});
    case DType::kFloat16:
      throw std::invalid_argument("float16 has no CPU kernels; float32, bfloat16 and float64 do");
  }
  throw std::invalid_argument("unknown dtype code");
}

template <class F>
void dispatch(bool flag, const F& f) {
  if (flag) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

}  // namespace fusedres
