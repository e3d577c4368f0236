// What the kernels of every backend compute in.
#pragma once

namespace rayfuse {

// The type that values of type T are computed in.
template <class T>
struct accumulator_of {
  using type = float;
};
template <>
struct accumulator_of<double> {
  using type = double;
};
template <class T>
using accumulator = typename accumulator_of<T>::type;

}  // namespace rayfuse
