// Threads that read and write rays as one piece, of which each has a team, and what they carry from
// tile to tile.
#pragma once

#include "rays.h"

namespace rayfuse {

// The threads that read and write together, a team of which has each ray.
template <int kThreads>
struct Crew {
  static constexpr int kSize = kThreads < kWarp ? kWarp : kThreads, kTeams = kSize / kThreads;

  const Team<kThreads> team;
  const int index = threadIdx.x / kSize, rank = threadIdx.x % kSize;
  const int team_index = team.index % kTeams;

  __device__ void sync() const {
    if constexpr (kSize == kWarp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
  // Arrays of the crew on chip, one after the other; what they held has been read.
  template <class T>
  __device__ accumulator<T>* read(const T* from, accumulator<T>* room, int n) const {
    accumulator<T>* const here = on_chip(room, from);
    load(from, here, n, rank, kSize);
    return here;
  }
  template <class T>
  __device__ void write(T* to, const accumulator<T>* here, int n) const {
    store(to, here, n, rank, kSize);
  }
};

// The samples of a tile: of a crew's rays, which lie end to end, and of a team's and a thread's
// among these.
struct Piece {
  int64_t first, from;  // in the ray, in memory
  int all, own, count, begin = 0, end = 0;
  bool exists;

  template <class Rays>
  __device__ Piece(const Rays& rays, int64_t tile_first, int tile)
      : first(max(tile_first, int64_t{0})),
        from(rays.begin + first),
        own(rays.own),
        count(static_cast<int>(min(tile_first + tile, rays.samples) - first)),
        exists(rays.exists) {
    all = rays.others + count;
    constexpr int kThreads = Rays::kThreads;
    const int each = (count + kThreads - 1) / kThreads | 1;
    const int rank = rays.crew.team.rank;
    if (exists) begin = own + min(rank * each, count), end = min(begin + each, own + count);
  }
};

// A sum of tiles: what a step rounds off is added with the next one, so that a million samples lose
// no more than a few.
template <class A>
struct TileSum {
  A sum = 0, lost = 0;

  __device__ void add(A x) {
    const A term = x - lost, next = sum + term;
    lost = (next - sum) - term;
    sum = next;
  }
};

}  // namespace rayfuse
