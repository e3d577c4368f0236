// Feature distillation: loss = mean_c e_c^2 with the error e = sum_s w_s f_s - target.
// Forward: a block owns a ray, or several short ones. What fits on chip is read once; with a longer
// ray the block does what feature_distillation_loss.h says. Backward: a warp owns a short ray, a
// block a long one, likewise.
#include "feature_distillation_loss.h"

namespace rayfuse {
namespace {

template <int kThreads, class T>
__global__ void __launch_bounds__(kThreads, 1)
    feature_distillation_loss_fwd_kernel(Shape shape,
                                         Values w,                 // [R, S]
                                         const T* f,               // [R, S, C]
                                         Values target,            // [R, C]
                                         accumulator<T>* loss,     // [R]
                                         accumulator<T>* error,    // [R, C]
                                         MutableValues product) {  // [R, S]
  using A = accumulator<T>;
  Features<kThreads, T> rays(shape, w, f, nullptr);
  rays.add_up();
  rays.for_sums([&](int i, int) {
    const int64_t place = rays.first * shape.C + i;
    error[place] = rays.sums[i] -= value_at<A>(target, place);
  });
  __syncthreads();
  rays.sum_over(
      rays.count, shape.C,
      [&](int ray, int c) { return rays.sums[ray * shape.C + c] * rays.sums[ray * shape.C + c]; },
      [&](int ray, A sum) { loss[rays.first + ray] = sum / shape.C; });
  rays.spread(rays.sums, product, nullptr);
}

__device__ PackedRay dense_ray(int64_t r, int64_t S) { return {r, r * S, (r + 1) * S}; }

template <class T>
__global__ void __launch_bounds__(kBlock, 1)
    feature_distillation_loss_fwd_long_kernel(PackedShape shape, int64_t S, Loss<T> loss) {
  loss.of_ray(Team<kBlock>(), dense_ray(blockIdx.x, S), shape);
}

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, 1)
    feature_distillation_loss_bwd_kernel(int64_t R, int64_t S, LossGradients<T> gradients) {
  const Team<kThreads> team;
  const int64_t r = int64_t{blockIdx.x} * (kBlock / kThreads) + team.index;
  if (r < R) gradients.of_ray(team, dense_ray(r, S));
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
    const Shape shape = Shape::of<A>(R, S, C);
    if (shape.rays * S <= shape.samples && C <= kTileValues<A>) {
      launch(shape.grid<A>(device.stream()), feature_distillation_loss_fwd_kernel<kBlock, T>, shape,
             values(w), data<T>(f), values(target), mutable_data<A>(loss), mutable_data<A>(error),
             mutable_values(product));
    } else {
      launch({R, kBlock, 0, device.stream()}, feature_distillation_loss_fwd_long_kernel<T>,
             PackedShape(R, R * S, C), S,
             {values(w), data<T>(f), values(target), mutable_data<A>(loss), mutable_data<A>(error),
              mutable_data<A>(product)});
    }
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
    const LossGradients<T> gradients = {
        static_cast<int>(C), data<A>(d_loss),     data<A>(error),       data<A>(product),
        values(w),           mutable_values(d_w), mutable_data<T>(d_f), mutable_values(d_target)};
    // 8 values of a thread at least
    if (S * C < 8 * kBlock) {
      launch({packed_blocks(R), kBlock, 0, device.stream()},
             feature_distillation_loss_bwd_kernel<kWarp, T>, R, S, gradients);
    } else {
      launch({R, kBlock, 0, device.stream()}, feature_distillation_loss_bwd_kernel<kBlock, T>, R, S,
             gradients);
    }
  });
  return {d_w, d_f, d_target};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("feature_distillation_loss", TORCH_BOX(&fwd));
  m.impl("feature_distillation_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
