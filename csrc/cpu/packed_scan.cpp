// Running sums and products along packed rays, from the left or from the right.
// One thread owns a ray. Forward: one pass. Backward of a sum: one pass the other way. Of a
// product: the pass again, which keeps the products L_i before each sample in cache, then one the
// other way that divides by nothing, so that zeros are exact. With i + 1 the sample after i in the
// forward's order, d_x_i = L_i B_i, B_i = d_y_i + x_{i+1} B_{i+1}, and for an exclusive product B_i
// = d_y_{i+1} + x_{i+1} B_{i+1}. docs/compositing.md
#include "packed.h"

#include <vector>

namespace rayfuse {
namespace {

// Rays first..last.
template <bool from_right, class T, class U>
RAYFUSE_KERNEL void sums(int64_t first, int64_t last, bool exclusive,
                         const T* x,              // [P]
                         const int64_t* offsets,  // [R+1]
                         U* y) {                  // [P]
  using A = accumulator<T>;
  for (int64_t r = first; r < last; ++r) {
    const RaySamples ray = RaySamples::of(offsets, r, last);
    as_constant(is_long<A>(ray.n), [&](auto long_rays) {
      Scan<A, long_rays, from_right> sum;
      for_each_register<A, from_right>(ray.n, [&](int64_t k) {
        const auto [before, including] = sum.add(ray.load(x, k));
        ray.store(y, k, exclusive ? before : including);
      });
    });
  }
}

// Rays first..last.
template <bool from_right, class T>
RAYFUSE_KERNEL void products(int64_t first, int64_t last, bool exclusive,
                             const T* x,              // [P]
                             const int64_t* offsets,  // [R+1]
                             accumulator<T>* y) {     // [P]
  using A = accumulator<T>;
  for (int64_t r = first; r < last; ++r) {
    const RaySamples ray = RaySamples::of(offsets, r, last);
    Product<A, from_right> product;
    for_each_register<A, from_right>(ray.n, [&](int64_t k) {
      const auto [before, including] = product.add(with_ones<A>(ray.load(x, k), k, ray.n));
      ray.store(y, k, exclusive ? before : including);
    });
  }
}

// Rays first..last.
template <bool from_right, class T>
RAYFUSE_KERNEL void product_gradients(int64_t first, int64_t last, bool exclusive,
                                      const accumulator<T>* d_y,  // [P]
                                      const T* x,                 // [P]
                                      const int64_t* offsets,     // [R+1]
                                      T* d_x) {                   // [P]
  using A = accumulator<T>;
  constexpr int N = kLanes<A>;
  std::vector<vec<A>> before;
  for (int64_t r = first; r < last; ++r) {
    const RaySamples ray = RaySamples::of(offsets, r, last);
    const int64_t blocks = ray.registers<A>();
    if (blocks > static_cast<int64_t>(before.size())) before.resize(blocks);
    Product<A, from_right> product;
    for_each_register<A, from_right>(ray.n, [&](int64_t k) {
      before[k / N] = product.add(with_ones<A>(ray.load(x, k), k, ray.n)).before;
    });
    Chain<A, !from_right> chain(0);
    for_each_register<A, !from_right>(ray.n, [&](int64_t k) {
      const vec<A> d_y_here = ray.load(d_y, k), x_here = ray.load(x, k);
      const vec<A> later = chain.add(x_here, exclusive ? d_y_here : x_here * d_y_here).before;
      ray.store(d_x, k, before[k / N] * (exclusive ? later : d_y_here + later));
    });
  }
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

// As the op's spec counts them.
constexpr int64_t kSum = 0;

Tensor fwd(const Tensor& x, const Tensor& offsets, int64_t kind, bool exclusive, bool reverse) {
  const PackedRays rays("packed_scan", offsets, x.numel());
  Tensor y = empty(x, {x.numel()}, accumulator_dtype(x));
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const T* x_ptr = data<T>(x);
    auto* y_ptr = mutable_data<accumulator<T>>(y);
    as_constant(reverse, [&](auto from_right) {
      rays.for_each_piece([=](int64_t first, int64_t last) {
        if (kind == kSum) {
          sums<from_right>(first, last, exclusive, x_ptr, rays.offsets, y_ptr);
        } else {
          products<from_right>(first, last, exclusive, x_ptr, rays.offsets, y_ptr);
        }
      });
    });
  });
  return y;
}

Tensor bwd(const Tensor& d_y, const Tensor& x, const Tensor& offsets, int64_t kind, bool exclusive,
           bool reverse, int64_t needs) {
  const PackedRays rays("packed_scan", offsets, x.numel());
  Tensor d_x = empty_gradient(x, needs, 0);
  if (d_x.numel() == 0) return d_x;
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const auto* d_y_ptr = data<accumulator<T>>(d_y);
    const T* x_ptr = data<T>(x);
    T* d_x_ptr = mutable_data<T>(d_x);
    as_constant(reverse, [&](auto from_right) {
      rays.for_each_piece([=](int64_t first, int64_t last) {
        if (kind == kSum) {
          sums<!from_right>(first, last, exclusive, d_y_ptr, rays.offsets, d_x_ptr);
        } else {
          product_gradients<from_right>(first, last, exclusive, d_y_ptr, x_ptr, rays.offsets,
                                        d_x_ptr);
        }
      });
    });
  });
  return d_x;
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_scan", TORCH_BOX(&fwd));
  m.impl("packed_scan_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
