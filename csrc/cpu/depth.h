// A measured depth D against samples: what depth_loss and packed_depth_loss share.
#pragma once

#include <cmath>
#include <numbers>

#include "explog.h"
#include "rays.h"

namespace rayfuse {

template <class A>
bool is_valid(A depth) {
  return depth > 0 && depth <= std::numeric_limits<A>::max();
}

// The first n lanes are 1, the others 0.
template <class A>
vec<A> ones(int64_t n) {
  const vec<A> one = A(1) - vec<A>{};
  if (n >= kLanes<A>) return one;
  A lanes[kLanes<A>];
  store(lanes, one);
  return load(lanes, n);
}

// kLanes samples of a ray.
template <bool urban, class T>
struct Samples {
  using A = accumulator<T>;

  Samples(double sigma, double eps)
      : sigma(sigma),
        eps(eps),
        curve(-1 / (urban ? sigma * sigma / 9 : sigma)),
        height(urban ? 3 / (sigma * std::sqrt(2 * std::numbers::pi)) : 1) {}

  // n of which exist
  void load_at(const T* w, const T* s, const T* lengths, A depth, int64_t n) {
    const auto get = [n](const T* p) { return n < kLanes<A> ? load(p, n) : load(p); };
    w_here = get(w);
    length = lengths ? get(lengths) : ones<A>(n);
    const vec<A> s_here = get(s);
    z = s_here - depth;
    bell = height * exp_of_nonpositive<A>(A(0.5) * curve * z * z);
    if constexpr (urban) {
      // a NaN is neither before nor behind
      bell = s_here < depth - sigma ? vec<A>{} : bell;
      error = s_here > depth + sigma ? vec<A>{} : w_here - bell;
    }
  }
  vec<A> minus_log() const { return -log_of<A>(w_here + eps); }
  vec<A> f() const {
    if constexpr (urban) return error * error;
    return minus_log() * bell;
  }
  vec<A> d_w() const {
    if constexpr (urban) return 2 * error;
    return -bell / (w_here + eps);
  }
  vec<A> d_s() const {
    const vec<A> d_bell = curve * z * bell;
    if constexpr (urban) return -2 * error * d_bell;
    return minus_log() * d_bell;
  }

  A sigma, eps;
  A curve, height;  // -1 / v and a
  vec<A> w_here, z, length, bell, error;
};

}  // namespace rayfuse
