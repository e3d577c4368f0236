// A measured depth D against samples: what depth_loss and packed_depth_loss share.
#pragma once

#include <cmath>

#include "../math/depth_loss.h"
#include "rays.h"

namespace rayfuse {

// What is the same for all samples, computed on the host.
template <class A>
struct Constants {
  A sigma, eps;
  A curve, height;  // -1 / v and a
  A scale;          // 1 / sqrt(2 v)

  Constants(int64_t form, double sigma, double eps)
      : sigma(static_cast<A>(sigma)), eps(static_cast<A>(eps)) {
    const bool normal = DepthForm{form} != DepthForm::ds_nerf;
    curve = static_cast<A>(-1 / (normal ? sigma * sigma / 9 : sigma));
    height = static_cast<A>(normal ? 3 / (sigma * std::sqrt(2 * std::acos(-1.0))) : 1);
    scale = static_cast<A>(3 / (sigma * std::sqrt(2.0)));
  }
};

template <class A>
__device__ bool is_valid(A depth) {
  return depth > 0 && std::isfinite(depth);
}

// What one sample adds to the loss, and its derivatives.
template <DepthForm form, class A>
struct Sample {
  static constexpr bool urban = form == DepthForm::urban;
  A w, z, length, curve, eps, bell, error = 0;

  __device__ Sample(A w, A s, A length, A depth, const Constants<A>& c)
      : w(w),
        z(s - depth),
        length(length),
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
  __device__ A loss() const { return length * f(); }
  __device__ A d_w() const { return length * (urban ? 2 * error : -bell / (w + eps)); }
  __device__ A d_s() const {
    return length * ((urban ? -2 * error : minus_log()) * (curve * z * bell));
  }
  __device__ A d_lengths() const { return f(); }
};

// e = w - m with m the mass of the bell in the interval.
template <class A>
struct Sample<DepthForm::urban_mass, A> {
  A height, begin, end, error;  // the interval from the depth on, by the scale

  __device__ Sample(A w, A s, A length, A depth, const Constants<A>& c) : height(c.height) {
    const A start = s - length / 2;
    begin = (start - depth) * c.scale;
    end = (s + length / 2 - depth) * c.scale;
    const A mass = (std::erf(end) - std::erf(begin)) / 2;
    // a NaN is not behind
    error = start > depth + c.sigma ? A(0) : w - mass;
  }
  // by its height, as two products of one factor would differ where one is fused into a sum
  static __device__ A bell(A edge) { return std::exp(-edge * edge); }
  __device__ A loss() const { return error * error; }
  __device__ A d_w() const { return 2 * error; }
  __device__ A d_s() const { return -2 * height * error * (bell(end) - bell(begin)); }
  __device__ A d_lengths() const { return -height * error * (bell(end) + bell(begin)); }
};

// The length of a sample where none are given.
template <DepthForm form>
constexpr int kNoLength = form == DepthForm::urban_mass ? 0 : 1;

}  // namespace rayfuse
