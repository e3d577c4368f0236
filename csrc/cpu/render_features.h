// Feature rendering, of dense and of packed rays: features = sum_s w_s f_s.
// One thread owns a few rays. Forward: one pass over f. Backward: one more, or none where no
// gradient to w is wanted: d_w_s = <d_features, f_s>, d_f_s = w_s d_features.
#pragma once

#include "ray_features.h"

namespace rayfuse {
namespace {

// Rays first..last, whose samples end where all that is read does.
template <class T, class Rays>
RAYFUSE_KERNEL void render(int64_t first, int64_t last, const Rays& rays, int64_t C,
                           RowReader<accumulator<T>> w,  // [P]
                           const T* f,                   // [P, C]
                           accumulator<T>* features) {   // [R, C]
  RayFeatures<T> ray(C, f + rays.begin(rays.R) * C);
  for (int64_t r = first; r < last; ++r) {
    const int64_t k = rays.begin(r);
    ray.go_to(k, rays.begin(r + 1) - k, w);
    ray.add_up(f + k * C);
    write_row<accumulator<T>>(features, r * C, C, ray.sum);
  }
}

// Likewise.
template <bool with_d_w, bool with_d_f, class T, class Rays>
RAYFUSE_KERNEL void gradients(int64_t first, int64_t last, const Rays& rays, int64_t C,
                              bool past_cache,
                              const accumulator<T>* d_features,  // [R, C]
                              RowReader<accumulator<T>> w,       // [P]
                              const T* f,                        // [P, C]
                              RowWriter<accumulator<T>> d_w,     // [P]
                              T* d_f) {                          // [P, C]
  RayFeatures<T> ray(C, f + rays.begin(rays.R) * C, d_f + rays.begin(last) * C, past_cache);
  for (int64_t r = first; r < last; ++r) {
    const int64_t k = rays.begin(r), S = rays.begin(r + 1) - k;
    ray.go_to(k, S, w);
    ray.template spread<with_d_w, with_d_f>(d_features + r * C, f + k * C, d_f + k * C);
    d_w(k, S, ray.d_w);
  }
}

}  // namespace
}  // namespace rayfuse

#include "large_memory.h"
#include "ray_features_registration.h"

namespace rayfuse {
namespace {

// features [..., C], of the leading sizes.
template <class Rays>
Tensor render(const Rays& rays, std::vector<int64_t> sizes, const Tensor& w, const Tensor& f) {
  const int64_t C = f.size(-1);
  sizes.push_back(C);
  Tensor features = empty(w, sizes, accumulator_dtype(w));
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const auto w_rows = rows<A>(w);
    const T* f_ptr = data<T>(f);
    A* features_ptr = mutable_data<A>(features);
    rays.for_each_piece(C, [=](int64_t first, int64_t last) {
      render(first, last, rays, C, w_rows, f_ptr, features_ptr);
    });
  });
  return features;
}

template <class Rays>
std::tuple<Tensor, Tensor> gradients(const Rays& rays, const Tensor& d_features, const Tensor& w,
                                     const Tensor& f, int64_t needs) {
  const int64_t C = f.size(-1);
  Tensor d_w = empty_gradient(w, needs, 0), d_f = large_gradient(f, needs, 1);
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const A* d_features_ptr = data<A>(d_features);
    const auto w_rows = rows<A>(w);
    const T* f_ptr = data<T>(f);
    const auto d_w_rows = mutable_rows<A>(d_w);
    T* d_f_ptr = mutable_data<T>(d_f);
    const bool past_cache = is_large(d_f);
    rays.for_each_piece(C, [=](int64_t first, int64_t last) {
      as_constant(d_w_rows.data != nullptr, [=](auto with_d_w) {
        as_constant(d_f_ptr != nullptr, [=](auto with_d_f) {
          gradients<with_d_w, with_d_f>(first, last, rays, C, past_cache, d_features_ptr, w_rows,
                                        f_ptr, d_w_rows, d_f_ptr);
        });
      });
    });
  });
  return {d_w, d_f};
}

}  // namespace
}  // namespace rayfuse
