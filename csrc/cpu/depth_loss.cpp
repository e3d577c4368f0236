// Losses of a measured depth D: L = sum_i l_i f_i + (D - D_pred)^2 with z = s - D and a bell
// K = a exp(-z^2 / (2 v)). DS-NeRF: a = 1, v = sigma, f = -log(w + eps) K. Urban Radiance Fields:
// v = (sigma / 3)^2, a = 1 / sqrt(2 pi v), f = e^2 with e = w - K within sigma of D, w before it
// and 0 behind. One thread owns a few rays and goes over each once, forward and backward:
// d_w = -l K / (w + eps), or 2 l e; d_s = l log(w + eps) K z / v, or 2 l e K z / v near D.
// By mass: e = w - m, m the integral of K over the interval s -+ l / 2; no l (depth.h).
// A ray without a depth is not read. Deng et al. (2022), Rematas et al. (2022); docs/depth.md.
#include "depth.h"

namespace rayfuse {
namespace {

// Rays begin..end.
template <DepthForm form, class T>
RAYFUSE_KERNEL void losses(int64_t begin, int64_t end, int64_t S, double sigma, double eps,
                           const T* w,              // [R, S]
                           const T* s,              // [R, S]
                           const T* depth,          // [R]
                           const T* lengths,        // [R, S] or null
                           const T* depth_pred,     // [R] or null
                           accumulator<T>* loss) {  // [R]
  using A = accumulator<T>;
  Samples<form, T> here(sigma, eps);
  for (int64_t r = begin; r < end; r += kRays<A>) {
    const int count = std::min<int64_t>(kRays<A>, end - r);
    Block<A> sums = {};
    vec<A> off = {};
    for (int i = 0; i < count; ++i) {
      const A D = widen(depth[r + i]);
      if (!is_valid(D)) continue;
      LevelledSum<A, true> sum;
      for (int64_t k = 0; k < S; k += kLanes<A>) {
        const int64_t at = (r + i) * S + k;
        here.load_at(w + at, s + at, lengths ? lengths + at : nullptr, D, S - k);
        sum.add(here.loss());
      }
      sums.column[i] = sum.total();
      if (depth_pred) off[i] = D - widen(depth_pred[r + i]);
    }
    store(loss + r, sum_rows(sums) + off * off, count);
  }
}

// Rays begin..end.
template <DepthForm form, class T>
RAYFUSE_KERNEL void gradients(int64_t begin, int64_t end, int64_t S, double sigma, double eps,
                              const accumulator<T>* d_loss,  // [R]
                              const T* w,                    // [R, S]
                              const T* s,                    // [R, S]
                              const T* depth,                // [R]
                              const T* lengths,              // [R, S] or null
                              const T* depth_pred,           // [R] or null
                              T* d_w,                        // [R, S] or null
                              T* d_s,                        // [R, S] or null
                              T* d_lengths,                  // [R, S] or null
                              T* d_depth_pred) {             // [R] or null
  using A = accumulator<T>;
  Samples<form, T> here(sigma, eps);
  const auto put = [](T* to, vec<A> x, int64_t n) {
    n < kLanes<A> ? store(to, x, n) : store(to, x);
  };
  for (int64_t r = begin; r < end; ++r) {
    const A D = widen(depth[r]), g = d_loss[r];
    const bool valid = is_valid(D);
    for (int64_t k = 0; k < S; k += kLanes<A>) {
      const int64_t at = r * S + k;
      if (valid) here.load_at(w + at, s + at, lengths ? lengths + at : nullptr, D, S - k);
      if (d_w) put(d_w + at, valid ? g * here.d_w() : vec<A>{}, S - k);
      if (d_s) put(d_s + at, valid ? g * here.d_s() : vec<A>{}, S - k);
      if (d_lengths) put(d_lengths + at, valid ? g * here.d_lengths() : vec<A>{}, S - k);
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

Tensor fwd(const Tensor& w, const Tensor& s, const Tensor& depth,
           const std::optional<Tensor>& lengths, const std::optional<Tensor>& depth_pred,
           int64_t form, double sigma, double eps) {
  const int64_t S = w.size(-1);
  Tensor loss = empty(w, leading_sizes(w, 1), accumulator_dtype(w));
  dispatch(w, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const T *w_ptr = data<T>(w), *s_ptr = data<T>(s), *depth_ptr = data<T>(depth),
            *lengths_ptr = data<T>(lengths), *depth_pred_ptr = data<T>(depth_pred);
    A* loss_ptr = mutable_data<A>(loss);
    for_rays<A>(loss.numel(), S, [=](int64_t begin, int64_t end) {
      as_form(form, [=](auto form_) {
        losses<form_>(begin, end, S, sigma, eps, w_ptr, s_ptr, depth_ptr, lengths_ptr,
                      depth_pred_ptr, loss_ptr);
      });
    });
  });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& w,
                                               const Tensor& s, const Tensor& depth,
                                               const std::optional<Tensor>& lengths,
                                               const std::optional<Tensor>& depth_pred,
                                               int64_t form, double sigma, double eps,
                                               int64_t needs) {
  const int64_t S = w.size(-1);
  Tensor d_w = empty_gradient(w, needs, 0), d_s = empty_gradient(s, needs, 1);
  Tensor d_lengths = empty_gradient(lengths, w, needs, 2);
  Tensor d_depth_pred = empty_gradient(depth_pred, w, needs, 3);
  dispatch(w, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const A* d_loss_ptr = data<A>(d_loss);
    const T *w_ptr = data<T>(w), *s_ptr = data<T>(s), *depth_ptr = data<T>(depth),
            *lengths_ptr = data<T>(lengths), *depth_pred_ptr = data<T>(depth_pred);
    T *d_w_ptr = mutable_data<T>(d_w), *d_s_ptr = mutable_data<T>(d_s),
      *d_lengths_ptr = mutable_data<T>(d_lengths),
      *d_depth_pred_ptr = mutable_data<T>(d_depth_pred);
    for_rays<A>(d_loss.numel(), S, [=](int64_t begin, int64_t end) {
      as_form(form, [=](auto form_) {
        gradients<form_>(begin, end, S, sigma, eps, d_loss_ptr, w_ptr, s_ptr, depth_ptr,
                         lengths_ptr, depth_pred_ptr, d_w_ptr, d_s_ptr, d_lengths_ptr,
                         d_depth_pred_ptr);
      });
    });
  });
  return {d_w, d_s, d_lengths, d_depth_pred};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("depth_loss", TORCH_BOX(&fwd));
  m.impl("depth_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
