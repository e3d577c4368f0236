// Ray weights: x_i = sigma_i dt_i, T_i = exp(-sum_{j<i} x_j), w_i = T_i (1 - exp(-x_i)).
// A few threads own a ray, a block a long one, a thread a run of its samples; a block reads its
// rays as one piece. Forward: one pass over memory. Backward: one, or two where a ray does not fit
// on chip: d_x_i = (d_w_i - d_T_{i+1}) T_{i+1} - sum_{j>i} (d_w_j w_j + d_T_{j+1} T_{j+1}),
// d_sigma_i = d_x_i dt_i, d_t_{i+1} = d_x_i sigma_i - d_x_{i+1} sigma_{i+1}. docs/compositing.md
#include "transmittance.h"

#include <cstring>

namespace rayfuse {
namespace {

constexpr int kFwdArrays = 4, kBwdArrays = 7;

// The tile's edges and densities, on chip when all have passed the barrier.
template <int kThreads, class T>
__device__ Medium<accumulator<T>> load_medium(const Team<kThreads>& team, const BlockRays& rays,
                                              const Tile& tile, const T* sigma, const T* t,
                                              accumulator<T>* chip, int chip_each) {
  const int64_t S = rays.S;
  const T* const t_from = t + rays.first * (S + 1) + tile.first;
  const T* const sigma_from = sigma + rays.first * S + tile.first;
  auto* const t_here = on_chip(chip, t_from);
  auto* const sigma_here = on_chip(chip + chip_each, sigma_from);
  load(t_from, t_here, rays.span(S + 1, tile.count + 1));
  load(sigma_from, sigma_here, rays.span(S, tile.count));
  __syncthreads();
  return {t_here + team.index * (S + 1), sigma_here + team.index * S};
}

template <class A>
__device__ A depth_at(const Medium<A>& medium, const Tile& tile, int k, bool opaque_background) {
  const bool wall = opaque_background && tile.first + k == tile.S - 1;
  return wall ? kInfinity<A> : medium.depth(k);
}

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, 1)
    ray_weights_fwd_kernel(int64_t R, int64_t S, bool opaque_background, int rays_per_block,
                           int tile_size, int chip,
                           const T* __restrict__ sigma,                   // [R, S]
                           const T* __restrict__ t,                       // [R, S+1]
                           accumulator<T>* __restrict__ w,                // [R, S]
                           accumulator<T>* __restrict__ transmittance) {  // [R, S+1]
  using A = accumulator<T>;
  const Team<kThreads> team;
  const BlockRays rays(R, S, rays_per_block);
  A* const inputs = reinterpret_cast<A*>(shared_memory);
  A left_of_tile = 0;
  for (int64_t first = 0; first == 0 || first < S; first += tile_size) {
    const Tile tile(team, rays, first, tile_size);
    const Medium<A> medium = load_medium(team, rays, tile, sigma, t, inputs, chip);
    A* const w_to = w + rays.first * S + first;
    A* const light_to = transmittance + rays.first * (S + 1) + first;
    A* const w_here = on_chip(inputs + 2 * chip, w_to);
    A* const light_here = on_chip(inputs + 3 * chip, light_to);
    A *const w_chip = w_here + team.index * S, *const light_chip =
                                                   light_here + team.index * (S + 1);
    Sums<A, 1> own = {};
    for (int k = tile.begin; k < tile.end; ++k) {
      own.value[0] += depth_at(medium, tile, k, opaque_background);
    }
    const auto [before, total] = team.template scan<false>(own);
    A depth = left_of_tile + before.value[0];
    for (int k = tile.begin; k < tile.end; ++k) {
      const A x = depth_at(medium, tile, k, opaque_background), light = exp_of(-depth);
      w_chip[k] = light * -expm1_of(-x);
      light_chip[k] = light;
      depth += x;
    }
    left_of_tile += total.value[0];
    if (tile.is_last() && team.index < rays.count && team.rank == 0) {
      light_chip[tile.count] = exp_of(-left_of_tile);
    }
    __syncthreads();
    store(w_to, w_here, rays.span(S, tile.count));
    store(light_to, light_here, rays.span(S + 1, tile.count + tile.is_last()));
    __syncthreads();
  }
}

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, kResidentBlocks<T>)
    ray_weights_bwd_kernel(int64_t R, int64_t S, bool opaque_background, int rays_per_block,
                           int tile_size, int chip,
                           const accumulator<T>* __restrict__ d_w,              // [R, S] or null
                           const accumulator<T>* __restrict__ d_transmittance,  // [R, S+1] or null
                           const T* __restrict__ sigma,                         // [R, S]
                           const T* __restrict__ t,                             // [R, S+1]
                           T* d_sigma,                                          // [R, S] or null
                           T* d_t) {                                            // [R, S+1] or null
  using A = accumulator<T>;
  const Team<kThreads> team;
  const BlockRays rays(R, S, rays_per_block);
  A* const inputs = reinterpret_cast<A*>(shared_memory);
  T* const d_sigma_rays = d_sigma ? d_sigma + rays.first * S : nullptr;
  T* const d_t_rays = d_t ? d_t + rays.first * (S + 1) : nullptr;
  // from here to the next barrier a thread's samples are its own
  A* const passed = inputs + 6 * chip + team.index * (tile_size + 1);

  // how deep each tile lies is kept where its gradients will be
  T* const kept = d_t ? d_t_rays : d_sigma_rays;
  const auto own_depth = [&](const Medium<A>& medium, const Tile& tile) {
    Sums<A, 1> own = {};
    for (int k = tile.begin; k < tile.end; ++k) {
      own.value[0] += depth_at(medium, tile, k, opaque_background);
    }
    return team.template scan<false>(own);
  };
  A left_of_tile = 0;
  int64_t first = 0;
  for (; first + tile_size < S; first += tile_size) {
    if (threadIdx.x == 0) memcpy(kept + first, &left_of_tile, sizeof(A));
    const Tile tile(team, rays, first, tile_size);
    const Medium<A> medium = load_medium(team, rays, tile, sigma, t, inputs, chip);
    left_of_tile += own_depth(medium, tile).total.value[0];
    __syncthreads();
  }

  A right_of_tile = 0, taken_next = 0;
  for (; first >= 0; first -= tile_size) {
    const Tile tile(team, rays, first, tile_size);
    if (!tile.is_last()) memcpy(&left_of_tile, kept + first, sizeof(A));
    if (d_w) {
      const A* const from = d_w + rays.first * S + first;
      load(from, on_chip(inputs + 2 * chip, from), rays.span(S, tile.count));
    }
    if (d_transmittance) {
      const A* const from = d_transmittance + rays.first * (S + 1) + first;
      load(from, on_chip(inputs + 3 * chip, from), rays.span(S + 1, tile.count + 1));
    }
    const Medium<A> medium = load_medium(team, rays, tile, sigma, t, inputs, chip);
    const A* const d_w_chip =
        on_chip(inputs + 2 * chip, d_w + rays.first * S + first) + team.index * S;
    const A* const d_light_chip =
        on_chip(inputs + 3 * chip, d_transmittance + rays.first * (S + 1) + first) +
        team.index * (S + 1);
    const auto d_w_at = [&](int k) { return d_w ? d_w_chip[k] : A(0); };
    const auto d_passed_at = [&](int k) { return d_transmittance ? d_light_chip[k + 1] : A(0); };
    A* const d_sigma_here =
        on_chip(inputs + 4 * chip, d_sigma_rays ? d_sigma_rays + first : nullptr);
    A* const d_t_here = on_chip(inputs + 5 * chip, d_t_rays ? d_t_rays + first : nullptr);
    A *const d_sigma_chip = d_sigma_here + team.index * S, *const d_t_chip =
                                                               d_t_here + team.index * (S + 1);

    A depth = left_of_tile + own_depth(medium, tile).before.value[0];
    Sums<A, 1> own = {};
    for (int k = tile.begin; k < tile.end; ++k) {
      const A x = depth_at(medium, tile, k, opaque_background), light = exp_of(-depth);
      depth += x;
      passed[k] = exp_of(-depth);
      const A later = d_w_at(k) * (light * -expm1_of(-x)) + d_passed_at(k) * passed[k];
      d_sigma_chip[k] = later;
      own.value[0] += later;
    }
    const auto [after, total] = team.template scan<true>(own);
    A later = right_of_tile + after.value[0];
    for (int k = tile.end - 1; k >= tile.begin; --k) {
      const A d_x = (d_w_at(k) - d_passed_at(k)) * passed[k] - later;
      later += d_sigma_chip[k];
      d_sigma_chip[k] = d_x * medium.width(k);
      // both given to the edge behind and taken from that in front
      passed[k] = d_t_chip[k + 1] = medium.d_width(k, d_x);
    }
    right_of_tile += total.value[0];
    __syncthreads();
    join_edges(tile, d_t_chip, passed, taken_next);
    if (first == 0 && team.index < rays.count && team.rank == 0) {
      d_t_chip[0] = S ? -passed[0] : A(0);
    }
    if (team.index < rays.count && tile.count) taken_next = passed[0];
    __syncthreads();
    if (d_sigma) store(d_sigma_rays + first, d_sigma_here, rays.span(S, tile.count));
    if (d_t) {
      const int front = first > 0;
      store(d_t_rays + first + front, d_t_here + front, rays.span(S + 1, tile.count + 1 - front));
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

std::tuple<Tensor, Tensor> fwd(const Tensor& sigma, const Tensor& t, bool opaque_background) {
  const Device device(t);
  const int64_t S = sigma.size(-1), R = t.numel() / (S + 1);
  auto sizes = leading_sizes(sigma, 1);
  sizes.push_back(S);
  Tensor w = empty(sigma, sizes, accumulator_dtype(sigma));
  sizes.back() = S + 1;
  Tensor transmittance = empty(sigma, sizes, accumulator_dtype(sigma));
  dispatch(sigma, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const Plan<A, kFwdArrays> plan(R, S);
    const int chip = plan.template chip<T>();
    launch(plan.grid(kFwdArrays * chip, device.stream()),
           plan.teams.pick(ray_weights_fwd_kernel<kFew, T>, ray_weights_fwd_kernel<kWarp, T>,
                           ray_weights_fwd_kernel<kBlock, T>),
           R, S, opaque_background, plan.rays_per_block, plan.tile, chip, data<T>(sigma),
           data<T>(t), mutable_data<A>(w), mutable_data<A>(transmittance));
  });
  return {w, transmittance};
}

std::tuple<Tensor, Tensor> bwd(std::optional<Tensor> d_w, std::optional<Tensor> d_transmittance,
                               const Tensor& sigma, const Tensor& t, bool opaque_background,
                               int64_t needs) {
  const Device device(t);
  const int64_t S = sigma.size(-1), R = t.numel() / (S + 1);
  Tensor d_sigma = empty_gradient(sigma, needs, 0), d_t = empty_gradient(t, needs, 1);
  if (d_sigma.numel() + d_t.numel() == 0) return {d_sigma, d_t};
  dispatch(sigma, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const Plan<A, kBwdArrays> plan(R, S);
    const int chip = plan.template chip<T>();
    launch(plan.grid(kBwdArrays * chip, device.stream()),
           plan.teams.pick(ray_weights_bwd_kernel<kFew, T>, ray_weights_bwd_kernel<kWarp, T>,
                           ray_weights_bwd_kernel<kBlock, T>),
           R, S, opaque_background, plan.rays_per_block, plan.tile, chip,
           d_w ? data<A>(*d_w) : nullptr, d_transmittance ? data<A>(*d_transmittance) : nullptr,
           data<T>(sigma), data<T>(t), mutable_data<T>(d_sigma), mutable_data<T>(d_t));
  });
  return {d_sigma, d_t};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("ray_weights", TORCH_BOX(&fwd));
  m.impl("ray_weights_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
