// From tensors of any element type to values, included after the kernels of a file.
#pragma once

#include "ray_features.h"
#include "registration.h"

namespace rayfuse {

inline Element element(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return Element::kDouble;
    case ScalarType::Half:
      return Element::kHalf;
    case ScalarType::BFloat16:
      return Element::kBfloat16;
    default:
      return Element::kFloat;
  }
}
inline Values values(const Tensor& x) { return {x.const_data_ptr(), element(x)}; }
inline MutableValues mutable_values(const Tensor& x) { return {mutable_data<void>(x), element(x)}; }

}  // namespace rayfuse
