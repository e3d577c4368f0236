// From tensors of any element type to rows, included after the kernels of a file.
#pragma once

#include "ray_features.h"
#include "registration.h"

namespace rayfuse {

// Calls f with a value of the element type of x, which is computed in A.
template <class A, class F>
void dispatch_in(const Tensor& x, const F& f) {
  dispatch(x, [&](auto type) {
    if constexpr (std::is_same_v<accumulator<decltype(type)>, A>) f(type);
  });
}

template <class A>
RowReader<A> rows(const Tensor& x) {
  RowReader<A> out = {};
  dispatch_in<A>(x, [&](auto type) {
    using T = decltype(type);
    out = {data<T>(x), read_row<T>};
  });
  return out;
}

template <class A>
RowWriter<A> mutable_rows(const Tensor& x) {
  RowWriter<A> out = {};
  dispatch_in<A>(x, [&](auto type) {
    using T = decltype(type);
    out = {mutable_data<T>(x), write_row<T>};
  });
  return out;
}

}  // namespace rayfuse
