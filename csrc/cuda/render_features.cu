// Feature rendering: features = sum_s w_s f_s.
// A warp owns a ray, a block a long one, as ray_features.h says. Forward: one pass over f.
// Backward: one more, or none where no gradient to w is wanted: d_w_s = <d_features, f_s>, d_f_s =
// w_s d_features.
#include "ray_features.h"

namespace rayfuse {
namespace {

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, 2)
    render_features_fwd_kernel(int64_t R, int64_t S, Rendering<T> rendering) {
  do_dense_ray<kThreads>(R, S, rendering);
}

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, 3)
    render_features_bwd_kernel(int64_t R, int64_t S, RenderingGradients<T> gradients) {
  do_dense_ray<kThreads>(R, S, gradients);
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
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    launch_dense(device.stream(), render_features_fwd_kernel<kWarp, T>,
                 render_features_fwd_kernel<kBlock, T>, R, S,
                 {FeatureShape(C), values(w), data<T>(f), mutable_data<accumulator<T>>(features)});
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
    launch_dense(device.stream(), render_features_bwd_kernel<kWarp, T>,
                 render_features_bwd_kernel<kBlock, T>, R, S,
                 {FeatureShape(C), data<accumulator<T>>(d_features), values(w), data<T>(f),
                  mutable_values(d_w), mutable_data<T>(d_f)});
  });
  return {d_w, d_f};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("render_features", TORCH_BOX(&fwd));
  m.impl("render_features_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
