// Packed rays: samples lie end to end, ray r has offsets[r] .. offsets[r+1] of them. One ray at a
// time, its samples along the lanes: rays beside it may have any other length.
#pragma once

#include "rays.h"

namespace rayfuse {

// Samples k.. of a ray, of which n exist; the others are 0.
template <class T>
vec<accumulator<T>> load_at(const T* ray, int64_t k, int64_t n) {
  return n < kLanes<accumulator<T>> ? load(ray + k, n) : load(ray + k);
}
template <class T>
void store_at(T* ray, int64_t k, int64_t n, vec<accumulator<T>> x) {
  n < kLanes<accumulator<T>> ? store(ray + k, x, n) : store(ray + k, x);
}

template <class A>
vec<A> broadcast(A x) {
  return x - vec<A>{};
}

// A running sum along a ray, a register at a time.
template <class A, bool long_rays, bool from_right>
class Scan {
 public:
  struct Sums {
    vec<A> before, including;
  };
  // Adds the next register: the sums before each of its samples, as the scan goes, and including
  // it.
  Sums add(vec<A> x) {
    constexpr int kEnd = from_right ? 0 : kLanes<A> - 1;
    const auto [last, here] = sum_.template go_on<kEnd, 1>(inclusive_lanes<1>(x));
    const vec<A> before = from_right ? window<1>(here, last) : window<kLanes<A> - 1>(last, here);
    return {sum_.with_far(before), sum_.with_far(here)};
  }

 private:
  template <int places>
  static vec<A> inclusive_lanes(vec<A> x) {
    if constexpr (places == kLanes<A>) return x;
    if constexpr (places < kLanes<A>) {
      return inclusive_lanes<2 * places>(
          x + (from_right ? shift_down<places>(x) : shift_up<places>(x)));
    }
  }
  LevelledSum<A, long_rays> sum_;
};
template <class A, bool long_rays>
using LeftScan = Scan<A, long_rays, false>;
template <class A, bool long_rays>
using RightScan = Scan<A, long_rays, true>;

// The sum of all lanes.
template <class A, int places = kLanes<A> / 2>
A sum_lanes(vec<A> x) {
  if constexpr (places > 0) return sum_lanes<A, places / 2>(x + shift_down<places>(x));
  return x[0];
}

}  // namespace rayfuse
