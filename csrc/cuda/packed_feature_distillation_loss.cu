// Feature distillation of packed rays: loss = mean_c (F_c - target_c)^2 with the rendering
// F = sum_s w_s f_s. A warp owns a ray, a block a long one, as in packed_features.h. Forward: one
// pass over f. Backward: one for F, which gives g = d_loss 2/C (F - target) and d_target = -g, and
// one more, from the L2 cache, for d_w_s = <g, f_s>; d_f_s = w_s g.
#include "packed_features.h"

namespace rayfuse {
namespace {

template <class T>
__global__ void __launch_bounds__(kBlock, 1)
    packed_feature_distillation_loss_fwd_kernel(PackedShape shape,
                                                Values w,                             // [P]
                                                const T* __restrict__ f,              // [P, C]
                                                Values target,                        // [R, C]
                                                const int64_t* __restrict__ offsets,  // [R+1]
                                                accumulator<T>* loss) {               // [R]
  using A = accumulator<T>;
  for_each_packed_ray(
      offsets, shape.R, shape.P, [&]<int kThreads>(const Team<kThreads>& team, PackedRay ray) {
        A own = 0;
        PackedFeatures<kThreads, T>(team, ray, shape, w, f).add_up([&](int c, A sum) {
          const A off = sum - value_at<A>(target, ray.index * shape.C + c);
          own += off * off;
        });
        const A total = team.sum(own);
        if (team.rank == 0) loss[ray.index] = total / shape.C;
      });
}

template <class T>
__global__ void __launch_bounds__(kBlock, 1) packed_feature_distillation_loss_bwd_kernel(
    PackedShape shape,
    const accumulator<T>* __restrict__ d_loss,  // [R]
    Values w,                                   // [P]
    const T* __restrict__ f,                    // [P, C]
    Values target,                              // [R, C]
    const int64_t* __restrict__ offsets,        // [R+1]
    accumulator<T>* wide,                       // [R, C], or null where g is on chip
    MutableValues d_w,                          // [P]
    T* d_f,                                     // [P, C] or null
    MutableValues d_target) {                   // [R, C]
  using A = accumulator<T>;
  clear_stray_features(offsets, shape, d_w, d_f);
  for_each_packed_ray(
      offsets, shape.R, shape.P, [&]<int kThreads>(const Team<kThreads>& team, PackedRay ray) {
        A* const g = wide ? wide + ray.index * shape.C
                          : reinterpret_cast<A*>(shared_memory) + team.index * shape.C;
        const PackedFeatures<kThreads, T> features(team, ray, shape, w, f);
        const A scale = 2 * d_loss[ray.index] / shape.C;
        // other rays' g may still be read there
        sync(team);
        features.add_up([&](int c, A sum) {
          const int64_t place = ray.index * shape.C + c;
          g[c] = scale * (sum - value_at<A>(target, place));
          if (d_target.data) set_value(d_target, place, -g[c]);
        });
        sync(team);
        if (d_w.data || d_f) features.spread(g, d_w, d_f);
      });
}

}  // namespace
}  // namespace rayfuse

#include "ray_features_registration.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& w, const Tensor& f, const Tensor& target, const Tensor& offsets) {
  const Device device(w);
  const PackedShape shape(offsets.numel() - 1, w.numel(), f.size(-1));
  Tensor loss = empty(w, {shape.R}, accumulator_dtype(w));
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    launch(shape.grid(0, device.stream()), packed_feature_distillation_loss_fwd_kernel<T>, shape,
           values(w), data<T>(f), values(target), data<int64_t>(offsets),
           mutable_data<accumulator<T>>(loss));
  });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& w, const Tensor& f,
                                       const Tensor& target, const Tensor& offsets, int64_t needs) {
  const Device device(w);
  const PackedShape shape(offsets.numel() - 1, w.numel(), f.size(-1));
  Tensor d_w = empty_gradient(w, needs, 0), d_f = empty_gradient(f, needs, 1),
         d_target = empty_gradient(target, needs, 2);
  if (d_w.numel() + d_f.numel() + d_target.numel() == 0) return {d_w, d_f, d_target};
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    // a gradient of each warp's ray; 8 KB are for what sums declare themselves
    const size_t on_chip = kPackedRays * shape.C * sizeof(A);
    const bool is_wide = on_chip > kSharedBytes - 8192;
    const Tensor wide = empty(w, {is_wide ? shape.R * shape.C : 0}, accumulator_dtype(w));
    launch(shape.grid(is_wide ? 0 : on_chip, device.stream()),
           packed_feature_distillation_loss_bwd_kernel<T>, shape, data<A>(d_loss), values(w),
           data<T>(f), values(target), data<int64_t>(offsets), mutable_data<A>(wide),
           mutable_values(d_w), mutable_data<T>(d_f), mutable_values(d_target));
  });
  return {d_w, d_f, d_target};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_feature_distillation_loss", TORCH_BOX(&fwd));
  m.impl("packed_feature_distillation_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
