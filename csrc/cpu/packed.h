// Packed rays: samples lie end to end, ray r has offsets[r] .. offsets[r+1] of them. One ray at a
// time, its samples along the lanes: rays beside it may have any other length.
#pragma once

#include "rays.h"

namespace rayfuse {

// Samples k.. of a ray of n; k may be -1. The lanes outside of the ray are 0.
template <class T>
vec<accumulator<T>> load_at(const T* ray, int64_t k, int64_t n) {
  if (k < 0) return shift_up<1>(load_at(ray, 0, n));
  return n - k < kLanes<accumulator<T>> ? load(ray + k, n - k) : load(ray + k);
}
template <class T>
void store_at(T* ray, int64_t k, int64_t n, vec<accumulator<T>> x) {
  n - k < kLanes<accumulator<T>> ? store(ray + k, x, n - k) : store(ray + k, x);
}

// The running sums of the lanes from the left or from the right: first inside each 128-bit lane,
// where values move faster, then from one to the next.
template <bool from_right, int places = 1, class V>
V inclusive_lanes(V x) {
  constexpr int K = 16 / sizeof(std::declval<V>()[0]);
  if constexpr (places < kLanesOf<V>) {
    const V step = places < K ? shift_inside<from_right ? -places : places>(x)
                              : carry_from<from_right ? -places / K : places / K>(x);
    return inclusive_lanes<from_right, 2 * places>(x + step);
  }
  return x;
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
    const auto [last, here] = sum_.template go_on<kEnd, 1>(inclusive_lanes<from_right>(x));
    const vec<A> before = from_right ? window<1>(here, last) : window<kLanes<A> - 1>(last, here);
    return {sum_.with_far(before), sum_.with_far(here)};
  }

 private:
  LevelledSum<A, long_rays> sum_;
};
template <class A, bool long_rays>
using LeftScan = Scan<A, long_rays, false>;
template <class A, bool long_rays>
using RightScan = Scan<A, long_rays, true>;

// The sum of all lanes.
template <class A, int places = kLanes<A> / 2>
A sum_lanes(vec<A> x) {
  if constexpr (places >= kRays<A>) return sum_lanes<A, places / 2>(x + shift_down<places>(x));
  if constexpr (places > 0) return sum_lanes<A, places / 2>(x + shift_inside<-places>(x));
  return x[0];
}

}  // namespace rayfuse
