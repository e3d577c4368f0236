// Feature rendering of packed rays: features = sum_s w_s f_s.
// A warp owns a ray, a block a long one; its threads go along the channels of a sample, or of
// several where there are few. Forward: one pass over f. Backward: one more, or none where no
// gradient to w is wanted: d_w_s = <d_features, f_s>, d_f_s = w_s d_features.
#include "packed_features.h"

namespace rayfuse {
namespace {

template <class T>
__global__ void __launch_bounds__(kBlock, 1)
    packed_render_features_fwd_kernel(PackedShape shape,
                                      Values w,                             // [P]
                                      const T* __restrict__ f,              // [P, C]
                                      const int64_t* __restrict__ offsets,  // [R+1]
                                      accumulator<T>* features) {           // [R, C]
  for_each_packed_ray(
      offsets, shape.R, shape.P, [&]<int kThreads>(const Team<kThreads>& team, PackedRay ray) {
        accumulator<T>* const own = features + ray.index * shape.C;
        PackedFeatures<kThreads, T>(team, ray, shape, w, f).add_up([&](int c, accumulator<T> sum) {
          own[c] = sum;
        });
      });
}

template <class T>
__global__ void __launch_bounds__(kBlock, 1)
    packed_render_features_bwd_kernel(PackedShape shape,
                                      const accumulator<T>* __restrict__ d_features,  // [R, C]
                                      Values w,                                       // [P]
                                      const T* __restrict__ f,                        // [P, C]
                                      const int64_t* __restrict__ offsets,            // [R+1]
                                      MutableValues d_w,                              // [P]
                                      T* d_f) {                                       // [P, C]
  clear_stray_features(offsets, shape, d_w, d_f);
  for_each_packed_ray(offsets, shape.R, shape.P,
                      [&]<int kThreads>(const Team<kThreads>& team, PackedRay ray) {
                        PackedFeatures<kThreads, T>(team, ray, shape, w, f)
                            .spread(d_features + ray.index * shape.C, d_w, d_f);
                      });
}

}  // namespace
}  // namespace rayfuse

#include "ray_features_registration.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& w, const Tensor& f, const Tensor& offsets) {
  const Device device(w);
  const PackedShape shape(offsets.numel() - 1, w.numel(), f.size(-1));
  Tensor features = empty(w, {shape.R, shape.C}, accumulator_dtype(w));
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    launch(shape.grid(device.stream()), packed_render_features_fwd_kernel<T>, shape, values(w),
           data<T>(f), data<int64_t>(offsets), mutable_data<accumulator<T>>(features));
  });
  return features;
}

std::tuple<Tensor, Tensor> bwd(const Tensor& d_features, const Tensor& w, const Tensor& f,
                               const Tensor& offsets, int64_t needs) {
  const Device device(w);
  const PackedShape shape(offsets.numel() - 1, w.numel(), f.size(-1));
  Tensor d_w = empty_gradient(w, needs, 0), d_f = empty_gradient(f, needs, 1);
  if (d_w.numel() + d_f.numel() == 0) return {d_w, d_f};
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    launch(shape.grid(device.stream()), packed_render_features_bwd_kernel<T>, shape,
           data<accumulator<T>>(d_features), values(w), data<T>(f), data<int64_t>(offsets),
           mutable_values(d_w), mutable_data<T>(d_f));
  });
  return {d_w, d_f};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_render_features", TORCH_BOX(&fwd));
  m.impl("packed_render_features_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
