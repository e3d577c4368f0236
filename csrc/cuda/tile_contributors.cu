// The splats that pixels composite (composite_tiles.cu), front to back, pixel after pixel.
// A block owns a tile, a thread a pixel. The kernel runs twice: to count what each pixel has, and
// once it is known where that goes, to write it.
#include "launch.h"
#include "tile.h"

namespace rayfuse {
namespace {

template <class A>
__global__ void __launch_bounds__(kBlock)
    tile_contributors_kernel(Scene<A> scene,
                             const int64_t* __restrict__ ends,  // [I, H, W] or null to count
                             int32_t* __restrict__ counts,      // [I, H, W]
                             int64_t* __restrict__ ids,         // [K]
                             A* __restrict__ weights) {         // [K]
  __shared__ Batch<A> batch;
  const unsigned t = blockIdx.x;
  const List list(scene, t);
  const Pixel<A> pixel(scene, t);
  Passing<A> passing{scene.begun && pixel.exists ? scene.begun[pixel.index] : A(1), !pixel.exists};
  int64_t next = ends && pixel.exists ? ends[pixel.index] - counts[pixel.index] : 0;
  int32_t met = 0;
  for (int64_t first = 0; first < list.n; first += kBatch) {
    if (__syncthreads_and(passing.ended)) break;
    batch.load(scene, list.begin + first, list.n - first);
    __syncthreads();
    for (int k = 0; k < kBatch && !passing.ended; ++k) {
      const A before = passing.transmittance;
      const A weight = passing.meet(batch.alpha(scene, k, pixel), scene.ending) * before;
      if (!(weight > 0)) continue;
      ++met;
      if (!ends) continue;
      ids[next] = batch.id[k];
      weights[next++] = weight;
    }
  }
  if (pixel.exists && !ends) counts[pixel.index] = met;
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"
#include "torch_ops.h"
#include "../tiles.h"

namespace rayfuse {
namespace {

std::tuple<Tensor, Tensor, Tensor> lookup(const Tensor& means2d, const Tensor& conics,
                                          const Tensor& opacities, const Tensor& tile_offsets,
                                          const Tensor& flatten_ids, const MaybeTensor& masks,
                                          const MaybeTensor& transmittance, int64_t image_width,
                                          int64_t image_height, int64_t tile_size, double max_alpha,
                                          double min_alpha, double min_transmittance,
                                          double pixel_center, bool stop_at_min) {
  const Device device(means2d);
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
    const Grid grid{scene.tiles(), threads_of(tile_size), 0, device.stream()};
    auto* const of_pixels = mutable_data<int32_t>(counts);
    launch(grid, tile_contributors_kernel<A>, scene, nullptr, of_pixels, nullptr, nullptr);
    const Tensor ends = cumsum(torch::stable::flatten(counts));
    const int64_t K = last_of(ends);
    const Tensor ids = empty(means2d, {K}, aoti_torch_dtype_int64());
    const Tensor weights = empty(means2d, {K}, dtype_of(means2d));
    launch(grid, tile_contributors_kernel<A>, scene, data<int64_t>(ends), of_pixels,
           mutable_data<int64_t>(ids), mutable_data<A>(weights));
    return std::tuple(counts, ids, weights);
  };
  return means2d.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

}  // namespace

RAYFUSE_REGISTER(m) { m.impl("tile_contributors", TORCH_BOX(&lookup)); }

}  // namespace rayfuse
