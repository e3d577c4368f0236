// Feature rendering: features = sum_s w_s f_s.
// One thread owns a few rays. Forward: one pass over f. Backward: one more, or none where no
// gradient to w is wanted: d_w_s = <d_features, f_s>, d_f_s = w_s d_features.
#include "ray_features.h"

namespace rayfuse {
namespace {

// Rays begin..end of R.
template <class T>
RAYFUSE_KERNEL void render(int64_t begin, int64_t end, int64_t R, int64_t S, int64_t C,
                           RowReader<accumulator<T>> w,  // [R, S]
                           const T* f,                   // [R, S, C]
                           accumulator<T>* features) {   // [R, C]
  RayFeatures<T> ray(S, C, f + R * S * C);
  for (int64_t r = begin; r < end; ++r) {
    w(r, S, ray.w);
    ray.add_up(f + r * S * C);
    write_row<accumulator<T>>(features, r * C, C, ray.sum);
  }
}

// Likewise.
template <bool with_d_w, bool with_d_f, class T>
RAYFUSE_KERNEL void gradients(int64_t begin, int64_t end, int64_t R, int64_t S, int64_t C,
                              bool past_cache,
                              const accumulator<T>* d_features,  // [R, C]
                              RowReader<accumulator<T>> w,       // [R, S]
                              const T* f,                        // [R, S, C]
                              RowWriter<accumulator<T>> d_w,     // [R, S]
                              T* d_f) {                          // [R, S, C]
  RayFeatures<T> ray(S, C, f + R * S * C, d_f + end * S * C, past_cache);
  for (int64_t r = begin; r < end; ++r) {
    w(r, S, ray.w);
    ray.template spread<with_d_w, with_d_f>(d_features + r * C, f + r * S * C, d_f + r * S * C);
    d_w(r, S, ray.d_w);
  }
}

}  // namespace
}  // namespace rayfuse

#include "large_memory.h"
#include "ray_features_registration.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& w, const Tensor& f) {
  const int64_t S = f.size(-2), C = f.size(-1);
  auto sizes = leading_sizes(w, 1);
  sizes.push_back(C);
  Tensor features = empty(w, sizes, accumulator_dtype(w));
  const int64_t R = count_rays(w, 1);
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const auto w_rows = rows<A>(w);
    const T* f_ptr = data<T>(f);
    A* features_ptr = mutable_data<A>(features);
    for_rays<A>(R, S * C, [=](int64_t begin, int64_t end) {
      render(begin, end, R, S, C, w_rows, f_ptr, features_ptr);
    });
  });
  return features;
}

std::tuple<Tensor, Tensor> bwd(const Tensor& d_features, const Tensor& w, const Tensor& f,
                               int64_t needs) {
  const int64_t S = f.size(-2), C = f.size(-1), R = count_rays(w, 1);
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
    for_rays<A>(R, S * C, [=](int64_t begin, int64_t end) {
      as_constant(d_w_rows.data != nullptr, [=](auto with_d_w) {
        as_constant(d_f_ptr != nullptr, [=](auto with_d_f) {
          gradients<with_d_w, with_d_f>(begin, end, R, S, C, past_cache, d_features_ptr, w_rows,
                                        f_ptr, d_w_rows, d_f_ptr);
        });
      });
    });
  });
  return {d_w, d_f};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("render_features", TORCH_BOX(&fwd));
  m.impl("render_features_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
