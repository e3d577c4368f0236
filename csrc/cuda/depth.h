// A measured depth D against samples: what depth_loss and packed_depth_loss share.
#pragma once

#include <cmath>

#include "rays.h"

namespace rayfuse {

// What is the same for all samples, computed on the host.
template <class A>
struct Constants {
  A sigma, eps;
  A curve, height;  // -1 / v and a

  Constants(bool urban, double sigma, double eps)
      : sigma(static_cast<A>(sigma)),
        eps(static_cast<A>(eps)),
        curve(static_cast<A>(-1 / (urban ? sigma * sigma / 9 : sigma))),
        height(static_cast<A>(urban ? 3 / (sigma * std::sqrt(2 * std::acos(-1.0))) : 1)) {}
};

template <class A>
__device__ bool is_valid(A depth) {
  return depth > 0 && std::isfinite(depth);
}

// f of one sample and its derivatives.
template <bool urban, class A>
struct Sample {
  A w, z, curve, eps, bell, error = 0;

  __device__ Sample(A w, A s, A depth, const Constants<A>& c)
      : w(w),
        z(s - depth),
        curve(c.curve),
        eps(c.eps),
        bell(c.height * std::exp(A(0.5) * c.curve * z * z)) {
    if constexpr (urban) {
      // a NaN is neither before nor behind
      if (s < depth - c.sigma) bell = 0;
      error = s > depth + c.sigma ? A(0) : w - bell;
    }
  }
  __device__ A minus_log() const { return -std::log(w + eps); }
  __device__ A f() const { return urban ? error * error : minus_log() * bell; }
  __device__ A d_w() const { return urban ? 2 * error : -bell / (w + eps); }
  __device__ A d_s() const { return (urban ? -2 * error : minus_log()) * (curve * z * bell); }
};

}  // namespace rayfuse
