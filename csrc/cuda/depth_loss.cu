// Losses of a measured depth D: L = sum_i l_i f_i + (D - D_pred)^2 with z = s - D and a bell
// K = a exp(-z^2 / (2 v)). DS-NeRF: a = 1, v = sigma, f = -log(w + eps) K. Urban Radiance Fields:
// v = (sigma / 3)^2, a = 1 / sqrt(2 pi v), f = e^2 with e = w - K within sigma of D, w before it
// and 0 behind. A warp owns a ray, a block a long one; one pass over memory each way:
// d_w = -l K / (w + eps), or 2 l e; d_s = l log(w + eps) K z / v, or 2 l e K z / v near D.
// By mass: e = w - m, m the integral of K over the interval s -+ l / 2; no l (depth.h).
// Deng et al. (2022), Rematas et al. (2022); docs/depth.md.
#include "depth.h"
#include "samples.h"

namespace rayfuse {
namespace {

template <DepthForm form, int kThreads, class T>
__global__ void __launch_bounds__(kBlock, 1)
    depth_loss_fwd_kernel(int64_t R, int64_t S, int rays_per_block, int tile,
                          Constants<accumulator<T>> constants,
                          const T* __restrict__ w,              // [R, S]
                          const T* __restrict__ s,              // [R, S]
                          const T* __restrict__ depth,          // [R]
                          const T* __restrict__ lengths,        // [R, S] or null
                          const T* __restrict__ depth_pred,     // [R] or null
                          accumulator<T>* __restrict__ loss) {  // [R]
  using A = accumulator<T>;
  constexpr int kTeams = kBlock / kWarp;
  const Team<kThreads> team;
  Piece<T> piece(R, S, rays_per_block, tile);
  const int thread = threadIdx.x;
  __shared__ A depths[kTeams], losses[kTeams];
  if (thread < kTeams)
    depths[thread] = thread < piece.rays ? widen(depth[piece.ray + thread]) : A(0);
  A sum = 0;
  for (int64_t first = 0; first < S; first += tile) {
    piece.go_to(first);
    const int64_t own = int64_t{team.index} * S;
    const A* const w_here = piece.load(w, 1) + own;
    const A* const s_here = piece.load(s, 1) + own;
    const A* const lengths_here = lengths ? piece.load(lengths, 1) + own : nullptr;
    __syncthreads();
    const A D = depths[team.index];
    for (int k = team.rank; is_valid(D) && k < piece.count_for(team.index); k += kThreads) {
      const A length = lengths ? lengths_here[k] : A(kNoLength<form>);
      sum += Sample<form, A>(w_here[k], s_here[k], length, D, constants).loss();
    }
    __syncthreads();
  }
  sum = team.sum(sum);
  if (team.rank == 0) losses[team.index] = sum;
  __syncthreads();
  if (thread < piece.rays) {
    const A D = depths[thread];
    const A off = depth_pred && is_valid(D) ? D - widen(depth_pred[piece.ray + thread]) : A(0);
    loss[piece.ray + thread] = losses[thread] + off * off;
  }
}

template <DepthForm form, int kThreads, class T>
__global__ void __launch_bounds__(kBlock, 1)
    depth_loss_bwd_kernel(int64_t R, int64_t S, int rays_per_block, int tile,
                          Constants<accumulator<T>> constants,
                          const accumulator<T>* __restrict__ d_loss,  // [R]
                          const T* __restrict__ w,                    // [R, S]
                          const T* __restrict__ s,                    // [R, S]
                          const T* __restrict__ depth,                // [R]
                          const T* __restrict__ lengths,              // [R, S] or null
                          const T* __restrict__ depth_pred,           // [R] or null
                          T* d_w,                                     // [R, S] or null
                          T* d_s,                                     // [R, S] or null
                          T* d_lengths,                               // [R, S] or null
                          T* d_depth_pred) {                          // [R] or null
  using A = accumulator<T>;
  constexpr int kTeams = kBlock / kWarp;
  const Team<kThreads> team;
  Piece<T> piece(R, S, rays_per_block, tile);
  const int thread = threadIdx.x;
  __shared__ A depths[kTeams], scales[kTeams];
  if (thread < piece.rays) {
    const A D = widen(depth[piece.ray + thread]), g = d_loss[piece.ray + thread];
    depths[thread] = D, scales[thread] = g;
    if (d_depth_pred) {
      const A d_off = is_valid(D) ? 2 * g * (widen(depth_pred[piece.ray + thread]) - D) : A(0);
      d_depth_pred[piece.ray + thread] = narrow<T>(d_off);
    }
  }
  for (int64_t first = 0; first < S; first += tile) {
    piece.go_to(first);
    const int64_t own = int64_t{team.index} * S;
    const A* const w_here = piece.load(w, 1) + own;
    const A* const s_here = piece.load(s, 1) + own;
    const A* const lengths_here = lengths ? piece.load(lengths, 1) + own : nullptr;
    A* const d_w_here = d_w ? piece.room(d_w, 1) : nullptr;
    A* const d_s_here = d_s ? piece.room(d_s, 1) : nullptr;
    A* const d_lengths_here = d_lengths ? piece.room(d_lengths, 1) : nullptr;
    __syncthreads();
    for (int k = team.rank; k < piece.count_for(team.index); k += kThreads) {
      const A D = depths[team.index], g = scales[team.index];
      const bool valid = is_valid(D);
      const A length = lengths ? lengths_here[k] : A(kNoLength<form>);
      const Sample<form, A> here(w_here[k], s_here[k], length, D, constants);
      if (d_w) d_w_here[own + k] = valid ? g * here.d_w() : A(0);
      if (d_s) d_s_here[own + k] = valid ? g * here.d_s() : A(0);
      if (d_lengths) d_lengths_here[own + k] = valid ? g * here.d_lengths() : A(0);
    }
    __syncthreads();
    if (d_w) piece.store(d_w, d_w_here, 1);
    if (d_s) piece.store(d_s, d_s_here, 1);
    if (d_lengths) piece.store(d_lengths, d_lengths_here, 1);
    __syncthreads();
  }
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

// Calls f with constants that templates can take: the form, and how many threads a team has.
template <class F>
void choose(int64_t form, bool warps, const F& f) {
  as_form(form, [&](auto form_) {
    if (warps) {
      f(form_, std::integral_constant<int, kWarp>());
    } else {
      f(form_, std::integral_constant<int, kBlock>());
    }
  });
}

Tensor fwd(const Tensor& w, const Tensor& s, const Tensor& depth,
           const std::optional<Tensor>& lengths, const std::optional<Tensor>& depth_pred,
           int64_t form, double sigma, double eps) {
  const Device device(w);
  const int64_t S = w.size(-1);
  Tensor loss = empty(w, leading_sizes(w, 1), accumulator_dtype(w));
  const int64_t R = loss.numel();
  dispatch(w, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const SamplePlan<T> plan(R, S, 3, 3, device.stream());
    const Constants<A> constants(form, sigma, eps);
    choose(form, plan.warps, [&](auto form_, auto threads) {
      launch(plan.grid, depth_loss_fwd_kernel<form_(), threads(), T>, R, S, plan.rays_per_block,
             plan.tile, constants, data<T>(w), data<T>(s), data<T>(depth), data<T>(lengths),
             data<T>(depth_pred), mutable_data<A>(loss));
    });
  });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& w,
                                               const Tensor& s, const Tensor& depth,
                                               const std::optional<Tensor>& lengths,
                                               const std::optional<Tensor>& depth_pred,
                                               int64_t form, double sigma, double eps,
                                               int64_t needs) {
  const Device device(w);
  const int64_t R = d_loss.numel(), S = w.size(-1);
  Tensor d_w = empty_gradient(w, needs, 0), d_s = empty_gradient(s, needs, 1);
  Tensor d_lengths = empty_gradient(lengths, w, needs, 2);
  Tensor d_depth_pred = empty_gradient(depth_pred, w, needs, 3);
  dispatch(w, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const SamplePlan<T> plan(R, S, 6, 6, device.stream());
    const Constants<A> constants(form, sigma, eps);
    choose(form, plan.warps, [&](auto form_, auto threads) {
      launch(plan.grid, depth_loss_bwd_kernel<form_(), threads(), T>, R, S, plan.rays_per_block,
             plan.tile, constants, data<A>(d_loss), data<T>(w), data<T>(s), data<T>(depth),
             data<T>(lengths), data<T>(depth_pred), mutable_data<T>(d_w), mutable_data<T>(d_s),
             mutable_data<T>(d_lengths), mutable_data<T>(d_depth_pred));
    });
  });
  return {d_w, d_s, d_lengths, d_depth_pred};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("depth_loss", TORCH_BOX(&fwd));
  m.impl("depth_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
