// Losses of a measured depth D of packed rays: L = sum_i l_i f_i + (D - D_pred)^2 with z = s - D
// and a bell K = a exp(-z^2 / (2 v)). DS-NeRF: a = 1, v = sigma, f = -log(w + eps) K. Urban
// Radiance Fields: v = (sigma / 3)^2, a = 1 / sqrt(2 pi v), f = e^2 with e = w - K within sigma of
// D, w before it and 0 behind. One thread owns a ray and goes over it once, forward and backward:
// d_w = -l K / (w + eps), or 2 l e; d_s = l log(w + eps) K z / v, or 2 l e K z / v near D.
// By mass: e = w - m, m the integral of K over the interval s -+ l / 2; no l (depth.h).
// A ray without a depth is not read. Deng et al. (2022), Rematas et al. (2022); docs/depth.md.
#include "depth.h"
#include "packed.h"

namespace rayfuse {
namespace {

// Rays first..last.
template <DepthForm form, class T>
RAYFUSE_KERNEL void losses(int64_t first, int64_t last, double sigma, double eps,
                           const T* w,              // [P]
                           const T* s,              // [P]
                           const T* depth,          // [R]
                           const int64_t* offsets,  // [R+1]
                           const T* lengths,        // [P] or null
                           const T* depth_pred,     // [R] or null
                           accumulator<T>* loss) {  // [R]
  using A = accumulator<T>;
  Samples<form, T> here(sigma, eps);
  for (int64_t r = first; r < last; ++r) {
    const A D = widen(depth[r]);
    loss[r] = 0;
    if (!is_valid(D)) continue;
    LevelledSum<A, true> sum;
    for (int64_t k = offsets[r]; k < offsets[r + 1]; k += kLanes<A>) {
      here.load_at(w + k, s + k, lengths ? lengths + k : nullptr, D, offsets[r + 1] - k);
      sum.add(here.loss());
    }
    const A off = depth_pred ? D - widen(depth_pred[r]) : A(0);
    loss[r] = sum_lanes<A>(sum.total()) + off * off;
  }
}

// Rays first..last.
template <DepthForm form, class T>
RAYFUSE_KERNEL void gradients(int64_t first, int64_t last, double sigma, double eps,
                              const accumulator<T>* d_loss,  // [R]
                              const T* w,                    // [P]
                              const T* s,                    // [P]
                              const T* depth,                // [R]
                              const int64_t* offsets,        // [R+1]
                              const T* lengths,              // [P] or null
                              const T* depth_pred,           // [R] or null
                              T* d_w,                        // [P] or null
                              T* d_s,                        // [P] or null
                              T* d_lengths,                  // [P] or null
                              T* d_depth_pred) {             // [R] or null
  using A = accumulator<T>;
  Samples<form, T> here(sigma, eps);
  for (int64_t r = first; r < last; ++r) {
    const A D = widen(depth[r]), g = d_loss[r];
    const bool valid = is_valid(D);
    const RaySamples ray = RaySamples::of(offsets, r, last);
    for (int64_t k = 0; k < ray.n; k += kLanes<A>) {
      const int64_t i = ray.begin + k;
      if (valid) here.load_at(w + i, s + i, lengths ? lengths + i : nullptr, D, ray.n - k);
      if (d_w) ray.store(d_w, k, valid ? g * here.d_w() : vec<A>{});
      if (d_s) ray.store(d_s, k, valid ? g * here.d_s() : vec<A>{});
      if (d_lengths) ray.store(d_lengths, k, valid ? g * here.d_lengths() : vec<A>{});
    }
    if (d_depth_pred) {
      d_depth_pred[r] = narrow<T>(valid ? 2 * g * (widen(depth_pred[r]) - D) : A(0));
    }
  }
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& w, const Tensor& s, const Tensor& depth, const Tensor& offsets,
           const std::optional<Tensor>& lengths, const std::optional<Tensor>& depth_pred,
           int64_t form, double sigma, double eps) {
  const PackedRays rays("packed_depth_loss", offsets, w.numel());
  Tensor loss = empty(w, {rays.R}, accumulator_dtype(w));
  dispatch(w, [&](auto type) {
    using T = decltype(type);
    const T *w_ptr = data<T>(w), *s_ptr = data<T>(s), *depth_ptr = data<T>(depth),
            *lengths_ptr = data<T>(lengths), *depth_pred_ptr = data<T>(depth_pred);
    auto* loss_ptr = mutable_data<accumulator<T>>(loss);
    rays.for_each_piece([=](int64_t first, int64_t last) {
      as_form(form, [=](auto form_) {
        losses<form_>(first, last, sigma, eps, w_ptr, s_ptr, depth_ptr, rays.offsets, lengths_ptr,
                      depth_pred_ptr, loss_ptr);
      });
    });
  });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& w,
                                               const Tensor& s, const Tensor& depth,
                                               const Tensor& offsets,
                                               const std::optional<Tensor>& lengths,
                                               const std::optional<Tensor>& depth_pred,
                                               int64_t form, double sigma, double eps,
                                               int64_t needs) {
  const PackedRays rays("packed_depth_loss", offsets, w.numel());
  Tensor d_w = empty_gradient(w, needs, 0), d_s = empty_gradient(s, needs, 1);
  Tensor d_lengths = empty_gradient(lengths, w, needs, 2);
  Tensor d_depth_pred = empty_gradient(depth_pred, w, needs, 3);
  dispatch(w, [&](auto type) {
    using T = decltype(type);
    const auto* d_loss_ptr = data<accumulator<T>>(d_loss);
    const T *w_ptr = data<T>(w), *s_ptr = data<T>(s), *depth_ptr = data<T>(depth),
            *lengths_ptr = data<T>(lengths), *depth_pred_ptr = data<T>(depth_pred);
    T *d_w_ptr = mutable_data<T>(d_w), *d_s_ptr = mutable_data<T>(d_s),
      *d_lengths_ptr = mutable_data<T>(d_lengths),
      *d_depth_pred_ptr = mutable_data<T>(d_depth_pred);
    rays.for_each_piece([=](int64_t first, int64_t last) {
      as_form(form, [=](auto form_) {
        gradients<form_>(first, last, sigma, eps, d_loss_ptr, w_ptr, s_ptr, depth_ptr, rays.offsets,
                         lengths_ptr, depth_pred_ptr, d_w_ptr, d_s_ptr, d_lengths_ptr,
                         d_depth_pred_ptr);
      });
    });
  });
  return {d_w, d_s, d_lengths, d_depth_pred};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_depth_loss", TORCH_BOX(&fwd));
  m.impl("packed_depth_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
