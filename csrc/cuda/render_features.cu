// Feature rendering: features = sum_s w_s f_s.
// A block owns a ray, or several short ones, and takes a tile of samples on chip at a time.
// Forward: one pass over f. Backward: one more, or none where no gradient to w is wanted: d_w_s =
// <d_features, f_s>, d_f_s = w_s d_features.
#include "ray_features.h"

namespace rayfuse {
namespace {

template <int kThreads, class T>
__global__ void __launch_bounds__(kThreads, 1)
    render_features_fwd_kernel(Shape shape,
                               Values w,                    // [R, S]
                               const T* f,                  // [R, S, C]
                               accumulator<T>* features) {  // [R, C]
  Features<kThreads, T> rays(shape, w, f, features);
  rays.add_up();
  if (shape.is_wide<accumulator<T>>()) return;
  rays.for_sums([&](int i, int) { features[rays.first * shape.C + i] = rays.sums[i]; });
}

template <int kThreads, class T>
__global__ void __launch_bounds__(kThreads, 1)
    render_features_bwd_kernel(Shape shape,
                               const accumulator<T>* d_features,  // [R, C]
                               Values w,                          // [R, S]
                               const T* f,                        // [R, S, C]
                               MutableValues d_w,                 // [R, S]
                               T* d_f) {                          // [R, S, C] or null
  Features<kThreads, T> rays(shape, w, f, nullptr);
  const auto* const g = d_features + rays.first * shape.C;
  const bool wide = shape.is_wide<accumulator<T>>();
  if (!wide) rays.for_sums([&](int i, int) { rays.sums[i] = g[i]; });
  rays.spread(wide ? g : rays.sums, d_w, d_f);
}

}  // namespace
}  // namespace rayfuse

#include "ray_features_registration.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& w, const Tensor& f) {
  const Device device(w);
  const int64_t S = f.size(-2), C = f.size(-1), R = count_rays(w, 1);
  auto sizes = leading_sizes(w, 1);
  sizes.push_back(C);
  Tensor features = empty(w, sizes, accumulator_dtype(w));
  if (features.numel() == 0) return features;
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const Shape shape = Shape::of<A>(R, S, C);
    launch(shape.grid<A>(device.stream()), render_features_fwd_kernel<kBlock, T>, shape, values(w),
           data<T>(f), mutable_data<A>(features));
  });
  return features;
}

std::tuple<Tensor, Tensor> bwd(const Tensor& d_features, const Tensor& w, const Tensor& f,
                               int64_t needs) {
  const Device device(w);
  const int64_t S = f.size(-2), C = f.size(-1), R = count_rays(w, 1);
  Tensor d_w = empty_gradient(w, needs, 0), d_f = empty_gradient(f, needs, 1);
  if (d_w.numel() + d_f.numel() == 0) return {d_w, d_f};
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const Shape shape = Shape::of<A>(R, S, C);
    launch(shape.grid<A>(device.stream()), render_features_bwd_kernel<kBlock, T>, shape,
           data<A>(d_features), values(w), data<T>(f), mutable_values(d_w), mutable_data<T>(d_f));
  });
  return {d_w, d_f};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("render_features", TORCH_BOX(&fwd));
  m.impl("render_features_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
