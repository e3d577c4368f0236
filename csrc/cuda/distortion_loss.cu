// Distortion loss: L = sum_j w_j (spread_j + 1/3 w_j dt_j), spread_j = sum_{k<=j} gap_k left_k with
// gap_k = t_{k+1} - t_{k-1} and left_k, right_k the weight on either side of sample k.
// A few threads own a ray, a block a long one, a thread a run of its samples; a block reads its
// rays as one piece. Forward: one pass over memory. Backward: one, or two where a ray does not fit
// on chip: d_w_j = spread_j + sum_{k>j} gap_k (w_k + right_k) + 2/3 w_j dt_j, d_t_j = (w_{j-1} +
// w_j) (left_j - 2/3 w_{j-1} - 1/3 w_j - right_j). Derivation: docs/distortion.md.
#include "launch.h"
#include "rays.h"

#include <cstring>

namespace rayfuse {
namespace {

// Samples, or edges, of a ray that are on chip at once: what the backward's four arrays leave room
// for, and an odd number for each thread, so that its banks differ from its neighbours'.
template <class A>
constexpr int kTile = kBlock * (sizeof(A) == 4 ? 11 : 5);

// A run of samples, in the order of the scan, as if nothing came before it.
template <class A>
struct Run {
  A weight, gap;
  A spread;  // from the left sum_k gap_k left_k; from the right sum_k gap_k (w_k + right_k)

  __device__ Run join(const Run& next) const {
    return {weight + next.weight, gap + next.gap, spread + next.spread + next.gap * weight};
  }
  __device__ Run shuffle(int lane) const {
    return {__shfl_sync(kAllLanes, weight, lane), __shfl_sync(kAllLanes, gap, lane),
            __shfl_sync(kAllLanes, spread, lane)};
  }
  __device__ Run shuffle_up(int places) const {
    return {__shfl_up_sync(kAllLanes, weight, places), __shfl_up_sync(kAllLanes, gap, places),
            __shfl_up_sync(kAllLanes, spread, places)};
  }
  __device__ Run shuffle_down(int places) const {
    return {__shfl_down_sync(kAllLanes, weight, places), __shfl_down_sync(kAllLanes, gap, places),
            __shfl_down_sync(kAllLanes, spread, places)};
  }
};

// A sum over a team as the simplest state.
template <class A>
struct Sum {
  A value;

  __device__ Sum join(const Sum& next) const { return {value + next.value}; }
  __device__ Sum shuffle(int lane) const { return {__shfl_sync(kAllLanes, value, lane)}; }
  __device__ Sum shuffle_up(int places) const { return {__shfl_up_sync(kAllLanes, value, places)}; }
  __device__ Sum shuffle_down(int places) const {
    return {__shfl_down_sync(kAllLanes, value, places)};
  }
};

// The rays of a block.
struct Rays {
  int64_t first, S;
  int count;

  __device__ Rays(int64_t R, int64_t S, int rays)
      : first(int64_t{blockIdx.x} * rays),
        S(S),
        count(static_cast<int>(min(R - first, int64_t{rays}))) {}
};

// Samples first .. first + count of a team's ray, on chip, and those of them that a thread owns.
// There is a sample S without weight or width, so that every edge is the left one of a sample.
template <class T>
struct Tile {
  using A = accumulator<T>;

  const A *t, *w;  // [-1 .. count], [-1 .. count - 1]
  int64_t first, S;
  int begin = 0, end = 0;

  // Several rays of a block are whole and lie end to end, on chip as in memory.
  template <int kThreads>
  __device__ Tile(const Team<kThreads>& team, const Rays& rays, const T* t_all, const T* w_all,
                  A* t_chip, A* w_chip, int64_t first, int count)
      : first(first), S(rays.S) {
    const T* const t_from = t_all + rays.first * (S + 1) + first;
    const T* const w_from = w_all + rays.first * S + first;
    A* const t_here = on_chip(t_chip, t_from);
    A* const w_here = on_chip(w_chip, w_from);
    const int samples = static_cast<int>(min(int64_t{count}, S - first));
    const int others = rays.count - 1;
    load(t_from, t_here, others * static_cast<int>(S + 1) + samples + 1);
    load(w_from, w_here, others * static_cast<int>(S) + samples);
    if (first > 0 && threadIdx.x == 0) {
      t_here[-1] = widen(t_from[-1]);
      w_here[-1] = widen(w_from[-1]);
    }
    t = t_here + team.index * (S + 1), w = w_here + team.index * S;
    if (team.index < rays.count) {
      const int each = (count + kThreads - 1) / kThreads | 1;
      begin = min(team.rank * each, count), end = min(begin + each, count);
    }
    __syncthreads();
  }

  __device__ bool exists(int k) const { return first + k < S; }
  __device__ A weight(int k) const { return exists(k) ? w[k] : A(0); }
  __device__ A weight_before(int k) const { return first + k > 0 ? w[k - 1] : A(0); }
  __device__ A width(int k) const { return exists(k) ? t[k + 1] - t[k] : A(0); }
  // before the first edge and after the last any finite gap will do: no weight lies there
  __device__ A gap(int k) const { return width(k) + (first + k > 0 ? t[k] - t[k - 1] : A(0)); }

  // This thread's samples from the left, f(k) after each one's gap has been added.
  template <class F>
  __device__ Run<A> from_left(Run<A> run, const F& f) const {
    for (int k = begin; k < end; ++k) {
      const A gap_k = gap(k);
      run.gap += gap_k;
      run.spread += gap_k * run.weight;
      f(k, run);
      run.weight += weight(k);
    }
    return run;
  }
  // And from the right, f(k) before anything of the sample has been added.
  template <class F>
  __device__ Run<A> from_right(Run<A> run, const F& f) const {
    for (int k = end - 1; k >= begin; --k) {
      f(k, run);
      const A gap_k = gap(k);
      run.gap += gap_k;
      run.weight += weight(k);
      run.spread += gap_k * run.weight;
    }
    return run;
  }
};

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, kResidentBlocks<T>)
    distortion_loss_fwd_kernel(int64_t R, int64_t S, int rays_per_block, int tile_size, int chip,
                               const T* __restrict__ t,              // [R, S+1]
                               const T* __restrict__ w,              // [R, S]
                               accumulator<T>* __restrict__ loss) {  // [R]
  using A = accumulator<T>;
  const Team<kThreads> team;
  const Rays rays(R, S, rays_per_block);
  const int thread = threadIdx.x;
  A* const t_chip = reinterpret_cast<A*>(shared_memory);
  A* const w_chip = t_chip + chip;
  Run<A> left_of_tile = {};
  Sum<A> own = {};
  for (int64_t first = 0; first < S; first += tile_size) {
    const Tile<T> tile(team, rays, t, w, t_chip, w_chip, first,
                       static_cast<int>(min(S - first, int64_t{tile_size})));
    // the loss of these samples alone, and how it grows with the weight before them
    A alone = 0, with_weight = 0;
    const Run<A> here = tile.from_left({}, [&](int k, const Run<A>& run) {
      const A w_k = tile.weight(k);
      alone += w_k * (run.spread + A(1) / 3 * (w_k * tile.width(k)));
      with_weight += w_k * run.gap;
    });
    const auto [before, total] = team.template scan<false>(here);
    const Run<A> left = left_of_tile.join(before);
    own.value += alone + with_weight * left.weight + here.weight * left.spread;
    left_of_tile = left_of_tile.join(total);
    __syncthreads();
  }
  __shared__ A losses[kBlock / kThreads];
  const A total = team.template scan<false>(own).total.value;
  if (team.rank == 0) losses[team.index] = total;
  __syncthreads();
  if (thread < rays.count) loss[rays.first + thread] = losses[thread];
}

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, kResidentBlocks<T>)
    distortion_loss_bwd_kernel(int64_t R, int64_t S, int rays_per_block, int tile_size, int chip,
                               const accumulator<T>* __restrict__ d_loss,  // [R]
                               const T* __restrict__ t,                    // [R, S+1]
                               const T* __restrict__ w,                    // [R, S]
                               T* d_t,                                     // [R, S+1] or null
                               T* d_w) {                                   // [R, S] or null
  using A = accumulator<T>;
  const Team<kThreads> team;
  const Rays rays(R, S, rays_per_block);
  const int thread = threadIdx.x;
  A* const t_chip = reinterpret_cast<A*>(shared_memory);
  A* const w_chip = t_chip + chip;
  T* const d_t_rays = d_t ? d_t + rays.first * (S + 1) : nullptr;
  T* const d_w_rays = d_w ? d_w + rays.first * S : nullptr;
  __shared__ A scales[kBlock / kThreads];
  if (thread < kBlock / kThreads) {
    scales[thread] = thread < rays.count ? d_loss[rays.first + thread] : A(0);
  }
  const auto tile_at = [&](int64_t first) {
    return Tile<T>(team, rays, t, w, t_chip, w_chip, first,
                   static_cast<int>(min(S + 1 - first, int64_t{tile_size})));
  };
  const auto ignore = [](int, const Run<A>&) {};

  // what lies left of each tile is kept where its gradients will be
  T* const kept = d_t ? d_t_rays : d_w_rays;
  Run<A> left_of_tile = {};
  int64_t first = 0;
  for (; first + tile_size <= S; first += tile_size) {
    if (thread == 0) {
      memcpy(kept + first, &left_of_tile.weight, sizeof(A));
      memcpy(kept + first + sizeof(A) / sizeof(T), &left_of_tile.spread, sizeof(A));
    }
    const Tile<T> tile = tile_at(first);
    left_of_tile = left_of_tile.join(team.template scan<false>(tile.from_left({}, ignore)).total);
    __syncthreads();
  }

  Run<A> right_of_tile = {};
  for (; first >= 0; first -= tile_size) {
    if (first + tile_size <= S) {
      memcpy(&left_of_tile.weight, kept + first, sizeof(A));
      memcpy(&left_of_tile.spread, kept + first + sizeof(A) / sizeof(T), sizeof(A));
    }
    const Tile<T> tile = tile_at(first);
    A* const d_t_here = on_chip(w_chip + chip, d_t ? d_t_rays + first : nullptr);
    A* const d_w_here = on_chip(w_chip + 2 * chip, d_w ? d_w_rays + first : nullptr);
    A* const d_t_chip = d_t_here + team.index * (S + 1);
    A* const d_w_chip = d_w_here + team.index * S;
    const A scale = scales[team.index];
    const auto left = team.template scan<false>(tile.from_left({}, ignore)).before;
    const auto [right, total] = team.template scan<true>(tile.from_right({}, ignore));
    tile.from_left(left_of_tile.join(left), [&](int k, const Run<A>& run) {
      const A w_k = tile.weight(k);
      if (tile.exists(k)) d_w_chip[k] = run.spread + A(2) / 3 * (w_k * tile.width(k));
      d_t_chip[k] = run.weight - A(2) / 3 * tile.weight_before(k) - A(1) / 3 * w_k;
    });
    tile.from_right(right_of_tile.join(right), [&](int k, const Run<A>& run) {
      if (tile.exists(k)) d_w_chip[k] = scale * (d_w_chip[k] + run.spread);
      d_t_chip[k] = scale * ((tile.weight_before(k) + tile.weight(k)) * (d_t_chip[k] - run.weight));
    });
    __syncthreads();
    const int samples = static_cast<int>(min(S - first, int64_t{tile_size}));
    const int edges = static_cast<int>(min(S + 1 - first, int64_t{tile_size}));
    const int others = rays.count - 1;
    if (d_t) store(d_t_rays + first, d_t_here, others * static_cast<int>(S + 1) + edges);
    if (d_w) store(d_w_rays + first, d_w_here, others * static_cast<int>(S) + samples);
    right_of_tile = right_of_tile.join(total);
    __syncthreads();
  }
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

// How a kernel with some arrays on chip goes over R rays of S samples.
template <class T>
struct Plan {
  Teams teams;
  int rays_per_block, tile, chip;
  Grid grid;

  Plan(int64_t R, int64_t S, int arrays, cudaStream_t stream) : teams(S, kTile<accumulator<T>>) {
    using A = accumulator<T>;
    constexpr int most = kTile<A>;
    static_assert(4 * chip_size<T>(most) * sizeof(A) + 512 <= kSharedBytes);
    tile = static_cast<int>(std::min<int64_t>(S + 1, most));
    rays_per_block = teams.rays(most / tile);
    chip = chip_size<T>(rays_per_block * tile);
    grid = {(R + rays_per_block - 1) / rays_per_block, rays_per_block * teams.threads,
            arrays * chip * sizeof(A), stream};
  }
};

Tensor fwd(const Tensor& t, const Tensor& w) {
  const Device device(t);
  const int64_t S = w.size(-1);
  Tensor loss = empty(t, leading_sizes(w, 1), accumulator_dtype(t));
  const int64_t R = loss.numel();
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    const Plan<T> plan(R, S, 2, device.stream());
    launch(
        plan.grid,
        plan.teams.pick(distortion_loss_fwd_kernel<kFew, T>, distortion_loss_fwd_kernel<kWarp, T>,
                        distortion_loss_fwd_kernel<kBlock, T>),
        R, S, plan.rays_per_block, plan.tile, plan.chip, data<T>(t), data<T>(w),
        mutable_data<accumulator<T>>(loss));
  });
  return loss;
}

std::tuple<Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& t, const Tensor& w,
                               int64_t needs) {
  const Device device(t);
  const int64_t R = d_loss.numel(), S = w.size(-1);
  Tensor d_t = empty_gradient(t, needs, 0), d_w = empty_gradient(w, needs, 1);
  if (d_t.numel() + d_w.numel() == 0) return {d_t, d_w};
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    const Plan<T> plan(R, S, 4, device.stream());
    launch(
        plan.grid,
        plan.teams.pick(distortion_loss_bwd_kernel<kFew, T>, distortion_loss_bwd_kernel<kWarp, T>,
                        distortion_loss_bwd_kernel<kBlock, T>),
        R, S, plan.rays_per_block, plan.tile, plan.chip, data<accumulator<T>>(d_loss), data<T>(t),
        data<T>(w), mutable_data<T>(d_t), mutable_data<T>(d_w));
  });
  return {d_t, d_w};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("distortion_loss", TORCH_BOX(&fwd));
  m.impl("distortion_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
