// Weights of packed rays from opacities: w_i = T_i a_i, T_{i+1} = T_i (1 - a_i); T_n, of n samples,
// remains for the background.
// A warp owns a ray, a block a long one, a thread kItems samples of each tile. Forward: one pass
// over memory. Backward: one, or two where a ray has several tiles; it divides by nothing, so that
// a = 1 is exact: d_a_i = T_i (d_w_i - B_i),
// B_i = d_w_{i+1} a_{i+1} + d_T_{i+1} + (1 - a_{i+1}) B_{i+1}, which starts from the gradient of
// T_n. docs/compositing.md
#include "packed_tiles.h"

namespace rayfuse {
namespace {

template <class T>
__global__ void __launch_bounds__(kBlock, kResidentBlocks<T>)
    packed_alpha_weights_fwd_kernel(int64_t R, int64_t P,
                                    const T* __restrict__ alpha,               // [P]
                                    const int64_t* __restrict__ offsets,       // [R+1]
                                    accumulator<T>* __restrict__ w,            // [P]
                                    accumulator<T>* __restrict__ light,        // [P]
                                    accumulator<T>* __restrict__ remaining) {  // [R]
  using A = accumulator<T>;
  for_each_stray_sample(offsets, R, P, [&](int64_t k) { w[k] = light[k] = 0; });
  for_each_packed_ray(offsets, R, P, [&]<int kThreads>(const Team<kThreads>& team, PackedRay ray) {
    RunningProduct<A> passed;
    for_each_tile(team, ray, false, [&](const PackedTile<kThreads>& tile) {
      A alpha_here[kItems];
      tile.load(alpha, alpha_here);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (!tile.reaches(i)) break;
        const A light_i = passed.add(team, 1 - alpha_here[i]);
        tile.store(w, i, light_i * alpha_here[i]);
        tile.store(light, i, light_i);
      }
    });
    if (team.rank == 0) remaining[ray.index] = passed.product;
  });
}

template <class T>
__global__ void __launch_bounds__(kBlock, kResidentBlocks<T>)
    packed_alpha_weights_bwd_kernel(int64_t R, int64_t P,
                                    const accumulator<T>* __restrict__ d_w,          // [P] or null
                                    const accumulator<T>* __restrict__ d_light,      // [P] or null
                                    const accumulator<T>* __restrict__ d_remaining,  // [R] or null
                                    const T* __restrict__ alpha,                     // [P]
                                    const int64_t* __restrict__ offsets,             // [R+1]
                                    T* d_alpha) {                                    // [P]
  using A = accumulator<T>;
  for_each_stray_sample(offsets, R, P, [&](int64_t k) { d_alpha[k] = narrow<T>(0); });
  for_each_packed_ray(offsets, R, P, [&]<int kThreads>(const Team<kThreads>& team, PackedRay ray) {
    using Tile = PackedTile<kThreads>;
    using Passed = RunningProduct<A>;
    ChainBack<A> behind{d_remaining ? d_remaining[ray.index] : A(0)};
    there_and_back<Passed>(
        team, ray, false, d_alpha,
        [&](const Tile& tile, Passed& passed) {
          A alpha_here[kItems];
          tile.load(alpha, alpha_here);
#pragma unroll
          for (int i = 0; i < kItems; ++i) passed.add(team, 1 - alpha_here[i]);
        },
        [&](const Tile& tile, Passed& passed) {
          A alpha_here[kItems], light[kItems], d_w_here[kItems] = {}, d_light_here[kItems] = {};
          tile.load(alpha, alpha_here);
          if (d_w) tile.load(d_w, d_w_here);
          if (d_light) tile.load(d_light, d_light_here);
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            if (tile.reaches(i)) light[i] = passed.add(team, 1 - alpha_here[i]);
          }
#pragma unroll
          for (int i = kItems - 1; i >= 0; --i) {
            if (!tile.reaches(i)) continue;
            const A later = behind.add(
                team, {1 - alpha_here[i], d_w_here[i] * alpha_here[i] + d_light_here[i]});
            tile.store(d_alpha, i, light[i] * (d_w_here[i] - later));
          }
        });
  });
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& alpha, const Tensor& offsets) {
  const Device device(alpha);
  const int64_t R = offsets.numel() - 1, P = alpha.numel();
  const int32_t dtype = accumulator_dtype(alpha);
  Tensor w = empty(alpha, {P}, dtype), transmittance = empty(alpha, {P}, dtype),
         remaining = empty(alpha, {R}, dtype);
  dispatch(alpha, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    launch(packed_grid(R, device.stream()), packed_alpha_weights_fwd_kernel<T>, R, P,
           data<T>(alpha), data<int64_t>(offsets), mutable_data<A>(w),
           mutable_data<A>(transmittance), mutable_data<A>(remaining));
  });
  return {w, transmittance, remaining};
}

Tensor bwd(std::optional<Tensor> d_w, std::optional<Tensor> d_transmittance,
           std::optional<Tensor> d_remaining, const Tensor& alpha, const Tensor& offsets,
           int64_t needs) {
  const Device device(alpha);
  const int64_t R = offsets.numel() - 1, P = alpha.numel();
  Tensor d_alpha = empty_gradient(alpha, needs, 0);
  if (d_alpha.numel() == 0) return d_alpha;
  dispatch(alpha, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    launch(packed_grid(R, device.stream()), packed_alpha_weights_bwd_kernel<T>, R, P, data<A>(d_w),
           data<A>(d_transmittance), data<A>(d_remaining), data<T>(alpha), data<int64_t>(offsets),
           mutable_data<T>(d_alpha));
  });
  return d_alpha;
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_alpha_weights", TORCH_BOX(&fwd));
  m.impl("packed_alpha_weights_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
