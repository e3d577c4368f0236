// Feature distillation: loss = mean_c (F_c - target_c)^2 with the rendering F = sum_s w_s f_s.
// A block owns a ray, or several short ones, and takes a tile of samples on chip at a time.
// Forward: one pass over f. Backward: one for F, which gives g = d_loss 2/C (F - target) and
// d_target = -g, and one more, from the L2 cache, for d_w_s = <g, f_s>; d_f_s = w_s g.
#include "ray_features.h"

namespace rayfuse {
namespace {

template <int kThreads, class T>
__global__ void __launch_bounds__(kThreads, 1)
    feature_distillation_loss_fwd_kernel(Shape shape,
                                         Values w,                // [R, S]
                                         const T* f,              // [R, S, C]
                                         Values target,           // [R, C]
                                         accumulator<T>* wide,    // [R, C] or null
                                         accumulator<T>* loss) {  // [R]
  using A = accumulator<T>;
  Features<kThreads, T> rays(shape, w, f, wide);
  rays.add_up();
  rays.for_sums([&](int i, int) {
    const A off = rays.sums[i] - value_at<A>(target, rays.first * shape.C + i);
    rays.sums[i] = off * off;
  });
  __syncthreads();
  rays.sum_over(
      rays.count, shape.C, [&](int ray, int c) { return rays.sums[ray * shape.C + c]; },
      [&](int ray, A sum) { loss[rays.first + ray] = sum / shape.C; });
}

template <int kThreads, class T>
__global__ void __launch_bounds__(kThreads, 1)
    feature_distillation_loss_bwd_kernel(Shape shape,
                                         const accumulator<T>* d_loss,  // [R]
                                         Values w,                      // [R, S]
                                         const T* f,                    // [R, S, C]
                                         Values target,                 // [R, C]
                                         accumulator<T>* wide,          // [R, C] or null
                                         MutableValues d_w,             // [R, S]
                                         T* d_f,                        // [R, S, C] or null
                                         MutableValues d_target) {      // [R, C]
  using A = accumulator<T>;
  Features<kThreads, T> rays(shape, w, f, wide);
  rays.add_up();
  rays.for_sums([&](int i, int) {
    const int64_t place = rays.first * shape.C + i;
    const A scale = 2 * d_loss[rays.first + i / shape.C] / shape.C;
    rays.sums[i] = scale * (rays.sums[i] - value_at<A>(target, place));
    if (d_target.data) set_value<A>(d_target, place, -rays.sums[i]);
  });
  if (d_w.data || d_f) rays.spread(rays.sums, d_w, d_f);
}

}  // namespace
}  // namespace rayfuse

#include "ray_features_registration.h"

namespace rayfuse {
namespace {

// Room for the renderings where a block cannot hold one.
template <class A>
Tensor wide_sums(const Shape& shape, const Tensor& w) {
  return empty(w, {shape.is_wide<A>() ? shape.R * shape.C : 0}, accumulator_dtype(w));
}

Tensor fwd(const Tensor& w, const Tensor& f, const Tensor& target) {
  const Device device(w);
  Tensor loss = empty(w, leading_sizes(w, 1), accumulator_dtype(w));
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const Shape shape = Shape::of<A>(loss.numel(), f.size(-2), f.size(-1));
    const Tensor wide = wide_sums<A>(shape, w);
    launch(shape.grid<A>(device.stream()), feature_distillation_loss_fwd_kernel<kBlock, T>, shape,
           values(w), data<T>(f), values(target), mutable_data<A>(wide), mutable_data<A>(loss));
  });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& w, const Tensor& f,
                                       const Tensor& target, int64_t needs) {
  const Device device(w);
  Tensor d_w = empty_gradient(w, needs, 0), d_f = empty_gradient(f, needs, 1),
         d_target = empty_gradient(target, needs, 2);
  if (d_w.numel() + d_f.numel() + d_target.numel() == 0) return {d_w, d_f, d_target};
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const Shape shape = Shape::of<A>(d_loss.numel(), f.size(-2), f.size(-1));
    const Tensor wide = wide_sums<A>(shape, w);
    launch(shape.grid<A>(device.stream()), feature_distillation_loss_bwd_kernel<kBlock, T>, shape,
           data<A>(d_loss), values(w), data<T>(f), values(target), mutable_data<A>(wide),
           mutable_values(d_w), mutable_data<T>(d_f), mutable_values(d_target));
  });
  return {d_w, d_f, d_target};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("feature_distillation_loss", TORCH_BOX(&fwd));
  m.impl("feature_distillation_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
