// A measured depth D against samples: what depth_loss and packed_depth_loss share.
#pragma once

#include <cmath>
#include <numbers>

#include "../math/depth_loss.h"
#include "explog.h"
#include "packed.h"

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

// kLanes samples of a ray: what each adds to the loss, and its derivatives.
template <DepthForm form, class T>
struct Samples {
  using A = accumulator<T>;
  static constexpr bool urban = form == DepthForm::urban;

  Samples(double sigma, double eps)
      : sigma(sigma),
        eps(eps),
        curve(-1 / (urban ? sigma * sigma / 9 : sigma)),
        height(urban ? 3 / (sigma * std::sqrt(2 * std::numbers::pi)) : 1) {}

  // n of which exist
  void load_at(const T* w, const T* s, const T* lengths, A depth, int64_t n) {
    w_here = rayfuse::load_at(w, 0, n);
    length = lengths ? rayfuse::load_at(lengths, 0, n) : ones<A>(n);
    const vec<A> s_here = rayfuse::load_at(s, 0, n);
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
  vec<A> loss() const { return length * f(); }
  vec<A> d_w() const {
    if constexpr (urban) return length * (2 * error);
    return length * (-bell / (w_here + eps));
  }
  vec<A> d_s() const {
    const vec<A> d_bell = curve * z * bell;
    if constexpr (urban) return length * (-2 * error * d_bell);
    return length * (minus_log() * d_bell);
  }
  vec<A> d_lengths() const { return f(); }

  A sigma, eps;
  A curve, height;  // -1 / v and a
  vec<A> w_here, z, length, bell, error;
};

// e = w - m with m the mass of the bell in the interval.
template <class T>
struct Samples<DepthForm::urban_mass, T> {
  using A = accumulator<T>;

  Samples(double sigma, double)
      : sigma(sigma),
        scale(3 / (sigma * std::numbers::sqrt2)),
        height(3 / (sigma * std::sqrt(2 * std::numbers::pi))) {}

  // n of which exist; the others are points, without a weight
  void load_at(const T* w, const T* s, const T* lengths, A depth, int64_t n) {
    const vec<A> s_here = rayfuse::load_at(s, 0, n);
    const vec<A> half = lengths ? A(0.5) * rayfuse::load_at(lengths, 0, n) : vec<A>{};
    const vec<A> start = s_here - half;
    begin = (start - depth) * scale;
    end = (s_here + half - depth) * scale;
    const vec<A> mass = A(0.5) * (erf_of<A>(end) - erf_of<A>(begin));
    // a NaN is not behind
    error = start > depth + sigma ? vec<A>{} : rayfuse::load_at(w, 0, n) - mass;
  }
  // by its height, as two products of one factor would differ where one is fused into a sum
  static vec<A> bell(vec<A> edge) { return exp_of_nonpositive<A>(-edge * edge); }
  vec<A> loss() const { return error * error; }
  vec<A> d_w() const { return 2 * error; }
  vec<A> d_s() const { return -2 * height * error * (bell(end) - bell(begin)); }
  vec<A> d_lengths() const { return -height * error * (bell(end) + bell(begin)); }

  A sigma;
  A scale, height;    // 1 / sqrt(2 v) and a
  vec<A> begin, end;  // of the interval, from the depth on, by that scale
  vec<A> error;
};

}  // namespace rayfuse
