// Feature rendering of packed rays: features = sum_s w_s f_s.
// A warp owns a ray, a block a long one, as ray_features.h says. Forward: one pass over f.
// Backward: one more, or none where no gradient to w is wanted: d_w_s = <d_features, f_s>, d_f_s =
// w_s d_features.
#include "packed_features.h"

namespace rayfuse {
namespace {

template <class T>
__global__ void __launch_bounds__(kBlock, 2)
    packed_render_features_fwd_kernel(PackedShape shape,
                                      const int64_t* __restrict__ offsets,  // [R+1]
                                      Rendering<T> rendering) {
  do_packed_rays(shape, offsets, rendering);
}

template <class T>
__global__ void __launch_bounds__(kBlock, 3)
    packed_render_features_bwd_kernel(PackedShape shape,
                                      const int64_t* __restrict__ offsets,  // [R+1]
                                      RenderingGradients<T> gradients) {
  do_packed_rays(shape, offsets, gradients);
  clear_stray_features(shape, offsets, gradients.shape.C, gradients.d_w, gradients.d_f);
}

}  // namespace
}  // namespace rayfuse

#include "ray_features_registration.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& w, const Tensor& f, const Tensor& offsets) {
  const Device device(w);
  const FeatureShape features_shape(f.size(-1));
  const PackedShape shape(offsets.numel() - 1, w.numel(), features_shape);
  Tensor features = empty(w, {shape.R, features_shape.C}, accumulator_dtype(w));
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    launch(shape.grid(device.stream()), packed_render_features_fwd_kernel<T>, shape,
           data<int64_t>(offsets),
           {features_shape, values(w), data<T>(f), mutable_data<accumulator<T>>(features)});
  });
  return features;
}

std::tuple<Tensor, Tensor> bwd(const Tensor& d_features, const Tensor& w, const Tensor& f,
                               const Tensor& offsets, int64_t needs) {
  const Device device(w);
  const FeatureShape features_shape(f.size(-1));
  const PackedShape shape(offsets.numel() - 1, w.numel(), features_shape);
  Tensor d_w = empty_gradient(w, needs, 0), d_f = empty_gradient(f, needs, 1);
  if (d_w.numel() + d_f.numel() == 0) return {d_w, d_f};
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    launch(shape.grid(device.stream()), packed_render_features_bwd_kernel<T>, shape,
           data<int64_t>(offsets),
           {features_shape, data<accumulator<T>>(d_features), values(w), data<T>(f),
            mutable_values(d_w), mutable_data<T>(d_f)});
  });
  return {d_w, d_f};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_render_features", TORCH_BOX(&fwd));
  m.impl("packed_render_features_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
