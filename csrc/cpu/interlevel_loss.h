// What the interlevel losses of dense and of packed rays share once the bins are found.
#pragma once

#include "envelope.h"
#include "packed.h"
#include "prefetch.h"
#include "uncovered.h"

namespace rayfuse {
namespace {

// The loss of a ray of n samples, and the gradients of d_loss times that to their weights and
// bounds; the latter are 0 in a last register where there is no sample.
template <class T, class G>
accumulator<T> loss_and_slopes(const RaySamples& ray, accumulator<T> eps, accumulator<T> d_loss,
                               const T* w,                     // [P]
                               const accumulator<T>* w_outer,  // [n]
                               G* slope,                       // [P] or null
                               accumulator<T>* slope_outer) {  // [n + kLanes]
  using A = accumulator<T>;
  const int64_t n = ray.n;
  using Sums = doubles<kLanes<A>>;
  const A mean = d_loss / std::max<int64_t>(n, 1);
  Sums sums = {};
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    const vec<A> w_here = ray.load(w, i);
    const Uncovered<A> here(w_here, load_at(w_outer, i, n), w_here, eps);
    sums += __builtin_convertvector(here.r * here.u, Sums);
    if (slope) ray.store(slope, i, mean * (here.u * (2 - here.u)));
    store(slope_outer + i, -2 * mean * here.u);
  }
  double total = 0;
  for (int i = 0; i < kLanes<A>; ++i) total += sums[i];
  return static_cast<A>(total / std::max<int64_t>(n, 1));
}

// d_x = d_loss slope, of rays first..last.
template <class T, class Rays>
RAYFUSE_KERNEL void scale(int64_t first, int64_t last, const Rays& rays,
                          const accumulator<T>* d_loss,  // [R]
                          const accumulator<T>* slope,   // [P]
                          T* d_x) {                      // [P]
  using A = accumulator<T>;
  for (int64_t r = first; r < last; ++r) {
    const RaySamples ray{rays.begin(r), rays.begin(r + 1) - rays.begin(r), rays.begin(last)};
    for (int64_t k = 0; k < ray.n; k += kLanes<A>) {
      ray.store(d_x, k, d_loss[r] * ray.load(slope, k));
    }
  }
}

}  // namespace
}  // namespace rayfuse

#include "large_memory.h"
#include "registration.h"

namespace rayfuse {
namespace {

// The gradient of x, w or w_env, empty where bit i of `needs` is not set.
template <class Rays>
Tensor scaled(const Rays& rays, const Tensor& d_loss, const Tensor& slope, const Tensor& x,
              int64_t needs, int i) {
  Tensor d_x = large_gradient(x, needs, i);
  if (d_x.numel() == 0) return d_x;
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const A *d_loss_ptr = data<A>(d_loss), *slope_ptr = data<A>(slope);
    T* d_x_ptr = mutable_data<T>(d_x);
    rays.for_each_piece(1, [=](int64_t first, int64_t last) {
      scale(first, last, rays, d_loss_ptr, slope_ptr, d_x_ptr);
    });
  });
  return d_x;
}

}  // namespace
}  // namespace rayfuse
