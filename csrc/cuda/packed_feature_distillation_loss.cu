// Feature distillation of packed rays: loss = mean_c e_c^2 with the error e = sum_s w_s f_s -
// target. A warp owns a ray, a block a long one, and does with it what feature_distillation_loss.h
// says.
#include "feature_distillation_loss.h"
#include "packed_features.h"

namespace rayfuse {
namespace {

template <class T>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 ? 1 : 2)
    packed_feature_distillation_loss_fwd_kernel(PackedShape shape,
                                                const int64_t* __restrict__ offsets,  // [R+1]
                                                Loss<T> loss) {
  do_packed_rays(shape, offsets, loss);
  for_each_stray_sample(offsets, shape.R, shape.P, [&](int64_t k) { loss.product[k] = 0; });
}

template <class T>
__global__ void __launch_bounds__(kBlock, 2)
    packed_feature_distillation_loss_bwd_kernel(PackedShape shape,
                                                const int64_t* __restrict__ offsets,  // [R+1]
                                                LossGradients<T> gradients) {
  do_packed_rays(shape, offsets, gradients);
  clear_stray_features(shape, offsets, gradients.shape.C, gradients.d_w, gradients.d_f);
}

}  // namespace
}  // namespace rayfuse

#include "ray_features_registration.h"

namespace rayfuse {
namespace {

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& w, const Tensor& f, const Tensor& target,
                                       const Tensor& offsets) {
  const Device device(w);
  const FeatureShape features(f.size(1));
  const PackedShape shape(offsets.numel() - 1, f.size(0), features);
  const auto dtype = accumulator_dtype(w);
  Tensor loss = empty(w, {shape.R}, dtype), error = empty(w, {shape.R, features.C}, dtype),
         product = empty(w, {shape.P}, dtype);
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    launch(shape.grid(device.stream()), packed_feature_distillation_loss_fwd_kernel<T>, shape,
           data<int64_t>(offsets),
           {features, values(w), data<T>(f), values(target), mutable_data<A>(loss),
            mutable_data<A>(error), mutable_data<A>(product)});
  });
  return {loss, error, product};
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& error,
                                       const Tensor& product, const Tensor& w, const Tensor& f,
                                       const Tensor& target, const Tensor& offsets, int64_t needs) {
  const Device device(w);
  const FeatureShape features(f.size(1));
  const PackedShape shape(offsets.numel() - 1, f.size(0), features);
  Tensor d_w = empty_gradient(w, needs, 0), d_f = empty_gradient(f, needs, 1),
         d_target = empty_gradient(target, needs, 2);
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    launch(shape.grid(device.stream()), packed_feature_distillation_loss_bwd_kernel<T>, shape,
           data<int64_t>(offsets),
           {features, data<A>(d_loss), data<A>(error), data<A>(product), values(w),
            mutable_values(d_w), mutable_data<T>(d_f), mutable_values(d_target)});
  });
  return {d_w, d_f, d_target};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_feature_distillation_loss", TORCH_BOX(&fwd));
  m.impl("packed_feature_distillation_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
