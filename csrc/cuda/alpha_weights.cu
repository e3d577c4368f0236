// Weights from opacities: w_i = T_i a_i, T_{i+1} = T_i (1 - a_i).
// A few threads own a ray, a block a long one, a thread a run of its samples; a block reads its
// rays as one piece. Forward: one pass over memory. Backward: one, or two where a ray does not fit
// on chip; it divides by nothing, so that a = 1 is exact: d_a_i = T_i (d_w_i - B_i), B_i =
// d_w_{i+1} a_{i+1} + d_T_{i+1} + (1 - a_{i+1}) B_{i+1}, which starts from the gradient of the last
// T. docs/compositing.md
#include "products.h"
#include "transmittance.h"

#include <cstring>

namespace rayfuse {
namespace {

constexpr int kFwdArrays = 3, kBwdArrays = 4;

// The light that a thread's samples let through, over the team.
template <int kThreads, class A>
__device__ auto scan_light(const Team<kThreads>& team, const Tile& tile, const A* alpha) {
  Product<A> own = Product<A>::none();
  for (int k = tile.begin; k < tile.end; ++k) own.value *= 1 - alpha[k];
  return team.template scan<false>(own);
}

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, 1)
    alpha_weights_fwd_kernel(int64_t R, int64_t S, int rays_per_block, int tile_size, int chip,
                             const T* __restrict__ alpha,                   // [R, S]
                             accumulator<T>* __restrict__ w,                // [R, S]
                             accumulator<T>* __restrict__ transmittance) {  // [R, S+1]
  using A = accumulator<T>;
  const Team<kThreads> team;
  const BlockRays rays(R, S, rays_per_block);
  A* const arrays = reinterpret_cast<A*>(shared_memory);
  A light_of_tile = 1;
  for (int64_t first = 0; first == 0 || first < S; first += tile_size) {
    const Tile tile(team, rays, first, tile_size);
    const T* const alpha_from = alpha + rays.first * S + first;
    A* const w_to = w + rays.first * S + first;
    A* const light_to = transmittance + rays.first * (S + 1) + first;
    A* const alpha_here = on_chip(arrays, alpha_from);
    A* const w_here = on_chip(arrays + chip, w_to);
    A* const light_here = on_chip(arrays + 2 * chip, light_to);
    load(alpha_from, alpha_here, rays.span(S, tile.count));
    __syncthreads();
    const A* const alpha_chip = alpha_here + team.index * S;
    A *const w_chip = w_here + team.index * S, *const light_chip =
                                                   light_here + team.index * (S + 1);
    const auto [before, total] = scan_light(team, tile, alpha_chip);
    A light = light_of_tile * before.value;
    for (int k = tile.begin; k < tile.end; ++k) {
      w_chip[k] = light * alpha_chip[k];
      light_chip[k] = light;
      light *= 1 - alpha_chip[k];
    }
    light_of_tile *= total.value;
    if (tile.is_last() && team.index < rays.count && team.rank == 0) {
      light_chip[tile.count] = light_of_tile;
    }
    __syncthreads();
    store(w_to, w_here, rays.span(S, tile.count));
    store(light_to, light_here, rays.span(S + 1, tile.count + tile.is_last()));
    __syncthreads();
  }
}

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, 1) alpha_weights_bwd_kernel(
    int64_t R, int64_t S, int rays_per_block, int tile_size, int chip,
    const accumulator<T>* __restrict__ d_w,              // [R, S] or null
    const accumulator<T>* __restrict__ d_transmittance,  // [R, S+1] or null
    const T* __restrict__ alpha,                         // [R, S]
    T* d_alpha) {                                        // [R, S]
  using A = accumulator<T>;
  const Team<kThreads> team;
  const BlockRays rays(R, S, rays_per_block);
  A* const arrays = reinterpret_cast<A*>(shared_memory);
  T* const d_alpha_rays = d_alpha + rays.first * S;
  const auto load_alpha = [&](const Tile& tile) {
    const T* const from = alpha + rays.first * S + tile.first;
    A* const here = on_chip(arrays, from);
    load(from, here, rays.span(S, tile.count));
    __syncthreads();
    return here + team.index * S;
  };

  // the light that reaches each tile is kept where its gradients will be
  A light_of_tile = 1;
  int64_t first = 0;
  for (; first + tile_size < S; first += tile_size) {
    if (threadIdx.x == 0) memcpy(d_alpha_rays + first, &light_of_tile, sizeof(A));
    const Tile tile(team, rays, first, tile_size);
    light_of_tile *= scan_light(team, tile, load_alpha(tile)).total.value;
    __syncthreads();
  }

  const bool mine = team.index < rays.count;
  A behind_tile =
      d_transmittance && mine ? d_transmittance[(rays.first + team.index) * (S + 1) + S] : A(0);
  for (; first >= 0; first -= tile_size) {
    const Tile tile(team, rays, first, tile_size);
    if (!tile.is_last()) memcpy(&light_of_tile, d_alpha_rays + first, sizeof(A));
    const A* const d_w_from = d_w + rays.first * S + first;
    const A* const d_light_from = d_transmittance + rays.first * (S + 1) + first;
    A* const d_w_here = on_chip(arrays + chip, d_w_from);
    A* const d_light_here = on_chip(arrays + 2 * chip, d_light_from);
    if (d_w) load(d_w_from, d_w_here, rays.span(S, tile.count));
    if (d_transmittance) load(d_light_from, d_light_here, rays.span(S + 1, tile.count));
    const A* const alpha_chip = load_alpha(tile);
    const A *const d_w_chip = d_w_here + team.index * S, *const d_light_chip =
                                                             d_light_here + team.index * (S + 1);
    A* const d_alpha_here = on_chip(arrays + 3 * chip, d_alpha_rays + first);
    A* const d_alpha_chip = d_alpha_here + team.index * S;
    const auto d_w_at = [&](int k) { return d_w ? d_w_chip[k] : A(0); };
    const auto link = [&](int k) {
      const A d_light = d_transmittance ? d_light_chip[k] : A(0);
      return Chain<A>{1 - alpha_chip[k], d_w_at(k) * alpha_chip[k] + d_light};
    };

    A light = light_of_tile * scan_light(team, tile, alpha_chip).before.value;
    for (int k = tile.begin; k < tile.end; ++k) {
      d_alpha_chip[k] = light;
      light *= 1 - alpha_chip[k];
    }
    Chain<A> own = Chain<A>::none();
    for (int k = tile.end - 1; k >= tile.begin; --k) own = own.join(link(k));
    const auto [after, total] = team.template scan<true>(own);
    A behind = after(behind_tile);
    for (int k = tile.end - 1; k >= tile.begin; --k) {
      d_alpha_chip[k] *= d_w_at(k) - behind;
      behind = link(k)(behind);
    }
    behind_tile = total(behind_tile);
    __syncthreads();
    store(d_alpha_rays + first, d_alpha_here, rays.span(S, tile.count));
    __syncthreads();
  }
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

std::tuple<Tensor, Tensor> fwd(const Tensor& alpha) {
  const Device device(alpha);
  const int64_t S = alpha.size(-1);
  auto sizes = leading_sizes(alpha, 1);
  sizes.push_back(S);
  Tensor w = empty(alpha, sizes, accumulator_dtype(alpha));
  sizes.back() = S + 1;
  Tensor transmittance = empty(alpha, sizes, accumulator_dtype(alpha));
  const int64_t R = transmittance.numel() / (S + 1);
  dispatch(alpha, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const Plan<A, kFwdArrays> plan(R, S);
    const int chip = plan.template chip<T>();
    launch(plan.grid(kFwdArrays * chip, device.stream()),
           plan.teams.pick(alpha_weights_fwd_kernel<kFew, T>, alpha_weights_fwd_kernel<kWarp, T>,
                           alpha_weights_fwd_kernel<kBlock, T>),
           R, S, plan.rays_per_block, plan.tile, chip, data<T>(alpha), mutable_data<A>(w),
           mutable_data<A>(transmittance));
  });
  return {w, transmittance};
}

Tensor bwd(std::optional<Tensor> d_w, std::optional<Tensor> d_transmittance, const Tensor& alpha,
           int64_t needs) {
  const Device device(alpha);
  const int64_t S = alpha.size(-1);
  Tensor d_alpha = empty_gradient(alpha, needs, 0);
  if (d_alpha.numel() == 0) return d_alpha;
  const int64_t R = alpha.numel() / S;
  dispatch(alpha, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const Plan<A, kBwdArrays> plan(R, S);
    const int chip = plan.template chip<T>();
    launch(plan.grid(kBwdArrays * chip, device.stream()),
           plan.teams.pick(alpha_weights_bwd_kernel<kFew, T>, alpha_weights_bwd_kernel<kWarp, T>,
                           alpha_weights_bwd_kernel<kBlock, T>),
           R, S, plan.rays_per_block, plan.tile, chip, d_w ? data<A>(*d_w) : nullptr,
           d_transmittance ? data<A>(*d_transmittance) : nullptr, data<T>(alpha),
           mutable_data<T>(d_alpha));
  });
  return d_alpha;
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("alpha_weights", TORCH_BOX(&fwd));
  m.impl("alpha_weights_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
