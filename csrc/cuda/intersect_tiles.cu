// Lists of tiles: which splats meet which tiles, those of a tile front to back.
// Splats in the order of torch's stable sort by depth: a thread counts the tiles of its splat, a
// warp together those of a large box. Counts add up to places, and the same walk writes pairs of a
// tile and a splat there. A stable sort by tile, torch's as well, keeps the order of depth within
// each; then a thread copies an id, and one a tile bisects where its list begins. docs/splats.md
#include "launch.h"
#include "rays.h"
#include "../math/intersect_tiles.h"

namespace rayfuse {
namespace {

// Larger boxes get all threads of their warp.
constexpr unsigned kSmallBox = 32;

// The tiles of a splat's box, row by row.
template <class A>
struct Candidates {
  int64_t p;
  int left = 0, top = 0, first = 0;
  unsigned width = 0, count = 0;

  __device__ Candidates(const Splats<A>& splats, int64_t p) : p(p) {
    using Along = Reach<A, A>;
    const A *const mean = splats.means2d + 2 * p, *const radius = splats.radii + 2 * p;
    const Along x(mean[0], radius[0], splats.size, static_cast<A>(splats.X));
    const Along y(mean[1], radius[1], splats.size, static_cast<A>(splats.Y));
    if (!(x.found && y.found && splats.exists(p))) return;
    left = static_cast<int>(x.low);
    top = static_cast<int>(y.low);
    width = static_cast<int>(ceil(x.high)) - left;
    count = width * (static_cast<int>(ceil(y.high)) - top);
    first = (static_cast<int>(splats.image_of(p)) * splats.Y + top) * splats.X + left;
  }
  __device__ int tile(const Splats<A>& splats, unsigned i) const {
    return static_cast<int>(first + i / width * splats.X + i % width);
  }
  __device__ bool reached(const Splats<A>& splats, unsigned i) const {
    if (!splats.conics) return true;
    const Ellipse<A> ellipse(splats, p);
    const A x = static_cast<A>(left + i % width) * splats.size + splats.center - ellipse.x;
    const A y = static_cast<A>(top + i / width) * splats.size + splats.center - ellipse.y;
    return ellipse.least_sigma(x, y, splats.size - 1) <= ellipse.most;
  }
};

// Calls visit(k, n, tile) for the n-th tile of the splat that is k-th in depth, of all of the warp;
// returns how many the thread's own has.
template <class A, class Visit>
__device__ int for_each_tile(const Splats<A>& splats, const int64_t* order, const Visit& visit) {
  const int lane = threadIdx.x % kWarp;
  const int64_t k = int64_t{blockIdx.x} * kBlock + threadIdx.x, warp = k - lane;
  bool is_large = false;
  int found = 0;
  if (k < splats.P) {
    const Candidates<A> own(splats, order[k]);
    is_large = own.count > kSmallBox;
    for (unsigned i = 0; !is_large && i < own.count; ++i) {
      if (own.reached(splats, i)) visit(k, found++, own.tile(splats, i));
    }
  }
  for (unsigned large = __ballot_sync(kAllLanes, is_large); large; large &= large - 1) {
    const int owner = __ffs(large) - 1;
    const Candidates<A> box(splats, order[warp + owner]);
    int before = 0;
    for (unsigned first = 0; first < box.count; first += kWarp) {
      const unsigned i = first + lane;
      const bool here = i < box.count && box.reached(splats, i);
      const unsigned reached = __ballot_sync(kAllLanes, here);
      const int earlier = __popc(reached & ((1u << lane) - 1));
      if (here) visit(warp + owner, before + earlier, box.tile(splats, i));
      before += __popc(reached);
    }
    if (lane == owner) found = before;
  }
  return found;
}

template <class A>
__global__ void __launch_bounds__(kBlock)
    intersect_tiles_count_kernel(Splats<A> splats,
                                 const int64_t* __restrict__ order,  // [P]
                                 int* __restrict__ counts,           // [P], in depth order
                                 int* __restrict__ per_splat) {      // [P]
  const int found = for_each_tile(splats, order, [](int64_t, int, int) {});
  const int64_t k = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (k >= splats.P) return;
  counts[k] = found;
  per_splat[order[k]] = found;
}

template <class A>
__global__ void __launch_bounds__(kBlock)
    intersect_tiles_pairs_kernel(Splats<A> splats,
                                 const int64_t* __restrict__ order,  // [P]
                                 const int64_t* __restrict__ ends,   // [P]
                                 int* __restrict__ tiles,            // [M]
                                 int64_t* __restrict__ ids) {        // [M]
  for_each_tile(splats, order, [&](int64_t k, int n, int tile) {
    const int64_t place = (k ? ends[k - 1] : 0) + n;
    tiles[place] = tile;
    ids[place] = order[k];
  });
}

__global__ void __launch_bounds__(kBlock)
    intersect_tiles_lists_kernel(int64_t M, int64_t all_tiles,
                                 const int* __restrict__ tiles,       // [M], sorted
                                 const int64_t* __restrict__ places,  // [M], of ids
                                 const int64_t* __restrict__ ids,     // [M]
                                 int64_t* __restrict__ flatten_ids,   // [M]
                                 int64_t* __restrict__ offsets) {     // [images, Y, X]
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (i < M) flatten_ids[i] = ids[places[i]];
  if (i >= all_tiles) return;
  int64_t begin = 0, end = M;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (tiles[middle] < i) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  offsets[i] = begin;
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"
#include "torch_ops.h"
#include "../splats.h"

namespace rayfuse {
namespace {

int64_t blocks_of(int64_t threads) { return (threads + kBlock - 1) / kBlock; }

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& means2d, const Tensor& radii,
                                       const Tensor& depths, const MaybeTensor& conics,
                                       const MaybeTensor& most, const MaybeTensor& image_ids,
                                       int64_t images, int64_t tile_size, int64_t tile_width,
                                       int64_t tile_height, double pixel_center) {
  const Device device(means2d);
  const SplatsCall call{means2d, radii,     depths,     conics,      most,        image_ids,
                        images,  tile_size, tile_width, tile_height, pixel_center};
  const Tensor per_splat = call.per_splat(), offsets = call.offsets(), counts = call.per_splat();
  const Tensor order = sort(depths)[1];
  Tensor ids;
  dispatch(means2d, [&](auto type) {
    using A = accumulator<decltype(type)>;
    const auto splats = call.splats<A>();
    const Grid grid{blocks_of(splats.P), kBlock, 0, device.stream()};
    launch(grid, intersect_tiles_count_kernel<A>, splats, data<int64_t>(order),
           mutable_data<int>(counts), mutable_data<int>(per_splat));
    const Tensor ends = cumsum(counts);
    const int64_t M = last_of(ends), all_tiles = splats.tiles();
    const Tensor tiles = empty(means2d, {M}, aoti_torch_dtype_int32()), by_splat = call.ids(M);
    launch(grid, intersect_tiles_pairs_kernel<A>, splats, data<int64_t>(order), data<int64_t>(ends),
           mutable_data<int>(tiles), mutable_data<int64_t>(by_splat));
    const auto [sorted, places] = sort(tiles);
    ids = call.ids(M);
    launch({blocks_of(std::max(M, all_tiles)), kBlock, 0, device.stream()},
           intersect_tiles_lists_kernel, M, all_tiles, data<int>(sorted), data<int64_t>(places),
           data<int64_t>(by_splat), mutable_data<int64_t>(ids), mutable_data<int64_t>(offsets));
  });
  return {per_splat, ids, offsets};
}

}  // namespace

RAYFUSE_REGISTER(m) { m.impl("intersect_tiles", TORCH_BOX(&fwd)); }

}  // namespace rayfuse
