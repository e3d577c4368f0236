// A tile of an image, whose pixels are the threads of a block, and how much light each splat of its
// list stops there.
#pragma once

#include "rays.h"
#include "../math/composite_tiles.h"

#include <cmath>

namespace rayfuse {

// Splats of a list in shared memory at a time.
constexpr int kBatch = 32;
// Threads that look at the channels of a splat together.
constexpr int kTeam = 8;

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

// A splat as pixels read it, in two vectors; one that is passed over reaches nothing.
template <class A>
struct alignas(16) Splat {
  A x, y;
  A half_a, b, half_c;  // of its conic
  A opacity;
  A reach;  // alpha is less than min_alpha wherever sigma is greater

  __device__ A sigma(A dx, A dy) const {
    // as it is fused, so that all passes over a list agree to the bit
    return fma(half_a * dx, dx, dy * fma(half_c, dy, b * dx));
  }
};

// Splats of a list in shared memory.
template <class T>
struct Batch {
  using A = accumulator<T>;

  Splat<A> splat[kBatch];
  int64_t id[kBatch];

  // All threads of the block, kTeam for a splat.
  __device__ void load(const Scene<T>& scene, int64_t first, int count) {
    const int lane = threadIdx.x % kTeam;
    for (int k = threadIdx.x / kTeam; k < kBatch; k += blockDim.x / kTeam) {
      const bool listed = k < count;
      const int64_t own = listed ? splat_at(scene, first + k) : 0;
      Splat<A> here = {};
      A nothing = 0;
      if (listed) {
        const A* const mean = scene.means2d + 2 * own;
        const A* const conic = scene.conics + 3 * own;
        here = {mean[0], mean[1], conic[0] / 2, conic[1], conic[2] / 2, scene.opacities[own], -1};
        // what is not finite, times 0, is NaN
        nothing = 0 * (mean[0] + mean[1] + conic[0] + conic[1] + conic[2] + here.opacity);
#pragma unroll 2
        for (int64_t d = lane; d < scene.channels(); d += kTeam) {
          nothing += 0 * channel_of(scene, own, d);
        }
      }
#pragma unroll
      for (int lanes = kTeam / 2; lanes > 0; lanes /= 2) {
        nothing += __shfl_xor_sync(kAllLanes, nothing, lanes);
      }
      if (lane > 0) continue;
      // with more than what the logarithm and exp round off
      const A reach = std::log(here.opacity / scene.min_alpha) + A(1e-4);
      here.reach = listed && nothing == 0 ? reach : A(-1);
      splat[k] = here;
      id[k] = own;
    }
  }

  __device__ A alpha(const Scene<T>& scene, int k, const Pixel<T>& pixel) const {
    const Splat<A> own = splat[k];
    const A sigma = own.sigma(own.x - pixel.x, own.y - pixel.y);
    if (!(sigma >= 0 && sigma <= own.reach)) return 0;
    const A most = own.opacity * std::exp(-sigma);
    return most >= scene.min_alpha ? min(most, scene.max_alpha) : A(0);
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
