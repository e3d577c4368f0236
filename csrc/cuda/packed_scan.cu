// Running sums and products along packed rays, from the left or from the right.
// A warp owns a ray, a block a long one, a thread kItems samples of each tile. Forward, and
// backward of a sum, which is a sum the other way: one pass over memory. Backward of a product:
// one, or two where a ray has several tiles; it divides by nothing, so that zeros are exact. With
// L_i the product before sample i and i + 1 the sample after it in the forward's order, d_x_i = L_i
// B_i, B_i = d_y_i + x_{i+1} B_{i+1}, and for an exclusive product B_i = d_y_{i+1} + x_{i+1}
// B_{i+1}. docs/compositing.md
#include "packed_tiles.h"

#include <type_traits>

namespace rayfuse {
namespace {

template <bool is_product, class T, class U>
__global__ void __launch_bounds__(kBlock, kResidentBlocks<T>)
    packed_scan_fwd_kernel(int64_t R, int64_t P, bool exclusive, bool reverse,
                           const T* __restrict__ x,              // [P]
                           const int64_t* __restrict__ offsets,  // [R+1]
                           U* __restrict__ y) {                  // [P]
  using A = accumulator<T>;
  for_each_stray_sample(offsets, R, P, [&](int64_t k) { y[k] = narrow<U>(0); });
  for_each_packed_ray(offsets, R, P, [&]<int kThreads>(const Team<kThreads>& team, PackedRay ray) {
    std::conditional_t<is_product, RunningProduct<A>, Running<A, false>> running;
    for_each_tile(team, ray, reverse, [&](const PackedTile<kThreads>& tile) {
      A x_here[kItems];
      tile.load(x, x_here, A(is_product));
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (!tile.reaches(i)) break;
        const A before = running.add(team, x_here[i]);
        const A including = is_product ? before * x_here[i] : before + x_here[i];
        tile.store(y, i, exclusive ? before : including);
      }
    });
  });
}

template <class T>
__global__ void __launch_bounds__(kBlock, kResidentBlocks<T>)
    packed_scan_bwd_kernel(int64_t R, int64_t P, bool exclusive, bool reverse,
                           const accumulator<T>* __restrict__ d_y,  // [P]
                           const T* __restrict__ x,                 // [P]
                           const int64_t* __restrict__ offsets,     // [R+1]
                           T* d_x) {                                // [P]
  using A = accumulator<T>;
  for_each_stray_sample(offsets, R, P, [&](int64_t k) { d_x[k] = narrow<T>(0); });
  for_each_packed_ray(offsets, R, P, [&]<int kThreads>(const Team<kThreads>& team, PackedRay ray) {
    using Tile = PackedTile<kThreads>;
    using Running = RunningProduct<A>;
    ChainBack<A> behind{0};
    there_and_back<Running>(
        team, ray, reverse, d_x,
        [&](const Tile& tile, Running& product) {
          A x_here[kItems];
          tile.load(x, x_here, A(1));
#pragma unroll
          for (int i = 0; i < kItems; ++i) product.add(team, x_here[i]);
        },
        [&](const Tile& tile, Running& product) {
          A x_here[kItems], d_y_here[kItems], before[kItems];
          tile.load(x, x_here, A(1));
          tile.load(d_y, d_y_here);
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            if (tile.reaches(i)) before[i] = product.add(team, x_here[i]);
          }
#pragma unroll
          for (int i = kItems - 1; i >= 0; --i) {
            if (!tile.reaches(i)) continue;
            const A given = exclusive ? d_y_here[i] : x_here[i] * d_y_here[i];
            const A later = behind.add(team, {x_here[i], given});
            tile.store(d_x, i, before[i] * (exclusive ? later : d_y_here[i] + later));
          }
        });
  });
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

// As the op's spec counts them.
constexpr int64_t kSum = 0;

Tensor fwd(const Tensor& x, const Tensor& offsets, int64_t kind, bool exclusive, bool reverse) {
  const Device device(x);
  const int64_t R = offsets.numel() - 1, P = x.numel();
  Tensor y = empty(x, {P}, accumulator_dtype(x));
  if (P == 0) return y;
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    launch(packed_grid(R, device.stream()),
           kind == kSum ? packed_scan_fwd_kernel<false, T, A> : packed_scan_fwd_kernel<true, T, A>,
           R, P, exclusive, reverse, data<T>(x), data<int64_t>(offsets), mutable_data<A>(y));
  });
  return y;
}

Tensor bwd(const Tensor& d_y, const Tensor& x, const Tensor& offsets, int64_t kind, bool exclusive,
           bool reverse, int64_t needs) {
  const Device device(x);
  const int64_t R = offsets.numel() - 1, P = x.numel();
  Tensor d_x = empty_gradient(x, needs, 0);
  if (d_x.numel() == 0) return d_x;
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const Grid grid = packed_grid(R, device.stream());
    if (kind == kSum) {
      launch(grid, packed_scan_fwd_kernel<false, A, T>, R, P, exclusive, !reverse, data<A>(d_y),
             data<int64_t>(offsets), mutable_data<T>(d_x));
    } else {
      launch(grid, packed_scan_bwd_kernel<T>, R, P, exclusive, reverse, data<A>(d_y), data<T>(x),
             data<int64_t>(offsets), mutable_data<T>(d_x));
    }
  });
  return d_x;
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_scan", TORCH_BOX(&fwd));
  m.impl("packed_scan_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
