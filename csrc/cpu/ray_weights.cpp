// Ray weights: x_i = sigma_i dt_i, T_i = exp(-sum_{j<i} x_j), w_i = T_i (1 - exp(-x_i)).
// One thread owns a few rays. Forward: one pass from the left. Backward: the same pass, which keeps
// what the way back needs in cache, then one from the right:
// d_x_i = (d_w_i - d_T_{i+1}) T_{i+1} - sum_{j>i} (d_w_j w_j + d_T_{j+1} T_{j+1}),
// d_sigma_i = d_x_i dt_i, d_t_{i+1} = d_x_i sigma_i - d_x_{i+1} sigma_{i+1}. docs/compositing.md
#include "transmittance.h"

#include <vector>

namespace rayfuse {
namespace {

// Rays begin..end.
template <bool long_rays, class T>
RAYFUSE_KERNEL void weights(int64_t begin, int64_t end, int64_t S, bool opaque_background,
                            const T* sigma,                   // [R, S]
                            const T* t,                       // [R, S+1]
                            accumulator<T>* w,                // [R, S]
                            accumulator<T>* transmittance) {  // [R, S+1]
  using A = accumulator<T>;
  for (int64_t r = begin; r < end; r += kRays<A>) {
    const int count = std::min<int64_t>(kRays<A>, end - r);
    LightPass<T, long_rays> pass{
        {sigma + r * S, S, count}, {t + r * (S + 1), S + 1, count}, S, opaque_background};
    const Rays<A> w_rays{w + r * S, S, count};
    const Rays<A> light_rays{transmittance + r * (S + 1), S + 1, count};
    for (int64_t k = 0; k < S; k += kLanes<A>) {
      w_rays.prefetch_for_store(k);
      light_rays.prefetch_for_store(k);
      pass.step(k);
      w_rays.store_at(k, S - k, pass.w);
      light_rays.store_at(k, S - k, pass.light);
    }
    const vec<A> background = pass.background();
    for (int i = 0; i < count; ++i) light_rays[i][S] = background[i];
  }
}

// Rays begin..end.
template <bool long_rays, bool with_d_t, class T>
RAYFUSE_KERNEL void gradients(int64_t begin, int64_t end, int64_t S, bool opaque_background,
                              const accumulator<T>* d_w,              // [R, S] or null
                              const accumulator<T>* d_transmittance,  // [R, S+1] or null
                              const T* sigma,                         // [R, S]
                              const T* t,                             // [R, S+1]
                              T* d_sigma,                             // [R, S] or null
                              T* d_t) {                               // [R, S+1]
  using A = accumulator<T>;
  constexpr int K = kRays<A>, N = kLanes<A>;
  const int64_t blocks = (S + N - 1) / N;
  std::vector<KeptLight<A>> kept(blocks);
  for (int64_t r = begin; r < end; r += K) {
    const int count = std::min<int64_t>(K, end - r);
    LightPass<T, long_rays> pass{
        {sigma + r * S, S, count}, {t + r * (S + 1), S + 1, count}, S, opaque_background};
    const Rays<T> d_sigma_rays{d_sigma + r * S, S, count};
    const Rays<T> d_t_rays{d_t + r * (S + 1), S + 1, count};
    for (int64_t i = 0; i < blocks; ++i) {
      if (d_sigma) d_sigma_rays.prefetch_for_store(i * N);
      if (with_d_t) d_t_rays.prefetch_for_store(i * N);
      pass.step(i * N);
      kept[i].keep(pass, with_d_t);
    }
    const Rays<const A> d_w_rays{d_w + r * S, S, count};
    const Rays<const A> d_light_rays{d_transmittance + r * (S + 1), S + 1, count};
    LightGradients<A, long_rays> way_back;
    vec<A> d_width_after = {};
    for (int64_t i = blocks - 1; i >= 0; --i) {
      const int64_t k = i * N;
      way_back.step(kept[i], d_w ? d_w_rays.load_at(k, S - k) : Block<A>{},
                    d_transmittance ? d_light_rays.load_at(k + 1, S - k) : Block<A>{}, with_d_t);
      if (d_sigma) d_sigma_rays.store_at(k, S - k, way_back.d_density);
      if constexpr (with_d_t) {
        const auto& column = way_back.d_width.column;
        const vec<A> last = window<K>(column[0], d_width_after);
        d_width_after = column[0];
        d_t_rays.store_at(k + 1, S - k, each_column<A>([&](int j) {
                            return column[j] - (j < K - 1 ? column[j + 1] : last);
                          }));
      }
    }
    for (int i = 0; with_d_t && i < count; ++i) d_t_rays[i][0] = narrow<T>(-d_width_after[i]);
  }
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

std::tuple<Tensor, Tensor> fwd(const Tensor& sigma, const Tensor& t, bool opaque_background) {
  const int64_t S = sigma.size(-1);
  auto sizes = leading_sizes(sigma, 1);
  const int64_t R = t.numel() / (S + 1);
  sizes.push_back(S);
  Tensor w = empty(sigma, sizes, accumulator_dtype(sigma));
  sizes.back() = S + 1;
  Tensor transmittance = empty(sigma, sizes, accumulator_dtype(sigma));
  dispatch(sigma, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const T *sigma_ptr = data<T>(sigma), *t_ptr = data<T>(t);
    A *w_ptr = mutable_data<A>(w), *transmittance_ptr = mutable_data<A>(transmittance);
    for_rays<A>(R, S, [=](int64_t begin, int64_t end) {
      as_constant(is_long<A>(S), [=](auto long_rays) {
        weights<long_rays>(begin, end, S, opaque_background, sigma_ptr, t_ptr, w_ptr,
                           transmittance_ptr);
      });
    });
  });
  return {w, transmittance};
}

std::tuple<Tensor, Tensor> bwd(std::optional<Tensor> d_w, std::optional<Tensor> d_transmittance,
                               const Tensor& sigma, const Tensor& t, bool opaque_background,
                               int64_t needs) {
  const int64_t S = sigma.size(-1), R = t.numel() / (S + 1);
  Tensor d_sigma = empty_gradient(sigma, needs, 0), d_t = empty_gradient(t, needs, 1);
  dispatch(sigma, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const A* d_w_ptr = d_w ? data<A>(*d_w) : nullptr;
    const A* d_transmittance_ptr = d_transmittance ? data<A>(*d_transmittance) : nullptr;
    const T *sigma_ptr = data<T>(sigma), *t_ptr = data<T>(t);
    T *d_sigma_ptr = mutable_data<T>(d_sigma), *d_t_ptr = mutable_data<T>(d_t);
    for_rays<A>(R, S, [=](int64_t begin, int64_t end) {
      as_constant(is_long<A>(S), [=](auto long_rays) {
        as_constant(d_t_ptr != nullptr, [=](auto with_d_t) {
          gradients<long_rays, with_d_t>(begin, end, S, opaque_background, d_w_ptr,
                                         d_transmittance_ptr, sigma_ptr, t_ptr, d_sigma_ptr,
                                         d_t_ptr);
        });
      });
    });
  });
  return {d_sigma, d_t};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("ray_weights", TORCH_BOX(&fwd));
  m.impl("ray_weights_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
