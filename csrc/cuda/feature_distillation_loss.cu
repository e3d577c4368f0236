// Feature distillation: loss = mean_c e_c^2 with the error e = sum_s w_s f_s - target.
// A warp owns a ray, a block a long one, and does with it what feature_distillation_loss.h says.
#include "feature_distillation_loss.h"

namespace rayfuse {
namespace {

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 ? 1 : 2)
    feature_distillation_loss_fwd_kernel(int64_t R, int64_t S, Loss<T> loss) {
  do_dense_ray<kThreads>(R, S, loss);
}

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, 2)
    feature_distillation_loss_bwd_kernel(int64_t R, int64_t S, LossGradients<T> gradients) {
  do_dense_ray<kThreads>(R, S, gradients);
}

}  // namespace
}  // namespace rayfuse

#include "ray_features_registration.h"

namespace rayfuse {
namespace {

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& w, const Tensor& f, const Tensor& target) {
  const Device device(w);
  const int64_t R = count_rays(w, 1), S = f.size(-2), C = f.size(-1);
  const auto dtype = accumulator_dtype(w);
  Tensor loss = empty(w, leading_sizes(w, 1), dtype),
         error = empty(w, leading_sizes(target, 0), dtype),
         product = empty(w, leading_sizes(w, 0), dtype);
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    launch_dense(device.stream(), feature_distillation_loss_fwd_kernel<kWarp, T>,
                 feature_distillation_loss_fwd_kernel<kBlock, T>, R, S,
                 {FeatureShape(C), values(w), data<T>(f), values(target), mutable_data<A>(loss),
                  mutable_data<A>(error), mutable_data<A>(product)});
  });
  return {loss, error, product};
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& error,
                                       const Tensor& product, const Tensor& w, const Tensor& f,
                                       const Tensor& target, int64_t needs) {
  const Device device(w);
  Tensor d_w = empty_gradient(w, needs, 0), d_f = empty_gradient(f, needs, 1),
         d_target = empty_gradient(target, needs, 2);
  const int64_t R = d_loss.numel(), S = f.size(-2), C = f.size(-1);
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    launch_dense(device.stream(), feature_distillation_loss_bwd_kernel<kWarp, T>,
                 feature_distillation_loss_bwd_kernel<kBlock, T>, R, S,
                 {FeatureShape(C), data<A>(d_loss), data<A>(error), data<A>(product), values(w),
                  mutable_values(d_w), mutable_data<T>(d_f), mutable_values(d_target)});
  });
  return {d_w, d_f, d_target};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("feature_distillation_loss", TORCH_BOX(&fwd));
  m.impl("feature_distillation_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
