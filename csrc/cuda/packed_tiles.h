// Packed rays in tiles, one sample of each thread of a team at a time, kItems times: running
// products beside the sums of packed.h, and the way back of a scan from what it had on the way
// there.
#pragma once

#include "launch.h"
#include "packed.h"
#include "products.h"

#include <algorithm>
#include <cstring>

namespace rayfuse {

// Samples of a thread that are loaded before the first is used.
constexpr int kItems = 4;

// One block at least, for samples of no ray.
inline Grid packed_grid(int64_t R, cudaStream_t stream) {
  return {std::max<int64_t>(packed_blocks(R), 1), kBlock, 0, stream};
}

// kItems samples of each thread, from place `first` on: rows of a sample of each. Places count
// along the scan, which takes the samples of its ray from begin to end, or reversed from end to
// begin.
template <int kThreads>
struct PackedTile {
  static constexpr int kSize = kThreads * kItems;

  const Team<kThreads>& team;
  const PackedRay& ray;
  const bool reverse;
  const int64_t first;
  // where in the tile the ray begins and ends, in 32 bits; behind the tile it is kSize + 1
  const int begin = static_cast<int>(max(ray.begin - first, int64_t{0}));
  const int end = static_cast<int>(min(ray.end - first, int64_t{kSize + 1}));

  // Where the tiles of a ray start: at whole sectors of every type.
  __device__ static int64_t first_of(const PackedRay& ray, bool reverse) {
    if (!reverse) return first_tile(ray.begin);
    return ray.begin + ray.end - first_tile(ray.end - 1) - kSector<half>;
  }

  // Whether the ray reaches a row, the same for the whole team: most rays are shorter than a tile.
  __device__ bool reaches(int i) const { return i * kThreads < end; }
  __device__ int place(int i) const { return i * kThreads + team.rank; }
  __device__ bool has(int i) const { return begin <= place(i) && place(i) < end; }
  __device__ bool is_last(int i) const { return place(i) == end - 1; }
  __device__ int64_t sample_at(int64_t place) const {
    return reverse ? ray.begin + ray.end - 1 - place : place;
  }

  // What an array has of this thread's sample in row i.
  template <class T>
  __device__ T& at(T* array, int i) const {
    return array[sample_at(first + team.rank) + (reverse ? -i : i) * kThreads];
  }
  // Those outside of the ray are `outside`.
  template <class T>
  __device__ void load(const T* from, accumulator<T> (&to)[kItems],
                       accumulator<T> outside = 0) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) to[i] = has(i) ? widen(at(from, i)) : outside;
  }
  template <class T>
  __device__ void store(T* to, int i, accumulator<T> x) const {
    if (has(i)) at(to, i) = narrow<T>(x);
  }
};

// Calls visit(tile) for the tiles of a ray in the order of the scan.
template <int kThreads, class Visit>
__device__ void for_each_tile(const Team<kThreads>& team, const PackedRay& ray, bool reverse,
                              const Visit& visit) {
  using Tile = PackedTile<kThreads>;
  if (ray.begin == ray.end) return;
  for (int64_t first = Tile::first_of(ray, reverse); first < ray.end; first += Tile::kSize) {
    visit(Tile{team, ray, reverse, first});
  }
}

// Calls there(tile, state) for all tiles but the last, which takes the state past the tile; then
// back(tile, state) from the last to the first, each with the state before it. States wait in
// `kept`, [P], where the results of their tiles will be.
template <class State, int kThreads, class T, class There, class Back>
__device__ void there_and_back(const Team<kThreads>& team, const PackedRay& ray, bool reverse,
                               T* kept, const There& there, const Back& back) {
  using Tile = PackedTile<kThreads>;
  if (ray.begin == ray.end) return;
  const auto kept_at = [&](const Tile& tile) {
    constexpr int kValues = sizeof(State) / sizeof(T);
    return kept + (reverse ? tile.sample_at(tile.first + kValues - 1) : tile.first);
  };
  State state;
  int64_t first = Tile::first_of(ray, reverse);
  for (; first + Tile::kSize < ray.end; first += Tile::kSize) {
    const Tile tile{team, ray, reverse, first};
    if (team.rank == 0 && first > ray.begin) memcpy(kept_at(tile), &state, sizeof(State));
    there(tile, state);
  }
  sync(team);
  for (; first + Tile::kSize > ray.begin; first -= Tile::kSize) {
    const Tile tile{team, ray, reverse, first};
    if (first + Tile::kSize < ray.end) {
      state = {};
      if (first > ray.begin) memcpy(static_cast<void*>(&state), kept_at(tile), sizeof(State));
      sync(team);
    }
    back(tile, state);
  }
}

// A running product along a ray, like Running.
template <class A>
struct RunningProduct {
  A product = 1;

  // The product before this thread's x, as the scan goes.
  template <int kThreads>
  __device__ A add(const Team<kThreads>& team, A x) {
    const auto [before, total] = team.template scan<false>(Product<A>{x});
    const A here = product * before.value;
    product *= total.value;
    return here;
  }
};

// y -> add + scale y from sample to sample, against the order of the scan.
template <class A>
struct ChainBack {
  A y;

  // The value that comes into this thread's sample.
  template <int kThreads>
  __device__ A add(const Team<kThreads>& team, const Chain<A>& link) {
    const auto [before, total] = team.template scan<true>(link);
    const A here = before(y);
    y = total(y);
    return here;
  }
};

}  // namespace rayfuse
