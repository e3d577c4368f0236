// Feature distillation, of dense and of packed rays: loss = mean_c e_c^2 with the error
// e = sum_s w_s f_s - target. One thread owns a few rays. Forward: one pass over f for e, and one
// for the products <e, f_s> while the ray's f is still in cache (147 KB at 48 samples of 768
// channels). Backward, none: with g = d_loss 2/C e, d_w_s = <g, f_s>, d_f_s = w_s g, d_target = -g.
// Both at once: the second pass writes d_f.
#pragma once

#include "ray_features.h"

namespace rayfuse {
namespace {

// Adds up the features of a ray, and gives its loss and, in e, the error.
template <class T>
accumulator<T> loss_of(RayFeatures<T>& ray, int64_t r, int64_t C, const T* f,
                       const RowReader<accumulator<T>>& target, accumulator<T>* e) {
  using A = accumulator<T>;
  ray.add_up(f);
  target(r * C, C, e);
  Block<A> total = {};
  for_registers<A>(C, [&](int64_t c, auto n) {
    const vec<A> e_c = load(ray.sum + c, n) - load(e + c, n);
    store(e + c, e_c, n);
    total.column[0] += e_c * e_c;
  });
  return sum_samples<A>(sum_columns(transpose(total)))[0] / static_cast<A>(C);
}

// Rays first..last.
template <class T, class Rays>
RAYFUSE_KERNEL void losses(int64_t first, int64_t last, const Rays& rays, int64_t C,
                           RowReader<accumulator<T>> w,       // [P]
                           const T* f,                        // [P, C]
                           RowReader<accumulator<T>> target,  // [R, C]
                           accumulator<T>* loss,              // [R]
                           accumulator<T>* error,             // [R, C]
                           accumulator<T>* product) {         // [P]
  using A = accumulator<T>;
  RayFeatures<T> ray(C, f + rays.begin(rays.R) * C);
  Padded<A> e(C);
  for (int64_t r = first; r < last; ++r) {
    const int64_t k = rays.begin(r), S = rays.begin(r + 1) - k;
    ray.go_to(k, S, w);
    loss[r] = loss_of<T>(ray, r, C, f + k * C, target, e);
    ray.template spread<true, false, true>(e, f + k * C, nullptr);
    write_row<A>(error, r * C, C, e);
    write_row<A>(product, k, S, ray.d_w);
  }
}

// Likewise, with the gradients of d_loss times each loss: what is written takes the time in which
// nothing could be read.
template <class T, class Rays>
RAYFUSE_KERNEL void losses_and_gradients(int64_t first, int64_t last, const Rays& rays, int64_t C,
                                         bool past_cache, accumulator<T> d_loss,
                                         RowReader<accumulator<T>> w,           // [P]
                                         const T* f,                            // [P, C]
                                         RowReader<accumulator<T>> target,      // [R, C]
                                         accumulator<T>* loss,                  // [R]
                                         RowWriter<accumulator<T>> d_w,         // [P]
                                         T* d_f,                                // [P, C] or null
                                         RowWriter<accumulator<T>> d_target) {  // [R, C]
  using A = accumulator<T>;
  RayFeatures<T> ray(C, f + rays.begin(rays.R) * C, d_f + rays.begin(last) * C, past_cache);
  Padded<A> g(C), d_target_r(C);
  const A scale = 2 * d_loss / static_cast<A>(C);
  for (int64_t r = first; r < last; ++r) {
    const int64_t k = rays.begin(r), S = rays.begin(r + 1) - k;
    ray.go_to(k, S, w);
    loss[r] = loss_of<T>(ray, r, C, f + k * C, target, g);
    for_registers<A>(C, [&](int64_t c, auto n) {
      const vec<A> g_c = scale * load(g + c, n);
      store(g + c, g_c, n);
      store(d_target_r + c, -g_c, n);
    });
    d_f ? ray.template spread<true, true, true>(g, f + k * C, d_f + k * C)
        : ray.template spread<true, false, true>(g, f + k * C, nullptr);
    d_w(k, S, ray.d_w);
    d_target(r * C, C, d_target_r);
  }
}

// Rays first..last.
template <class T, class Rays>
RAYFUSE_KERNEL void gradients(int64_t first, int64_t last, const Rays& rays, int64_t C,
                              bool past_cache,
                              const accumulator<T>* d_loss,          // [R]
                              const accumulator<T>* error,           // [R, C]
                              const accumulator<T>* product,         // [P]
                              RowReader<accumulator<T>> w,           // [P]
                              RowWriter<accumulator<T>> d_w,         // [P]
                              T* d_f,                                // [P, C] or null
                              RowWriter<accumulator<T>> d_target) {  // [R, C]
  using A = accumulator<T>;
  RayFeatures<T> ray(C, nullptr, d_f + rays.begin(last) * C, past_cache);
  Padded<A> g(C), d_target_r(C);
  for (int64_t r = first; r < last; ++r) {
    const int64_t k = rays.begin(r), S = rays.begin(r + 1) - k;
    ray.go_to(k, S, w);
    const A scale = 2 * d_loss[r] / static_cast<A>(C);
    for_registers<A>(C, [&](int64_t c, auto n) {
      const vec<A> g_c = scale * load(error + r * C + c, n);
      store(g + c, g_c, n);
      store(d_target_r + c, -g_c, n);
    });
    for_registers<A>(
        S, [&](int64_t s, auto n) { store(ray.d_w + s, scale * load(product + k + s, n), n); });
    if (d_f) ray.template spread<false, true>(g, nullptr, d_f + k * C);
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

// loss, of the leading sizes, error and product.
template <class Rays>
std::tuple<Tensor, Tensor, Tensor> losses(const Rays& rays, const std::vector<int64_t>& sizes,
                                          const Tensor& w, const Tensor& f, const Tensor& target) {
  const int64_t C = f.size(-1);
  const auto dtype = accumulator_dtype(w);
  Tensor loss = empty(w, sizes, dtype), error = empty(w, leading_sizes(target, 0), dtype),
         product = empty(w, leading_sizes(w, 0), dtype);
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const auto w_rows = rows<A>(w), target_rows = rows<A>(target);
    const T* f_ptr = data<T>(f);
    A *loss_ptr = mutable_data<A>(loss), *error_ptr = mutable_data<A>(error),
      *product_ptr = mutable_data<A>(product);
    rays.for_each_piece(C, [=](int64_t first, int64_t last) {
      losses(first, last, rays, C, w_rows, f_ptr, target_rows, loss_ptr, error_ptr, product_ptr);
    });
  });
  return {loss, error, product};
}

// The sum of the losses, d_w, d_f and d_target.
template <class Rays>
std::tuple<Tensor, Tensor, Tensor, Tensor> losses_and_gradients(
    const Rays& rays, const std::vector<int64_t>& sizes, double d_loss, const Tensor& w,
    const Tensor& f, const Tensor& target, int64_t needs) {
  const int64_t C = f.size(-1);
  Tensor loss = empty(w, sizes, accumulator_dtype(w)), d_w = empty_gradient(w, needs, 0),
         d_f = large_gradient(f, needs, 1), d_target = empty_gradient(target, needs, 2);
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const auto w_rows = rows<A>(w), target_rows = rows<A>(target);
    const T* f_ptr = data<T>(f);
    A* loss_ptr = mutable_data<A>(loss);
    const auto d_w_rows = mutable_rows<A>(d_w), d_target_rows = mutable_rows<A>(d_target);
    T* d_f_ptr = mutable_data<T>(d_f);
    const bool past_cache = is_large(d_f);
    rays.for_each_piece(C, [=](int64_t first, int64_t last) {
      losses_and_gradients(first, last, rays, C, past_cache, static_cast<A>(d_loss), w_rows, f_ptr,
                           target_rows, loss_ptr, d_w_rows, d_f_ptr, d_target_rows);
    });
  });
  return {sum_of_rays(loss), d_w, d_f, d_target};
}

template <class Rays>
std::tuple<Tensor, Tensor, Tensor> gradients(const Rays& rays, const Tensor& d_loss,
                                             const Tensor& error, const Tensor& product,
                                             const Tensor& w, const Tensor& f, const Tensor& target,
                                             int64_t needs) {
  const int64_t C = f.size(-1);
  Tensor d_w = empty_gradient(w, needs, 0), d_f = large_gradient(f, needs, 1),
         d_target = empty_gradient(target, needs, 2);
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const A *d_loss_ptr = data<A>(d_loss), *error_ptr = data<A>(error),
            *product_ptr = data<A>(product);
    const auto w_rows = rows<A>(w);
    const auto d_w_rows = mutable_rows<A>(d_w), d_target_rows = mutable_rows<A>(d_target);
    T* d_f_ptr = mutable_data<T>(d_f);
    const bool past_cache = is_large(d_f);
    rays.for_each_piece(C, [=](int64_t first, int64_t last) {
      gradients(first, last, rays, C, past_cache, d_loss_ptr, error_ptr, product_ptr, w_rows,
                d_w_rows, d_f_ptr, d_target_rows);
    });
  });
  return {d_w, d_f, d_target};
}

}  // namespace
}  // namespace rayfuse
