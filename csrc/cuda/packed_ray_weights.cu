// Weights of packed rays: x_i = sigma_i dt_i, T_i = exp(-sum_{j<i} x_j), w_i = T_i (1 - exp(-x_i));
// T_n, of n samples, remains for the background.
// A warp owns a ray, a block a long one, a thread kItems samples of each tile. Forward: one pass
// over memory. Backward: one, or two where a ray has several tiles:
// d_x_i = d_w_i T_{i+1} - sum_{j>i} (d_w_j w_j + d_T_j T_j), j up to n with w_n = 0,
// d_sigma_i = d_x_i dt_i, d_dt_i = d_x_i sigma_i. docs/compositing.md
#include "packed_tiles.h"
#include "transmittance.h"

namespace rayfuse {
namespace {

// Nothing passes a greater depth, and sums of so many samples as memory holds stay finite.
template <class A>
constexpr A kOpaque = A(0x1p100);

template <class T>
struct Densities {
  const T *sigma, *t_starts, *t_ends;  // [P]
  bool opaque_background;
};

// The samples of a tile; those outside of the ray are empty.
template <class A>
struct Samples {
  A sigma[kItems], edges[kItems][2], x[kItems], depth[kItems];

  template <class T, class Tile>
  __device__ Samples(const Tile& tile, const Densities<T>& all) {
    A starts[kItems], ends[kItems];
    tile.load(all.sigma, sigma);
    tile.load(all.t_starts, starts);
    tile.load(all.t_ends, ends);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!tile.reaches(i)) break;
      edges[i][0] = starts[i];
      edges[i][1] = ends[i];
      x[i] = medium(i).depth(0);
      if (x[i] > kOpaque<A> || (tile.is_last(i) && all.opaque_background)) x[i] = kOpaque<A>;
    }
  }
  __device__ Medium<A> medium(int i) const { return {edges[i], &sigma[i]}; }

  // Fills depth, what lies before each sample.
  template <class Tile>
  __device__ void scan(const Tile& tile, Running<A, false>& depths) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (tile.reaches(i)) depth[i] = depths.add(tile.team, x[i]);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kBlock, kResidentBlocks<T>)
    packed_ray_weights_fwd_kernel(int64_t R, int64_t P, Densities<T> all,
                                  const int64_t* __restrict__ offsets,       // [R+1]
                                  accumulator<T>* __restrict__ w,            // [P]
                                  accumulator<T>* __restrict__ light,        // [P]
                                  accumulator<T>* __restrict__ remaining) {  // [R]
  using A = accumulator<T>;
  for_each_stray_sample(offsets, R, P, [&](int64_t k) { w[k] = light[k] = 0; });
  for_each_packed_ray(offsets, R, P, [&]<int kThreads>(const Team<kThreads>& team, PackedRay ray) {
    Running<A, false> depths;
    for_each_tile(team, ray, false, [&](const PackedTile<kThreads>& tile) {
      Samples<A> samples(tile, all);
      samples.scan(tile, depths);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (!tile.reaches(i)) break;
        const A light_i = exp_of(-samples.depth[i]);
        tile.store(w, i, light_i * -expm1_of(-samples.x[i]));
        tile.store(light, i, light_i);
      }
    });
    if (team.rank == 0) remaining[ray.index] = exp_of(-depths.sum);
  });
}

template <class T>
__global__ void __launch_bounds__(kBlock, 3 * kResidentBlocks<T> / 4)
    packed_ray_weights_bwd_kernel(int64_t R, int64_t P,
                                  const accumulator<T>* __restrict__ d_w,          // [P] or null
                                  const accumulator<T>* __restrict__ d_light,      // [P] or null
                                  const accumulator<T>* __restrict__ d_remaining,  // [R] or null
                                  Densities<T> all,
                                  const int64_t* __restrict__ offsets,  // [R+1]
                                  T* d_sigma,                           // [P] or null
                                  T* d_t_starts,                        // [P] or null
                                  T* d_t_ends) {                        // [P] or null
  using A = accumulator<T>;
  T* const kept = d_sigma ? d_sigma : d_t_starts ? d_t_starts : d_t_ends;
  for_each_stray_sample(offsets, R, P, [&](int64_t k) {
    for (T* to : {d_sigma, d_t_starts, d_t_ends}) {
      if (to) to[k] = narrow<T>(0);
    }
  });
  for_each_packed_ray(offsets, R, P, [&]<int kThreads>(const Team<kThreads>& team, PackedRay ray) {
    using Tile = PackedTile<kThreads>;
    using Depths = Running<A, false>;
    Running<A, true> behind;
    there_and_back<Depths>(
        team, ray, false, kept,
        [&](const Tile& tile, Depths& depths) { Samples<A>(tile, all).scan(tile, depths); },
        [&](const Tile& tile, Depths& depths) {
          A d_w_here[kItems] = {}, d_light_here[kItems] = {};
          if (d_w) tile.load(d_w, d_w_here);
          if (d_light) tile.load(d_light, d_light_here);
          Samples<A> samples(tile, all);
          samples.scan(tile, depths);
          // the last tile knows how deep the ray is
          if (d_remaining && tile.first + Tile::kSize >= ray.end) {
            behind.sum = d_remaining[ray.index] * exp_of(-depths.sum);
          }
#pragma unroll
          for (int i = kItems - 1; i >= 0; --i) {
            if (!tile.reaches(i)) continue;
            const A x = samples.x[i], light_i = exp_of(-samples.depth[i]);
            const A w_i = light_i * -expm1_of(-x);
            const A later = behind.add(team, d_w_here[i] * w_i + d_light_here[i] * light_i);
            const A d_x = d_w_here[i] * exp_of(-(samples.depth[i] + x)) - later;
            const A d_width = samples.medium(i).d_width(0, d_x);
            if (d_sigma) tile.store(d_sigma, i, d_x * samples.medium(i).width(0));
            if (d_t_starts) tile.store(d_t_starts, i, -d_width);
            if (d_t_ends) tile.store(d_t_ends, i, d_width);
          }
        });
  });
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& sigma, const Tensor& t_starts,
                                       const Tensor& t_ends, const Tensor& offsets,
                                       bool opaque_background) {
  const Device device(sigma);
  const int64_t R = offsets.numel() - 1, P = sigma.numel();
  const int32_t dtype = accumulator_dtype(sigma);
  Tensor w = empty(sigma, {P}, dtype), transmittance = empty(sigma, {P}, dtype),
         remaining = empty(sigma, {R}, dtype);
  dispatch(sigma, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    launch(packed_grid(R, device.stream()), packed_ray_weights_fwd_kernel<T>, R, P,
           Densities<T>{data<T>(sigma), data<T>(t_starts), data<T>(t_ends), opaque_background},
           data<int64_t>(offsets), mutable_data<A>(w), mutable_data<A>(transmittance),
           mutable_data<A>(remaining));
  });
  return {w, transmittance, remaining};
}

std::tuple<Tensor, Tensor, Tensor> bwd(std::optional<Tensor> d_w,
                                       std::optional<Tensor> d_transmittance,
                                       std::optional<Tensor> d_remaining, const Tensor& sigma,
                                       const Tensor& t_starts, const Tensor& t_ends,
                                       const Tensor& offsets, bool opaque_background,
                                       int64_t needs) {
  const Device device(sigma);
  const int64_t R = offsets.numel() - 1, P = sigma.numel();
  Tensor d_sigma = empty_gradient(sigma, needs, 0);
  Tensor d_t_starts = empty_gradient(t_starts, needs, 1);
  Tensor d_t_ends = empty_gradient(t_ends, needs, 2);
  if (P == 0 || needs == 0) return {d_sigma, d_t_starts, d_t_ends};
  dispatch(sigma, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    launch(packed_grid(R, device.stream()), packed_ray_weights_bwd_kernel<T>, R, P, data<A>(d_w),
           data<A>(d_transmittance), data<A>(d_remaining),
           Densities<T>{data<T>(sigma), data<T>(t_starts), data<T>(t_ends), opaque_background},
           data<int64_t>(offsets), mutable_data<T>(d_sigma), mutable_data<T>(d_t_starts),
           mutable_data<T>(d_t_ends));
  });
  return {d_sigma, d_t_starts, d_t_ends};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_ray_weights", TORCH_BOX(&fwd));
  m.impl("packed_ray_weights_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
