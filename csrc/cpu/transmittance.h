// The light along rays of given densities: x_i = sigma_i dt_i, T_i = exp(-sum_{j<i} x_j),
// w_i = T_i (1 - exp(-x_i)), and the way back from gradients of w and T.
// T is the exponential of a sum before every few samples, and a product between them: exact
// however long the ray is, at little more than one exponential a sample.
#pragma once

#include <limits>

#include "explog.h"
#include "rays.h"

namespace rayfuse {

// sigma dt; a wall without width is nothing.
template <class A>
vec<A> optical_depth(vec<A> sigma, vec<A> width) {
  return (sigma > std::numeric_limits<A>::max()) & (width == 0) ? vec<A>{} : sigma * width;
}

// The gradient of a width from that of the depth; a wall stays one, however thick it is.
template <class A>
vec<A> d_width_of(vec<A> sigma, vec<A> d_depth) {
  return sigma > std::numeric_limits<A>::max() ? vec<A>{} : d_depth * sigma;
}

// The pass from the left, a block at a time.
template <class T, bool long_rays>
struct LightPass {
  using A = accumulator<T>;

  Rays<const T> sigma, t;
  int64_t S;
  bool opaque_background;
  LeftSum<A, long_rays> depth = {};
  Delay<A> t0_of{t.broadcast_at(0)};
  Block<A> t0 = {}, t1 = {};
  Block<A> density = {}, width = {};
  Block<A> light = {}, passed = {};  // T_i, T_{i+1}
  Block<A> w = {};

  void step(int64_t k) {
    constexpr int K = kRays<A>;
    const int64_t n = S - k;
    sigma.prefetch_next(k);
    t.prefetch_next(k);
    density = sigma.load_at(k, n);
    step_t(k);
    width = t1 - t0;
    Block<A> x =
        each_column<A>([&](int j) { return optical_depth<A>(density.column[j], width.column[j]); });
    if (opaque_background && n <= kLanes<A>) {
      for (int r = 0; r < K; ++r) {
        x.column[(n - 1) % K][(n - 1) / K * K + r] = std::numeric_limits<A>::infinity();
      }
    }
    vec<A> light_here = Decay<A>(depth.add(x).first.column[0]).passing;
    const auto sample = [&](int j) {
      const Decay<A> decay(x.column[j]);
      light.column[j] = light_here;
      w.column[j] = light_here * decay.stopped;
      passed.column[j] = light_here = light_here * decay.passing;
    };
    [&]<int... j>(std::integer_sequence<int, j...>) {
      (..., sample(j));
    }(std::make_integer_sequence<int, K>());
  }
  // The edges alone.
  void step_t(int64_t k) {
    t1 = t.load_at(k + 1, S - k);
    t0 = t0_of(t1);
  }
  // The light that reaches the background, of ray r in lane r.
  vec<A> background() const {
    vec<A> total = {};
    for (int r = 0; r < kRays<A>; ++r) total[r] = depth.total(r);
    return Decay<A>(total).passing;
  }
};

// What the pass from the left leaves for the way back.
template <class A>
struct KeptLight {
  Block<A> density, width, passed, w;

  template <class T, bool long_rays>
  void keep(const LightPass<T, long_rays>& pass, bool with_d_t) {
    if (with_d_t) pass.density.store_to(density);
    pass.width.store_to(width);
    pass.passed.store_to(passed);
    pass.w.store_to(w);
  }
};

// The pass from the right. d_passed_i is the gradient of T_{i+1} but for what w depends on it:
// d_x_i = (d_w_i - d_passed_i) T_{i+1} - sum_{j>i} (d_w_j w_j + d_passed_j T_{j+1}).
template <class A, bool long_rays>
struct LightGradients {
  RightSum<A, long_rays> behind = {};
  Block<A> d_density = {}, d_width = {};

  void step(const KeptLight<A>& kept, const Block<A>& d_w, const Block<A>& d_passed,
            bool with_d_t) {
    const Block<A> later = behind.add(d_w * kept.w + d_passed * kept.passed).first;
    const Block<A> d_x = (d_w - d_passed) * kept.passed - later;
    d_density = d_x * kept.width;
    if (!with_d_t) return;
    d_width =
        each_column<A>([&](int j) { return d_width_of<A>(kept.density.column[j], d_x.column[j]); });
  }
};

}  // namespace rayfuse
