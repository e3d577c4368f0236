// What ops share whose samples do not depend on each other: a warp owns a ray, a block a long one,
// and a block reads and writes its rays as one piece of memory.
#pragma once

#include <algorithm>

#include "launch.h"
#include "rays.h"

namespace rayfuse {

// Rays of so many samples get a block each.
constexpr int kBlockSamples = 256;

// The rays of a block, and the samples of them that are on chip: all, or a tile of a single ray.
template <class T>
struct Piece {
  using A = accumulator<T>;

  const int64_t S, ray;
  const int rays, tile, most;
  int64_t first = 0;
  int count = 0;  // of each ray
  A* chip = nullptr;

  __device__ Piece(int64_t R, int64_t S, int rays_per_block, int tile)
      : S(S),
        ray(int64_t{blockIdx.x} * rays_per_block),
        rays(static_cast<int>(min(R - ray, int64_t{rays_per_block}))),
        tile(tile),
        most(rays_per_block * tile) {}

  __device__ void go_to(int64_t sample) {
    first = sample;
    count = static_cast<int>(min(S - first, int64_t{tile}));
    chip = reinterpret_cast<A*>(shared_memory);
  }
  // How many samples a team has to do with: it may be one too many.
  __device__ int count_for(int team) const { return rays > team ? count : 0; }
  // Room for these samples of an array, laid out as they are in memory.
  __device__ A* room(const T* array, int components) {
    A* const here = on_chip(chip, array + offset(components));
    chip += chip_size<T>(components * most);
    return here;
  }
  __device__ const A* load(const T* array, int components) {
    A* const here = room(array, components);
    rayfuse::load(array + offset(components), here, size(components));
    return here;
  }
  __device__ void store(T* array, const A* here, int components) const {
    rayfuse::store(array + offset(components), here, size(components));
  }

 private:
  __device__ int64_t offset(int components) const { return (ray * S + first) * components; }
  __device__ int size(int components) const {
    return (static_cast<int>((rays - 1) * S) + count) * components;
  }
};

// How blocks go over R rays of S samples, some values of which are on chip: `arrays` of them, with
// `values` in all for each sample.
template <class T>
struct SamplePlan {
  bool warps;
  int rays_per_block, tile;
  Grid grid;

  SamplePlan(int64_t R, int64_t S, int arrays, int values, cudaStream_t stream)
      : warps(S < kBlockSamples) {
    using A = accumulator<T>;
    constexpr size_t kLeft = kSharedBytes - 1024;  // for what kernels declare themselves
    const int most = (kLeft / sizeof(A) - arrays * chip_size<T>(0)) / values;
    tile = static_cast<int>(std::min<int64_t>(S, most / kBlock ? most / kBlock * kBlock : most));
    rays_per_block = warps ? std::min(kBlock / kWarp, most / std::max(tile, 1)) : 1;
    grid = {(R + rays_per_block - 1) / rays_per_block, warps ? rays_per_block * kWarp : kBlock,
            (arrays * chip_size<T>(0) + values * rays_per_block * tile) * sizeof(A), stream};
  }
};

}  // namespace rayfuse
