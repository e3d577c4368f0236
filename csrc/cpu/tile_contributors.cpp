// The splats that pixels composite (composite_tiles.cpp), front to back, pixel after pixel.
// One thread owns a tile and goes through it by rows of 16 pixels, twice: to count what each pixel
// has, and once it is known where that goes, to write it.
#include "tile.h"

namespace rayfuse {
namespace {

// Tiles first..last.
template <class A>
RAYFUSE_KERNEL void count(int64_t first, int64_t last, const Scene<A>& scene,
                          const Splat<A>* splats,  // [P]
                          int32_t* counts) {       // [I, H, W]
  using Pixels = Row<A>;
  Tile<A> tile(scene, splats);
  for (int64_t t = first; t < last; ++t) {
    tile.go_to(t);
    for (int r = 0; r < tile.rows; ++r) {
      tile.template weigh<false>(r, false);
      lane_index<A> met[Pixels::kParts] = {};
      for (int k = 0; k < tile.count(); ++k) {
        // a comparison that holds is -1
        for (int p = 0; p < Pixels::kParts; ++p) met[p] -= tile.weight[k].part[p] > 0;
      }
      for (int i = 0; i < tile.columns; ++i) {
        counts[tile.index(r) + i] = static_cast<int32_t>(met[i / kLanes<A>][i % kLanes<A>]);
      }
    }
  }
}

// Tiles first..last; the pixels' own begin at `begins`.
template <class A>
RAYFUSE_KERNEL void collect(int64_t first, int64_t last, const Scene<A>& scene,
                            const Splat<A>* splats,  // [P]
                            const int64_t* begins,   // [I, H, W]
                            int64_t* ids,            // [K]
                            A* weights) {            // [K]
  Tile<A> tile(scene, splats);
  for (int64_t t = first; t < last; ++t) {
    tile.go_to(t);
    for (int r = 0; r < tile.rows; ++r) {
      tile.template weigh<false>(r, false);
      int64_t next[kRow];
      std::copy_n(begins + tile.index(r), tile.columns, next);
      for (int k = 0; k < tile.count(); ++k) {
        A weight[kRow];
        tile.weight[k].store_to(weight);
        uint32_t met = 0;
        for (int p = 0; p < Row<A>::kParts; ++p) {
          const uint32_t none = lanes_up_to(tile.weight[k].part[p], vec<A>{});
          met |= (none ^ kAllLanes<A>) << p * kLanes<A>;
        }
        for (met &= (1u << tile.columns) - 1; met; met &= met - 1) {
          const int i = __builtin_ctz(met);
          ids[next[i]] = tile.id(k);
          weights[next[i]++] = weight[i];
        }
      }
    }
  }
}

}  // namespace
}  // namespace rayfuse

#include "tile_calls.h"

namespace rayfuse {
namespace {

std::tuple<Tensor, Tensor, Tensor> lookup(const Tensor& means2d, const Tensor& conics,
                                          const Tensor& opacities, const Tensor& tile_offsets,
                                          const Tensor& flatten_ids, const MaybeTensor& masks,
                                          const MaybeTensor& transmittance, int64_t image_width,
                                          int64_t image_height, int64_t tile_size, double max_alpha,
                                          double min_alpha, double min_transmittance,
                                          double pixel_center, bool stop_at_min) {
  check_lists("tile_contributors", tile_offsets, flatten_ids, means2d.size(0));
  const MaybeTensor none;
  const Tensor colors = empty(means2d, {means2d.size(0), 0}, dtype_of(means2d));
  const TileCall call{means2d,           conics,       colors,     opacities, tile_offsets,
                      flatten_ids,       none,         none,       masks,     none,
                      image_width,       image_height, tile_size,  max_alpha, min_alpha,
                      min_transmittance, pixel_center, stop_at_min};
  const Tensor counts = empty(means2d, {call.images(), call.H, call.W}, aoti_torch_dtype_int32());
  const auto run = [&](auto type) {
    using A = decltype(type);
    auto scene = call.scene<A>();
    scene.begun = data<A>(transmittance);
    const PreparedSplats splats(scene, means2d);
    auto* const of_pixels = mutable_data<int32_t>(counts);
    for_tiles(scene, [&](int64_t first, int64_t last) {
      count(first, last, scene, splats.data(), of_pixels);
    });
    std::vector<int64_t> begins(counts.numel() + 1);
    for (int64_t i = 0; i < counts.numel(); ++i) begins[i + 1] = begins[i] + of_pixels[i];
    const Tensor ids = empty(means2d, {begins.back()}, aoti_torch_dtype_int64());
    const Tensor weights = empty(means2d, {begins.back()}, dtype_of(means2d));
    for_tiles(scene, [&](int64_t first, int64_t last) {
      collect(first, last, scene, splats.data(), begins.data(), mutable_data<int64_t>(ids),
              mutable_data<A>(weights));
    });
    return std::tuple(counts, ids, weights);
  };
  return means2d.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

}  // namespace

RAYFUSE_REGISTER(m) { m.impl("tile_contributors", TORCH_BOX(&lookup)); }

}  // namespace rayfuse
