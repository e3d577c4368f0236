// Packed rays: samples lie end to end, ray r has offsets[r] .. offsets[r+1] of them. One ray at a
// time, its samples along the lanes: rays beside it may have any other length.
#pragma once

#include "rays.h"

namespace rayfuse {

// Samples k.. of a ray of n. The lanes behind the ray are 0.
template <class T>
vec<accumulator<T>> load_at(const T* ray, int64_t k, int64_t n) {
  return n - k < kLanes<accumulator<T>> ? load(ray + k, n - k) : load(ray + k);
}

// The samples of a ray in arrays of all samples, of which a thread takes those up to `end`, a ray
// after the other.
struct RaySamples {
  int64_t begin, n, end;

  // Those of packed ray r, of rays up to `last`.
  static RaySamples of(const int64_t* offsets, int64_t r, int64_t last) {
    return {offsets[r], offsets[r + 1] - offsets[r], offsets[last]};
  }

  template <class A>
  int64_t registers() const {
    return (n + kLanes<A> - 1) / kLanes<A>;
  }
  template <class T>
  vec<accumulator<T>> load(const T* p, int64_t k) const {
    return load_at(p + begin, k, n);
  }
  // The empty lanes go to the rays behind, which are stored later: where a ray ends would be a
  // branch, and a masked store.
  template <class T>
  void store(T* p, int64_t k, vec<accumulator<T>> x) const {
    T* const to = p + begin + k;
    end - begin - k < kLanes<accumulator<T>> ? rayfuse::store(to, x, n - k) : rayfuse::store(to, x);
  }
};

// x with `value` in lane n - 1 - k, where the last sample of a ray of n lies if it is among k.. .
template <class A>
vec<A> with_last(vec<A> x, int64_t k, int64_t n, A value) {
  if (n - k > kLanes<A>) return x;
  return lane_numbers<A>() == static_cast<index_of<A>::integer>(n - 1 - k) ? broadcast(value) : x;
}
// x with ones in the lanes outside of a ray of n.
template <class A>
vec<A> with_ones(vec<A> x, int64_t k, int64_t n) {
  if (n - k >= kLanes<A>) return x;
  return lane_numbers<A>() < static_cast<index_of<A>::integer>(n - k) ? x : broadcast<A>(1);
}

// Calls f(k) for the registers of a ray of n samples, from the left or from the right.
template <class A, bool from_right, class F>
void for_each_register(int64_t n, const F& f) {
  const int64_t end = (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  for (int64_t k = 0; k < end; k += kLanes<A>) f(from_right ? end - kLanes<A> - k : k);
}

// The lanes so many places before, as a scan goes, or the last one of a 128-bit lane so many places
// before: values move faster inside each 128-bit lane. Zeros come in.
template <bool from_right, int places, class V>
V earlier_lanes(V x) {
  constexpr int K = 16 / sizeof(std::declval<V>()[0]);
  if constexpr (places < K) return shift_inside<from_right ? -places : places>(x);
  if constexpr (places >= K) return carry_from<from_right ? -places / K : places / K>(x);
}
// x times the factors so many places before, where there are any.
template <bool from_right, int places, class V>
V times_earlier(V x) {
  constexpr int n = kLanesOf<V>, K = 16 / sizeof(std::declval<V>()[0]);
  constexpr auto has_one = [](int lane) -> uint32_t {
    const int at = places < K ? lane % K : lane / K, step = places < K ? places : places / K;
    return from_right ? at + step < (places < K ? K : n / K) : at >= step;
  };
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return select_lanes<((has_one(i) << i) | ...)>(x * earlier_lanes<from_right, places>(x), x);
  }(std::make_integer_sequence<int, n>());
}

// The running sums of the lanes from the left or from the right.
template <bool from_right, int places = 1, class V>
V inclusive_lanes(V x) {
  if constexpr (places < kLanesOf<V>) {
    return inclusive_lanes<from_right, 2 * places>(x + earlier_lanes<from_right, places>(x));
  }
  return x;
}

// What a scan gives each sample: all before it, as the scan goes, and with it.
template <class A>
struct Scanned {
  vec<A> before, including;
};

// The last lane of a register as the scan goes, in all lanes; and a register one sample late.
template <bool from_right, class V>
V last_lane(V x) {
  return repeat<from_right ? 0 : kLanesOf<V> - 1, 1>(x);
}
template <bool from_right, class V>
V delayed(V last, V x) {
  return from_right ? window<1>(x, last) : window<kLanesOf<V> - 1>(last, x);
}

// A running sum along a ray, a register at a time.
template <class A, bool long_rays, bool from_right>
class Scan {
 public:
  Scanned<A> add(vec<A> x) {
    constexpr int kEnd = from_right ? 0 : kLanes<A> - 1;
    const auto [last, here] = sum_.template go_on<kEnd, 1>(inclusive_lanes<from_right>(x));
    return {sum_.with_far(delayed<from_right>(last, here)), sum_.with_far(here)};
  }

 private:
  LevelledSum<A, long_rays> sum_;
};
template <class A, bool long_rays>
using LeftScan = Scan<A, long_rays, false>;
template <class A, bool long_rays>
using RightScan = Scan<A, long_rays, true>;

// y -> a y + b, one sample after the other along a ray, a register at a time.
template <class A, bool from_right>
class Chain {
 public:
  explicit Chain(A first) : y_(broadcast(first)) {}

  Scanned<A> add(vec<A> a, vec<A> b) {
    const vec<A> last = last_lane<from_right>(y_);
    y_ = inclusive<1>(a, b, last);
    return {delayed<from_right>(last, y_), y_};
  }

 private:
  template <int places>
  static vec<A> inclusive(vec<A> a, vec<A> b, vec<A> last) {
    if constexpr (places < kLanes<A>) {
      return inclusive<2 * places>(times_earlier<from_right, places>(a),
                                   b + a * earlier_lanes<from_right, places>(b), last);
    }
    return b + a * last;
  }
  vec<A> y_;
};

// A running product likewise.
template <class A, bool from_right>
class Product {
 public:
  Scanned<A> add(vec<A> x) {
    const vec<A> last = last_lane<from_right>(product_);
    product_ = inclusive<1>(x) * last;
    return {delayed<from_right>(last, product_), product_};
  }

 private:
  template <int places>
  static vec<A> inclusive(vec<A> x) {
    if constexpr (places < kLanes<A>) {
      return inclusive<2 * places>(times_earlier<from_right, places>(x));
    }
    return x;
  }
  vec<A> product_ = broadcast<A>(1);
};

}  // namespace rayfuse
