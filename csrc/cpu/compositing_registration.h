// From tensors to element types, included after the kernels of a file.
#pragma once

#include "compositing.h"
#include "registration.h"

namespace rayfuse {

using MaybeTensor = std::optional<Tensor>;

// The element types: f's may be half of the others'.
template <class Call>
void dispatch_pair(const Tensor& t, const MaybeTensor& f, const Call& call) {
  dispatch(t, [&](auto type) {
    if constexpr (std::is_same_v<decltype(type), float>) {
      if (f && is_half(*f)) {
        if (f->scalar_type() == ScalarType::Half) return call(type, half{});
        return call(type, bfloat16{});
      }
    }
    call(type, type);
  });
}

}  // namespace rayfuse
