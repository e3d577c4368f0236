// 3-vectors that lie end to end in memory, kLanes of them at a time in 3 registers: lane l of
// register j holds component (j kLanes + l) % 3 of vector (j kLanes + l) / 3.
#pragma once

#include <algorithm>

#include "simd.h"

namespace rayfuse {

template <class A>
struct Triples {
  vec<A> part[3];
};

// f(0), f(1), f(2) as triples, inlined and unrolled; j is a constant.
template <class A, class F>
Triples<A> each_part(const F& f) {
  return {{f(std::integral_constant<int, 0>()), f(std::integral_constant<int, 1>()),
           f(std::integral_constant<int, 2>())}};
}

template <class A>
Triples<A> operator*(const Triples<A>& a, const Triples<A>& b) {
  return each_part<A>([&](int j) { return a.part[j] * b.part[j]; });
}

// The first n vectors at p, the others are 0.
template <class T, class A = accumulator<T>>
Triples<A> load_triples(const T* p, int64_t n) {
  constexpr int N = kLanes<A>;
  if (n >= N) return each_part<A>([&](int j) { return load(p + j * N); });
  return each_part<A>(
      [&](int j) { return load(p + j * N, std::clamp<int64_t>(3 * n - j * N, 0, N)); });
}
template <class T, class A = accumulator<T>>
void store_triples(T* p, const Triples<A>& x, int64_t n) {
  constexpr int N = kLanes<A>;
  for (int j = 0; j < 3; ++j) {
    if (n >= N) {
      store(p + j * N, x.part[j]);
    } else {
      store(p + j * N, x.part[j], std::clamp<int64_t>(3 * n - j * N, 0, N));
    }
  }
}

// Lane l of a, b or c for (first + l) % 3 = 0, 1 or 2.
template <int first, class V>
V take_turns(V a, V b, V c) {
  constexpr int n = kLanesOf<V>;
  return [&]<int... l>(std::integer_sequence<int, l...>) {
    const V ab = __builtin_shufflevector(a, b, ((first + l) % 3 == 1 ? n + l : l)...);
    return __builtin_shufflevector(ab, c, ((first + l) % 3 == 2 ? n + l : l)...);
  }(std::make_integer_sequence<int, n>());
}

// The vector (x, y, z) again and again.
template <class A>
Triples<A> repeat_triple(A x, A y, A z) {
  const vec<A> zero = {};
  return each_part<A>(
      [&](auto j) { return take_turns<j * kLanes<A>>(x + zero, y + zero, z + zero); });
}

// Each lane as often as the vector of that number has components.
template <class A>
Triples<A> expand(vec<A> x) {
  return each_part<A>([&](auto j) {
    return [&]<int... l>(std::integer_sequence<int, l...>) {
      return __builtin_shufflevector(x, x, ((j * kLanes<A> + l) / 3)...);
    }(std::make_integer_sequence<int, kLanes<A>>());
  });
}

// Component c of each vector; that of vector i is in lane (3 i + c) % kLanes.
template <int c, class A>
vec<A> component(const Triples<A>& x) {
  // the register that has component c in lane l is number j with (j kLanes + l) % 3 = c, and as
  // kLanes % 3 is 1 or 2, j = (c - l) kLanes % 3
  constexpr int step = kLanes<A> % 3;
  const vec<A>*p = x.part, a = p[c * step % 3], b = p[(c + 2) * step % 3],
        d = p[(c + 1) * step % 3];
  return take_turns<0>(a, b, d);
}

// Component c of vector i in lane i of register c, and back.
template <class A>
Triples<A> by_component(const Triples<A>& x) {
  return each_part<A>([&](auto c) {
    const vec<A> y = component<c>(x);
    return [&]<int... i>(std::integer_sequence<int, i...>) {
      return __builtin_shufflevector(y, y, ((3 * i + c) % kLanes<A>)...);
    }(std::make_integer_sequence<int, kLanes<A>>());
  });
}
template <class A>
Triples<A> by_vector(vec<A> x, vec<A> y, vec<A> z) {
  const Triples<A> xs = expand<A>(x), ys = expand<A>(y), zs = expand<A>(z);
  return each_part<A>(
      [&](auto j) { return take_turns<j * kLanes<A>>(xs.part[j], ys.part[j], zs.part[j]); });
}

// Lane i is the sum of the components of vector i.
template <class A>
vec<A> sum_components(const Triples<A>& x) {
  const vec<A> y = component<1>(x), z = component<2>(x);
  const vec<A> sum = component<0>(x) + window<1>(y, y) + window<2>(z, z);
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(sum, sum, (3 * i % kLanes<A>)...);
  }(std::make_integer_sequence<int, kLanes<A>>());
}

}  // namespace rayfuse
