// Weights of packed rays from opacities: w_i = T_i a_i, T_{i+1} = T_i (1 - a_i); T_n, of n samples,
// remains for the background.
// One thread owns a ray. Forward: one pass from the left. Backward: the same pass, which keeps T in
// cache, then one from the right that divides by nothing, so that a = 1 is exact:
// d_a_i = T_i (d_w_i - B_i), B_i = d_w_{i+1} a_{i+1} + d_T_{i+1} + (1 - a_{i+1}) B_{i+1},
// which starts from the gradient of T_n. docs/compositing.md
#include "packed.h"

#include <vector>

namespace rayfuse {
namespace {

// Rays first..last.
template <class T>
RAYFUSE_KERNEL void weights(int64_t first, int64_t last,
                            const T* alpha,               // [P]
                            const int64_t* offsets,       // [R+1]
                            accumulator<T>* w,            // [P]
                            accumulator<T>* light,        // [P]
                            accumulator<T>* remaining) {  // [R]
  using A = accumulator<T>;
  for (int64_t r = first; r < last; ++r) {
    const RaySamples ray = RaySamples::of(offsets, r, last);
    Product<A, false> product;
    remaining[r] = 1;
    for (int64_t k = 0; k < ray.n; k += kLanes<A>) {
      const vec<A> alpha_here = ray.load(alpha, k);
      const auto [light_here, passed] = product.add(1 - alpha_here);
      ray.store(w, k, light_here * alpha_here);
      ray.store(light, k, light_here);
      // nothing lies in the lanes behind the last sample
      remaining[r] = passed[kLanes<A> - 1];
    }
  }
}

// Rays first..last.
template <class T>
RAYFUSE_KERNEL void gradients(int64_t first, int64_t last,
                              const accumulator<T>* d_w,          // [P] or null
                              const accumulator<T>* d_light,      // [P] or null
                              const accumulator<T>* d_remaining,  // [R] or null
                              const T* alpha,                     // [P]
                              const int64_t* offsets,             // [R+1]
                              T* d_alpha) {                       // [P]
  using A = accumulator<T>;
  constexpr int N = kLanes<A>;
  std::vector<vec<A>> light;
  for (int64_t r = first; r < last; ++r) {
    const RaySamples ray = RaySamples::of(offsets, r, last);
    const int64_t blocks = ray.registers<A>();
    if (blocks > static_cast<int64_t>(light.size())) light.resize(blocks);
    Product<A, false> product;
    for (int64_t i = 0; i < blocks; ++i) {
      light[i] = product.add(1 - ray.load(alpha, i * N)).before;
    }
    Chain<A, true> chain(d_remaining ? d_remaining[r] : A(0));
    for (int64_t i = blocks - 1; i >= 0; --i) {
      const int64_t k = i * N;
      const vec<A> alpha_here = ray.load(alpha, k);
      const vec<A> d_w_here = d_w ? ray.load(d_w, k) : vec<A>{};
      const vec<A> d_light_here = d_light ? ray.load(d_light, k) : vec<A>{};
      const vec<A> behind = chain.add(1 - alpha_here, d_w_here * alpha_here + d_light_here).before;
      ray.store(d_alpha, k, light[i] * (d_w_here - behind));
    }
  }
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& alpha, const Tensor& offsets) {
  const int64_t P = alpha.numel();
  const PackedRays rays("packed_alpha_weights", offsets, P);
  const int32_t dtype = accumulator_dtype(alpha);
  Tensor w = empty(alpha, {P}, dtype), transmittance = empty(alpha, {P}, dtype),
         remaining = empty(alpha, {rays.R}, dtype);
  dispatch(alpha, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const T* alpha_ptr = data<T>(alpha);
    A *w_ptr = mutable_data<A>(w), *transmittance_ptr = mutable_data<A>(transmittance),
      *remaining_ptr = mutable_data<A>(remaining);
    rays.for_each_piece([=](int64_t first, int64_t last) {
      weights(first, last, alpha_ptr, rays.offsets, w_ptr, transmittance_ptr, remaining_ptr);
    });
  });
  return {w, transmittance, remaining};
}

Tensor bwd(std::optional<Tensor> d_w, std::optional<Tensor> d_transmittance,
           std::optional<Tensor> d_remaining, const Tensor& alpha, const Tensor& offsets,
           int64_t needs) {
  const PackedRays rays("packed_alpha_weights", offsets, alpha.numel());
  Tensor d_alpha = empty_gradient(alpha, needs, 0);
  if (d_alpha.numel() == 0) return d_alpha;
  dispatch(alpha, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const A *d_w_ptr = data<A>(d_w), *d_transmittance_ptr = data<A>(d_transmittance),
            *d_remaining_ptr = data<A>(d_remaining);
    const T* alpha_ptr = data<T>(alpha);
    T* d_alpha_ptr = mutable_data<T>(d_alpha);
    rays.for_each_piece([=](int64_t first, int64_t last) {
      gradients(first, last, d_w_ptr, d_transmittance_ptr, d_remaining_ptr, alpha_ptr, rays.offsets,
                d_alpha_ptr);
    });
  });
  return d_alpha;
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_alpha_weights", TORCH_BOX(&fwd));
  m.impl("packed_alpha_weights_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
