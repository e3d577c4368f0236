// A tile of an image, whose pixels are the threads of a block, and how much light each splat of its
// list stops there.
#pragma once

#include "rays.h"
#include "../math/composite_tiles.h"

#include <cmath>

namespace rayfuse {

// Splats of a list in shared memory at a time.
constexpr int kBatch = 16;
// Threads that look at the channels of a splat together.
constexpr int kTeam = 16;

// A list within flatten_ids and ids of splats, whatever the tensors hold.
struct List {
  int64_t begin, listed, n;

  template <class T>
  __device__ List(const Scene<T>& scene, int64_t t) {
    begin = min(max(scene.offsets[t], int64_t{0}), scene.M);
    listed = max(min(scene.list_end(t), scene.M) - begin, int64_t{0});
    n = scene.masks && !scene.masks[t] ? 0 : listed;
  }
};
template <class T>
__device__ int64_t splat_at(const Scene<T>& scene, int64_t place) {
  return min(max(scene.ids[place], int64_t{0}), scene.P - 1);
}

template <class T>
__device__ accumulator<T> channel_of(const Scene<T>& scene, int64_t id, int64_t c) {
  return c < scene.D ? widen(scene.colors[id * scene.D + c]) : scene.depths[id];
}

// The pixel of a thread.
template <class T>
struct Pixel {
  using A = accumulator<T>;

  int64_t image, index;
  A x, y;
  bool exists;

  // Tiles are fewer than 2^31, and divisions of 64 bits are calls.
  __device__ Pixel(const Scene<T>& scene, unsigned t) {
    const unsigned of_image = static_cast<unsigned>(scene.Y * scene.X);
    const unsigned across = static_cast<unsigned>(scene.X), tile = t % of_image;
    const int size = static_cast<int>(scene.size), rank = threadIdx.x;
    const int64_t column = int64_t{tile % across} * size + rank % size;
    const int64_t row = int64_t{tile / across} * size + rank / size;
    image = t / of_image;
    index = (image * scene.H + row) * scene.W + column;
    x = static_cast<A>(column) + scene.center;
    y = static_cast<A>(row) + scene.center;
    exists = rank < size * size && column < scene.W && row < scene.H;
  }
};

// Splats of a list in shared memory; those that are passed over have opacity 0.
template <class T>
struct Batch {
  using A = accumulator<T>;

  A x[kBatch], y[kBatch], a[kBatch], b[kBatch], c[kBatch], opacity[kBatch];
  int64_t id[kBatch];

  // All threads of the block, kTeam for a splat.
  __device__ void load(const Scene<T>& scene, int64_t first, int64_t count) {
    const int lane = threadIdx.x % kTeam;
    for (int k = threadIdx.x / kTeam; k < kBatch; k += blockDim.x / kTeam) {
      const bool listed = k < count;
      const int64_t own = listed ? splat_at(scene, first + k) : 0;
      A own_x = 0, own_y = 0, own_a = 0, own_b = 0, own_c = 0, own_opacity = 0, nothing = 0;
      if (listed) {
        own_x = scene.means2d[2 * own];
        own_y = scene.means2d[2 * own + 1];
        own_a = scene.conics[3 * own];
        own_b = scene.conics[3 * own + 1];
        own_c = scene.conics[3 * own + 2];
        own_opacity = scene.opacities[own];
        // what is not finite, times 0, is NaN
        nothing = 0 * (own_x + own_y + own_a + own_b + own_c + own_opacity);
        for (int64_t d = lane; d < scene.channels(); d += kTeam) {
          nothing += 0 * channel_of(scene, own, d);
        }
      }
#pragma unroll
      for (int lanes = kTeam / 2; lanes > 0; lanes /= 2) {
        nothing += __shfl_xor_sync(kAllLanes, nothing, lanes);
      }
      if (lane > 0) continue;
      const bool seen = nothing == 0;
      id[k] = own;
      x[k] = seen ? own_x : A(0);
      y[k] = seen ? own_y : A(0);
      a[k] = seen ? own_a : A(0);
      b[k] = seen ? own_b : A(0);
      c[k] = seen ? own_c : A(0);
      opacity[k] = seen ? own_opacity : A(0);
    }
  }

  __device__ A alpha(const Scene<T>& scene, int k, const Pixel<T>& pixel) const {
    const A dx = x[k] - pixel.x, dy = y[k] - pixel.y;
    const A sigma = A(0.5) * (a[k] * dx * dx + c[k] * dy * dy) + b[k] * dx * dy;
    const A most = opacity[k] * std::exp(-sigma);
    return sigma >= 0 && most >= scene.min_alpha ? (most < scene.max_alpha ? most : scene.max_alpha)
                                                 : A(0);
  }
};

// Along the list of a pixel.
template <class A>
struct Passing {
  A transmittance = 1;
  bool ended;

  // The part of this alpha that counts: all, or nothing where the pixel has ended.
  __device__ A meet(A alpha, A ending) {
    const A after = transmittance * (1 - alpha);
    ended = ended || !(after > ending);
    if (ended) return 0;
    transmittance = after;
    return alpha;
  }
};

// Whole warps for a tile.
inline int threads_of(int64_t tile_size) {
  return static_cast<int>((tile_size * tile_size + kWarp - 1) / kWarp * kWarp);
}

}  // namespace rayfuse
