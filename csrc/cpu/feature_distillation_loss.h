// Feature distillation, of dense and of packed rays: loss = mean_c (F_c - target_c)^2 with the
// rendering F = sum_s w_s f_s. One thread owns a few rays. Forward: one pass over f. Backward: one
// for F, which gives g = d_loss 2/C (F - target), and one for d_w_s = <g, f_s>, d_f_s = w_s g while
// the ray's f is still in cache (147 KB at 48 samples of 768 channels); d_target = -g.
#pragma once

#include "ray_features.h"

namespace rayfuse {
namespace {

// Rays first..last.
template <class T, class Rays>
RAYFUSE_KERNEL void losses(int64_t first, int64_t last, const Rays& rays, int64_t C,
                           RowReader<accumulator<T>> w,       // [P]
                           const T* f,                        // [P, C]
                           RowReader<accumulator<T>> target,  // [R, C]
                           accumulator<T>* loss) {            // [R]
  using A = accumulator<T>;
  RayFeatures<T> ray(C, f + rays.begin(rays.R) * C);
  Padded<A> target_r(C);
  for (int64_t r = first; r < last; ++r) {
    const int64_t k = rays.begin(r);
    ray.go_to(k, rays.begin(r + 1) - k, w);
    target(r * C, C, target_r);
    ray.add_up(f + k * C);
    Block<A> total = {};
    for_registers<A>(C, [&](int64_t c, auto n) {
      const vec<A> off = load(ray.sum + c, n) - load(target_r + c, n);
      total.column[0] += off * off;
    });
    loss[r] = sum_samples<A>(sum_columns(transpose(total)))[0] / static_cast<A>(C);
  }
}

// Likewise.
template <bool with_d_w, bool with_d_f, class T, class Rays>
RAYFUSE_KERNEL void gradients(int64_t first, int64_t last, const Rays& rays, int64_t C,
                              bool past_cache,
                              const accumulator<T>* d_loss,          // [R]
                              RowReader<accumulator<T>> w,           // [P]
                              const T* f,                            // [P, C]
                              RowReader<accumulator<T>> target,      // [R, C]
                              RowWriter<accumulator<T>> d_w,         // [P]
                              T* d_f,                                // [P, C]
                              RowWriter<accumulator<T>> d_target) {  // [R, C]
  using A = accumulator<T>;
  RayFeatures<T> ray(C, f + rays.begin(rays.R) * C, d_f + rays.begin(last) * C, past_cache);
  Padded<A> g(C), d_target_r(C);
  for (int64_t r = first; r < last; ++r) {
    const int64_t k = rays.begin(r), S = rays.begin(r + 1) - k;
    ray.go_to(k, S, w);
    target(r * C, C, g);
    ray.add_up(f + k * C);
    const A scale = 2 * d_loss[r] / static_cast<A>(C);
    for_registers<A>(C, [&](int64_t c, auto n) {
      const vec<A> g_c = scale * (load(ray.sum + c, n) - load(g + c, n));
      store(g + c, g_c, n);
      store(d_target_r + c, -g_c, n);
    });
    ray.template spread<with_d_w, with_d_f>(g, f + k * C, d_f + k * C);
    d_w(k, S, ray.d_w);
    d_target(r * C, C, d_target_r);
  }
}

}  // namespace
}  // namespace rayfuse

#include "large_memory.h"
#include "ray_features_registration.h"

namespace rayfuse {
namespace {

// loss, of the leading sizes.
template <class Rays>
Tensor losses(const Rays& rays, const std::vector<int64_t>& sizes, const Tensor& w, const Tensor& f,
              const Tensor& target) {
  const int64_t C = f.size(-1);
  Tensor loss = empty(w, sizes, accumulator_dtype(w));
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const auto w_rows = rows<A>(w), target_rows = rows<A>(target);
    const T* f_ptr = data<T>(f);
    A* loss_ptr = mutable_data<A>(loss);
    rays.for_each_piece(C, [=](int64_t first, int64_t last) {
      losses(first, last, rays, C, w_rows, f_ptr, target_rows, loss_ptr);
    });
  });
  return loss;
}

template <class Rays>
std::tuple<Tensor, Tensor, Tensor> gradients(const Rays& rays, const Tensor& d_loss,
                                             const Tensor& w, const Tensor& f, const Tensor& target,
                                             int64_t needs) {
  const int64_t C = f.size(-1);
  Tensor d_w = empty_gradient(w, needs, 0), d_f = large_gradient(f, needs, 1),
         d_target = empty_gradient(target, needs, 2);
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const A* d_loss_ptr = data<A>(d_loss);
    const auto w_rows = rows<A>(w), target_rows = rows<A>(target);
    const T* f_ptr = data<T>(f);
    const auto d_w_rows = mutable_rows<A>(d_w), d_target_rows = mutable_rows<A>(d_target);
    T* d_f_ptr = mutable_data<T>(d_f);
    const bool past_cache = is_large(d_f);
    rays.for_each_piece(C, [=](int64_t first, int64_t last) {
      as_constant(d_w_rows.data != nullptr, [=](auto with_d_w) {
        as_constant(d_f_ptr != nullptr, [=](auto with_d_f) {
          gradients<with_d_w, with_d_f>(first, last, rays, C, past_cache, d_loss_ptr, w_rows, f_ptr,
                                        target_rows, d_w_rows, d_f_ptr, d_target_rows);
        });
      });
    });
  });
  return {d_w, d_f, d_target};
}

}  // namespace
}  // namespace rayfuse
