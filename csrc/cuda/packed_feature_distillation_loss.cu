// Feature distillation of packed rays: loss = mean_c e_c^2 with the error e = sum_s w_s f_s -
// target. A warp owns a ray, a block a long one, and does with it what feature_distillation_loss.h
// says. Where rays are of many values a block owns each one in the forward: what it reads twice
// must stay in cache.
#include "feature_distillation_loss.h"

namespace rayfuse {
namespace {

template <class T>
__global__ void __launch_bounds__(kBlock, 1)
    packed_feature_distillation_loss_fwd_kernel(PackedShape shape,
                                                const int64_t* __restrict__ offsets,  // [R+1]
                                                Loss<T> loss) {
  for_each_stray_sample(offsets, shape.R, shape.P, [&](int64_t k) { loss.product[k] = 0; });
  for_each_packed_ray(offsets, shape.R, shape.P,
                      [&](const auto& team, PackedRay ray) { loss.of_ray(team, ray, shape); });
}

template <class T>
__global__ void __launch_bounds__(kBlock, 1)
    packed_feature_distillation_loss_fwd_long_kernel(PackedShape shape,
                                                     const int64_t* __restrict__ offsets,  // [R+1]
                                                     Loss<T> loss) {
  for_each_stray_sample(offsets, shape.R, shape.P, [&](int64_t k) { loss.product[k] = 0; });
  const int64_t r = blockIdx.x;
  const auto inside = [&](int64_t k) { return min(max(k, int64_t{0}), shape.P); };
  const int64_t begin = inside(offsets[r]), end = max(begin, inside(offsets[r + 1]));
  loss.of_ray(Team<kBlock>(), PackedRay{r, begin, end}, shape);
}

template <class T>
__global__ void __launch_bounds__(kBlock, 1)
    packed_feature_distillation_loss_bwd_kernel(PackedShape shape,
                                                const int64_t* __restrict__ offsets,  // [R+1]
                                                LossGradients<T> gradients) {
  clear_stray_features(offsets, shape, gradients.d_w, gradients.d_f);
  for_each_packed_ray(offsets, shape.R, shape.P,
                      [&](const auto& team, PackedRay ray) { gradients.of_ray(team, ray); });
}

}  // namespace
}  // namespace rayfuse

#include "ray_features_registration.h"

namespace rayfuse {
namespace {

PackedShape shape_of(const Tensor& offsets, const Tensor& f) {
  return {offsets.numel() - 1, f.size(0), f.size(1)};
}

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& w, const Tensor& f, const Tensor& target,
                                       const Tensor& offsets) {
  const Device device(w);
  const PackedShape shape = shape_of(offsets, f);
  const auto dtype = accumulator_dtype(w);
  Tensor loss = empty(w, {shape.R}, dtype), error = empty(w, {shape.R, shape.C}, dtype),
         product = empty(w, {shape.P}, dtype);
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const Loss<T> results = {values(w),
                             data<T>(f),
                             values(target),
                             mutable_data<A>(loss),
                             mutable_data<A>(error),
                             mutable_data<A>(product)};
    const auto* const offsets_ptr = data<int64_t>(offsets);
    if (shape.P * shape.C > kTileValues<float> * shape.R && shape.R > 0) {
      launch({shape.R, kBlock, 0, device.stream()},
             packed_feature_distillation_loss_fwd_long_kernel<T>, shape, offsets_ptr, results);
    } else {
      launch(shape.grid(device.stream()), packed_feature_distillation_loss_fwd_kernel<T>, shape,
             offsets_ptr, results);
    }
  });
  return {loss, error, product};
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& error,
                                       const Tensor& product, const Tensor& w, const Tensor& f,
                                       const Tensor& target, const Tensor& offsets, int64_t needs) {
  const Device device(w);
  const PackedShape shape = shape_of(offsets, f);
  Tensor d_w = empty_gradient(w, needs, 0), d_f = empty_gradient(f, needs, 1),
         d_target = empty_gradient(target, needs, 2);
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    launch(shape.grid(device.stream()), packed_feature_distillation_loss_bwd_kernel<T>, shape,
           data<int64_t>(offsets),
           {shape.C, data<A>(d_loss), data<A>(error), data<A>(product), values(w),
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
