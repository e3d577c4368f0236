// The step from tensors to tiles on the CPU, included after the kernels of a file.
#pragma once

#include "registration.h"
#include "../tiles.h"

namespace rayfuse {

// Here a look at all values costs no synchronisation, and wrong ones would lead out of bounds.
inline void check_lists(const std::string& op, const Tensor& tile_offsets,
                        const Tensor& flatten_ids, int64_t P) {
  const auto* const offsets = data<int64_t>(tile_offsets);
  const auto* const ids = data<int64_t>(flatten_ids);
  const int64_t tiles = tile_offsets.numel(), M = flatten_ids.numel();
  const auto fail = [&](const char* rule, int64_t got) {
    throw std::runtime_error(op + ": " + rule + ", got " + std::to_string(got));
  };
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t least = t ? offsets[t - 1] : 0, most = t ? M : 0;
    if (offsets[t] < least || offsets[t] > most) {
      fail("tile_offsets must rise from 0 to the length of flatten_ids", offsets[t]);
    }
  }
  for (int64_t m = 0; m < M; ++m) {
    if (ids[m] < 0 || ids[m] >= P) fail("flatten_ids must be indices of splats", ids[m]);
  }
}

// Calls f(first tile, last tile + 1) on torch's threads, for about as much work each.
template <class T, class F>
void for_tiles(const Scene<T>& scene, const F& f) {
  // a tile costs as much as this many splats before it has any
  constexpr int64_t kTileWork = 8;
  const int64_t tiles = scene.tiles();
  const auto first_from = [&](int64_t work) {
    int64_t begin = 0, end = tiles;
    while (begin < end) {
      const int64_t t = begin + (end - begin) / 2;
      if (scene.offsets[t] + t * kTileWork < work) {
        begin = t + 1;
      } else {
        end = t;
      }
    }
    return begin;
  };
  torch::stable::parallel_for(
      0, scene.M + tiles * kTileWork, 1 << 8,
      [&](int64_t begin, int64_t end) { f(first_from(begin), first_from(end)); });
}

// The splats as tiles take them.
template <class T>
class PreparedSplats {
 public:
  using A = accumulator<T>;

  PreparedSplats(const Scene<T>& scene, const Tensor& means2d)
      : memory_(empty(means2d, {scene.P, sizeof(Splat<A>) / sizeof(A)}, dtype_of(means2d))) {
    Splat<A>* const splats = data();
    torch::stable::parallel_for(0, scene.P, 1 << 10, [&](int64_t first, int64_t last) {
      prepare(first, last, scene, splats);
    });
  }

  Splat<A>* data() const { return reinterpret_cast<Splat<A>*>(mutable_data<A>(memory_)); }

 private:
  const Tensor memory_;
};

}  // namespace rayfuse
