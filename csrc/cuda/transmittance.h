// What the kernels that go along rays of samples between edges share: the tile on chip, sums over a
// team, the light that densities let through, and how a kernel goes over all rays.
#pragma once

#include "launch.h"
#include "rays.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace rayfuse {

template <class A>
constexpr A kLargest = std::numeric_limits<A>::max();
template <class A>
constexpr A kSmallest = std::numeric_limits<A>::min();
template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float expm1_of(float x) { return expm1f(x); }
__device__ inline double expm1_of(double x) { return expm1(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }

// n sums over a team.
template <class A, int n>
struct Sums {
  A value[n];

  template <class F>
  __device__ static Sums each(const F& f) {
    Sums out;
#pragma unroll
    for (int i = 0; i < n; ++i) out.value[i] = f(i);
    return out;
  }
  __device__ Sums join(const Sums& next) const {
    return each([&](int i) { return value[i] + next.value[i]; });
  }
  __device__ Sums shuffle(int lane) const {
    return each([&](int i) { return __shfl_sync(kAllLanes, value[i], lane); });
  }
  __device__ Sums shuffle_up(int places) const {
    return each([&](int i) { return __shfl_up_sync(kAllLanes, value[i], places); });
  }
  __device__ Sums shuffle_down(int places) const {
    return each([&](int i) { return __shfl_down_sync(kAllLanes, value[i], places); });
  }
};

// How a kernel that holds so many arrays of samples on chip goes over R rays of S samples.
template <class A, int arrays>
struct Plan {
  // edges that are on chip at once: an odd number for each thread, so that its banks differ from
  // its neighbours'
  static constexpr int kEach =
      static_cast<int>(((kSharedBytes - 1024) / sizeof(A) / arrays - 80) / kBlock - 1) / 2 * 2 + 1;
  static constexpr int kMost = kBlock * kEach;

  Teams teams;
  int rays_per_block, tile;
  int64_t blocks;

  Plan(int64_t R, int64_t S)
      : teams(S, kMost),
        rays_per_block(teams.rays(kMost / (S + 1))),
        tile(static_cast<int>(std::clamp<int64_t>(S, 1, kMost - 1))),
        blocks((R + rays_per_block - 1) / rays_per_block) {}

  // Values of one array on chip.
  template <class T>
  int chip() const {
    return chip_size<T>(rays_per_block * (tile + 1));
  }
  Grid grid(size_t shared_values, cudaStream_t stream) const {
    return {blocks, rays_per_block * teams.threads, shared_values * sizeof(A), stream};
  }
};

// The rays of a block, which lie end to end.
struct BlockRays {
  int64_t first, S;
  int count;

  __device__ BlockRays(int64_t R, int64_t S, int rays)
      : first(int64_t{blockIdx.x} * rays),
        S(S),
        count(static_cast<int>(min(R - first, int64_t{rays}))) {}

  // Values of `own` on each ray, `here` of them in a tile: how many lie between the tile's first of
  // the first ray and its last of the last ray.
  __device__ int span(int64_t own, int here) const {
    return (count - 1) * static_cast<int>(own) + here;
  }
};

// Samples first .. first + count of a team's ray, on chip, and those of them that a thread owns.
struct Tile {
  int64_t first, S;
  int count, begin = 0, end = 0;

  template <int kThreads>
  __device__ Tile(const Team<kThreads>& team, const BlockRays& rays, int64_t first, int size)
      : first(first), S(rays.S), count(static_cast<int>(min(S - first, int64_t{size}))) {
    if (team.index < rays.count) {
      const int each = (count + kThreads - 1) / kThreads | 1;
      begin = min(team.rank * each, count), end = min(begin + each, count);
    }
  }
  __device__ bool is_last() const { return first + count >= S; }
};

// Edges and densities of a team's ray on chip.
template <class A>
struct Medium {
  const A *t, *sigma;

  __device__ A width(int k) const { return t[k + 1] - t[k]; }
  __device__ A mid(int k) const { return A(0.5) * (t[k] + t[k + 1]); }
  // a wall without width is nothing
  __device__ A depth(int k) const {
    return sigma[k] > kLargest<A> && width(k) == 0 ? A(0) : sigma[k] * width(k);
  }
  // of a width; a wall stays one, however thick it is
  __device__ A d_width(int k, A d_depth) const {
    return sigma[k] > kLargest<A> ? A(0) : d_depth * sigma[k];
  }
};

// Edge k + 1 of a tile gets what sample k gives it, less what sample k + 1 takes: given[k + 1] and
// taken[k] on chip; `next` is taken by the first sample of the tile to the right. All threads come
// here after a barrier.
template <class A>
__device__ void join_edges(const Tile& tile, A* given, const A* taken, A next) {
  for (int k = tile.begin; k < tile.end; ++k) {
    given[k + 1] -= k + 1 < tile.count ? taken[k + 1] : next;
  }
}

}  // namespace rayfuse
