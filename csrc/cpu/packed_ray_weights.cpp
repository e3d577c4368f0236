// Weights of packed rays: x_i = sigma_i dt_i, T_i = exp(-sum_{j<i} x_j), w_i = T_i (1 - exp(-x_i));
// T_n, of n samples, remains for the background.
// One thread owns a ray. Forward: one pass from the left. Backward: the same pass, which keeps what
// the way back needs in cache, then one from the right:
// d_x_i = (d_w_i - d_T_{i+1}) T_{i+1} - sum_{j>i} (d_w_j w_j + d_T_{j+1} T_{j+1}),
// d_sigma_i = d_x_i dt_i, d_dt_i = d_x_i sigma_i. docs/compositing.md
#include "packed.h"
#include "transmittance.h"

#include <vector>

namespace rayfuse {
namespace {

template <class T>
struct Medium {
  const T *sigma, *t_starts, *t_ends;  // [P]
  bool opaque_background;
};

// The pass from the left along a ray, a register at a time.
template <class T, bool long_rays>
struct LeftPass {
  using A = accumulator<T>;

  const Medium<T>& medium;
  const RaySamples& ray;
  LeftScan<A, long_rays> depth = {};
  vec<A> density = {}, width = {}, light = {}, passed = {}, w = {};  // light T_i, passed T_{i+1}

  void step(int64_t k) {
    density = ray.load(medium.sigma, k);
    width = ray.load(medium.t_ends, k) - ray.load(medium.t_starts, k);
    vec<A> x = optical_depth<A>(density, width);
    if (medium.opaque_background) x = with_last(x, k, ray.n, std::numeric_limits<A>::infinity());
    light = Decay<A>(depth.add(x).before).passing;
    const Decay<A> decay(x);
    w = light * decay.stopped;
    passed = light * decay.passing;
  }
};

// Rays first..last.
template <class T>
RAYFUSE_KERNEL void weights(int64_t first, int64_t last, Medium<T> medium,
                            const int64_t* offsets,       // [R+1]
                            accumulator<T>* w,            // [P]
                            accumulator<T>* light,        // [P]
                            accumulator<T>* remaining) {  // [R]
  using A = accumulator<T>;
  for (int64_t r = first; r < last; ++r) {
    const RaySamples ray = RaySamples::of(offsets, r, last);
    remaining[r] = 1;
    as_constant(is_long<A>(ray.n), [&](auto long_rays) {
      LeftPass<T, long_rays> pass{medium, ray};
      for (int64_t k = 0; k < ray.n; k += kLanes<A>) {
        pass.step(k);
        ray.store(w, k, pass.w);
        ray.store(light, k, pass.light);
        // nothing lies in the lanes behind the last sample
        remaining[r] = pass.passed[kLanes<A> - 1];
      }
    });
  }
}

// The gradients of the outputs, null where there are none.
template <class A>
struct OutputGradients {
  const A *w, *light, *remaining;  // [P], [P], [R]
};
// Those of the inputs, null where they are not wanted.
template <class T>
struct InputGradients {
  T *sigma, *t_starts, *t_ends;  // [P]
};

// What the pass from the left leaves for the way back.
template <class A>
struct Kept {
  vec<A> density, width, passed, w;
};

// Rays first..last.
template <class T>
RAYFUSE_KERNEL void gradients(int64_t first, int64_t last, OutputGradients<accumulator<T>> d_out,
                              Medium<T> medium, const int64_t* offsets, InputGradients<T> d_in) {
  using A = accumulator<T>;
  constexpr int N = kLanes<A>;
  std::vector<Kept<A>> kept;
  for (int64_t r = first; r < last; ++r) {
    const RaySamples ray = RaySamples::of(offsets, r, last);
    const int64_t blocks = ray.registers<A>();
    if (blocks > static_cast<int64_t>(kept.size())) kept.resize(blocks);
    as_constant(is_long<A>(ray.n), [&](auto long_rays) {
      LeftPass<T, long_rays> pass{medium, ray};
      for (int64_t i = 0; i < blocks; ++i) {
        pass.step(i * N);
        kept[i] = {pass.density, pass.width, pass.passed, pass.w};
      }
      RightScan<A, long_rays> behind;
      for (int64_t i = blocks - 1; i >= 0; --i) {
        const int64_t k = i * N;
        const auto& [density, width, passed, w] = kept[i];
        const vec<A> d_w = d_out.w ? ray.load(d_out.w, k) : vec<A>{};
        vec<A> d_passed = d_out.light ? ray.load(d_out.light, k + 1) : vec<A>{};
        if (d_out.remaining) d_passed = with_last(d_passed, k, ray.n, d_out.remaining[r]);
        const vec<A> d_x =
            (d_w - d_passed) * passed - behind.add(d_w * w + d_passed * passed).before;
        if (d_in.sigma) ray.store(d_in.sigma, k, d_x * width);
        const vec<A> d_width = d_width_of<A>(density, d_x);
        if (d_in.t_starts) ray.store(d_in.t_starts, k, -d_width);
        if (d_in.t_ends) ray.store(d_in.t_ends, k, d_width);
      }
    });
  }
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& sigma, const Tensor& t_starts,
                                       const Tensor& t_ends, const Tensor& offsets,
                                       bool opaque_background) {
  const int64_t P = sigma.numel();
  const PackedRays rays("packed_ray_weights", offsets, P);
  const int32_t dtype = accumulator_dtype(sigma);
  Tensor w = empty(sigma, {P}, dtype), transmittance = empty(sigma, {P}, dtype),
         remaining = empty(sigma, {rays.R}, dtype);
  dispatch(sigma, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const Medium<T> medium{data<T>(sigma), data<T>(t_starts), data<T>(t_ends), opaque_background};
    A *w_ptr = mutable_data<A>(w), *transmittance_ptr = mutable_data<A>(transmittance),
      *remaining_ptr = mutable_data<A>(remaining);
    rays.for_each_piece([=](int64_t first, int64_t last) {
      weights(first, last, medium, rays.offsets, w_ptr, transmittance_ptr, remaining_ptr);
    });
  });
  return {w, transmittance, remaining};
}

std::tuple<Tensor, Tensor, Tensor> bwd(std::optional<Tensor> d_w,
                                       std::optional<Tensor> d_transmittance,
                                       std::optional<Tensor> d_remaining, const Tensor& sigma,
                                       const Tensor& t_starts, const Tensor& t_ends,
                                       const Tensor& offsets, bool opaque_background,
                                       int64_t needs) {
  const PackedRays rays("packed_ray_weights", offsets, sigma.numel());
  Tensor d_sigma = empty_gradient(sigma, needs, 0), d_t_starts = empty_gradient(t_starts, needs, 1),
         d_t_ends = empty_gradient(t_ends, needs, 2);
  dispatch(sigma, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const OutputGradients<A> d_out{data<A>(d_w), data<A>(d_transmittance), data<A>(d_remaining)};
    const Medium<T> medium{data<T>(sigma), data<T>(t_starts), data<T>(t_ends), opaque_background};
    const InputGradients<T> d_in{mutable_data<T>(d_sigma), mutable_data<T>(d_t_starts),
                                 mutable_data<T>(d_t_ends)};
    rays.for_each_piece([=](int64_t first, int64_t last) {
      gradients(first, last, d_out, medium, rays.offsets, d_in);
    });
  });
  return {d_sigma, d_t_starts, d_t_ends};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_ray_weights", TORCH_BOX(&fwd));
  m.impl("packed_ray_weights_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
