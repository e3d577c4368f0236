// The choice of element types where an input may be narrow beside float32, included after the
// kernels of a file.
#pragma once

#include "common.h"

#include <type_traits>

namespace rayfuse {

// Calls f with values of the element types of x and of one that may be narrow.
template <class F>
void dispatch_beside(const Tensor& x, const Tensor& narrow, const F& f) {
  dispatch(x, [&](auto type) {
    dispatch(narrow, [&](auto narrow_type) {
      using T = decltype(type);
      using N = decltype(narrow_type);
      if constexpr (std::is_same_v<T, N> || (std::is_same_v<T, float> && sizeof(N) == 2)) {
        f(type, narrow_type);
      }
    });
  });
}

}  // namespace rayfuse
