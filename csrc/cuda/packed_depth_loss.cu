// Losses of a measured depth D of packed rays: L = sum_i l_i f_i + (D - D_pred)^2 with z = s - D
// and a bell K = a exp(-z^2 / (2 v)). DS-NeRF: a = 1, v = sigma, f = -log(w + eps) K. Urban
// Radiance Fields: v = (sigma / 3)^2, a = 1 / sqrt(2 pi v), f = e^2 with e = w - K within sigma of
// D, w before it and 0 behind. A warp owns a ray, a block a long one; one pass over memory each
// way: d_w = -l K / (w + eps), or 2 l e; d_s = l log(w + eps) K z / v, or 2 l e K z / v near D.
// By mass: e = w - m, m the integral of K over the interval s -+ l / 2; no l (depth.h).
// Deng et al. (2022), Rematas et al. (2022); docs/depth.md.
#include "depth.h"
#include "packed_tiles.h"

namespace rayfuse {
namespace {

// Calls f(tile, i, sample) for the samples of a ray at depth D, from w, s and lengths.
template <DepthForm form, class T, int kThreads, class F>
__device__ void for_each_sample(const Team<kThreads>& team, const PackedRay& ray, const T* w,
                                const T* s, const T* lengths, accumulator<T> D,
                                const Constants<accumulator<T>>& constants, const F& f) {
  using A = accumulator<T>;
  for_each_tile(team, ray, false, [&](const PackedTile<kThreads>& tile) {
    A w_here[kItems], s_here[kItems], length[kItems];
    tile.load(w, w_here);
    tile.load(s, s_here);
    if (lengths) tile.load(lengths, length);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!tile.has(i)) continue;
      const A own = lengths ? length[i] : A(kNoLength<form>);
      f(tile, i, Sample<form, A>(w_here[i], s_here[i], own, D, constants));
    }
  });
}

template <DepthForm form, class T>
__global__ void __launch_bounds__(kBlock, kResidentBlocks<T>)
    packed_depth_loss_fwd_kernel(int64_t R, int64_t P, Constants<accumulator<T>> constants,
                                 const T* __restrict__ w,              // [P]
                                 const T* __restrict__ s,              // [P]
                                 const T* __restrict__ depth,          // [R]
                                 const int64_t* __restrict__ offsets,  // [R+1]
                                 const T* __restrict__ lengths,        // [P] or null
                                 const T* __restrict__ depth_pred,     // [R] or null
                                 accumulator<T>* __restrict__ loss) {  // [R]
  using A = accumulator<T>;
  for_each_packed_ray(
      offsets, R, P, [&]<int kThreads>(const Team<kThreads>& team, const PackedRay& ray) {
        const A D = widen(depth[ray.index]);
        const bool valid = is_valid(D);
        // a million samples of a block are 4096 of each thread
        A sum = 0, lost = 0;
        if (valid) {
          for_each_sample<form>(team, ray, w, s, lengths, D, constants,
                                [&](const auto&, int, const auto& sample) {
                                  const A term = sample.loss() - lost, next = sum + term;
                                  lost = (next - sum) - term;
                                  sum = next;
                                });
        }
        sum = team.sum(sum);
        if (team.rank == 0) {
          const A off = valid && depth_pred ? D - widen(depth_pred[ray.index]) : A(0);
          loss[ray.index] = sum + off * off;
        }
      });
}

template <DepthForm form, class T>
__global__ void __launch_bounds__(kBlock, kResidentBlocks<T>)
    packed_depth_loss_bwd_kernel(int64_t R, int64_t P, Constants<accumulator<T>> constants,
                                 const accumulator<T>* __restrict__ d_loss,  // [R]
                                 const T* __restrict__ w,                    // [P]
                                 const T* __restrict__ s,                    // [P]
                                 const T* __restrict__ depth,                // [R]
                                 const int64_t* __restrict__ offsets,        // [R+1]
                                 const T* __restrict__ lengths,              // [P] or null
                                 const T* __restrict__ depth_pred,           // [R] or null
                                 T* d_w,                                     // [P] or null
                                 T* d_s,                                     // [P] or null
                                 T* d_lengths,                               // [P] or null
                                 T* d_depth_pred) {                          // [R] or null
  using A = accumulator<T>;
  for_each_stray_sample(offsets, R, P, [&](int64_t k) {
    for (T* to : {d_w, d_s, d_lengths}) {
      if (to) to[k] = narrow<T>(0);
    }
  });
  for_each_packed_ray(
      offsets, R, P, [&]<int kThreads>(const Team<kThreads>& team, const PackedRay& ray) {
        const A D = widen(depth[ray.index]), g = d_loss[ray.index];
        const bool valid = is_valid(D);
        if (d_depth_pred && team.rank == 0) {
          const A off = valid ? widen(depth_pred[ray.index]) - D : A(0);
          d_depth_pred[ray.index] = narrow<T>(2 * g * off);
        }
        for_each_sample<form>(team, ray, w, s, lengths, D, constants,
                              [&](const auto& tile, int i, const auto& sample) {
                                if (d_w) tile.store(d_w, i, valid ? g * sample.d_w() : A(0));
                                if (d_s) tile.store(d_s, i, valid ? g * sample.d_s() : A(0));
                                if (d_lengths)
                                  tile.store(d_lengths, i, valid ? g * sample.d_lengths() : A(0));
                              });
      });
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& w, const Tensor& s, const Tensor& depth, const Tensor& offsets,
           const std::optional<Tensor>& lengths, const std::optional<Tensor>& depth_pred,
           int64_t form, double sigma, double eps) {
  const Device device(w);
  const int64_t R = offsets.numel() - 1, P = w.numel();
  Tensor loss = empty(w, {R}, accumulator_dtype(w));
  dispatch(w, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    as_form(form, [&](auto form_) {
      launch({packed_blocks(R), kBlock, 0, device.stream()},
             packed_depth_loss_fwd_kernel<form_(), T>, R, P, Constants<A>(form, sigma, eps),
             data<T>(w), data<T>(s), data<T>(depth), data<int64_t>(offsets), data<T>(lengths),
             data<T>(depth_pred), mutable_data<A>(loss));
    });
  });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& w,
                                               const Tensor& s, const Tensor& depth,
                                               const Tensor& offsets,
                                               const std::optional<Tensor>& lengths,
                                               const std::optional<Tensor>& depth_pred,
                                               int64_t form, double sigma, double eps,
                                               int64_t needs) {
  const Device device(w);
  const int64_t R = offsets.numel() - 1, P = w.numel();
  Tensor d_w = empty_gradient(w, needs, 0), d_s = empty_gradient(s, needs, 1);
  Tensor d_lengths = empty_gradient(lengths, w, needs, 2);
  Tensor d_depth_pred = empty_gradient(depth_pred, w, needs, 3);
  dispatch(w, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    as_form(form, [&](auto form_) {
      launch(packed_grid(R, device.stream()), packed_depth_loss_bwd_kernel<form_(), T>, R, P,
             Constants<A>(form, sigma, eps), data<A>(d_loss), data<T>(w), data<T>(s),
             data<T>(depth), data<int64_t>(offsets), data<T>(lengths), data<T>(depth_pred),
             mutable_data<T>(d_w), mutable_data<T>(d_s), mutable_data<T>(d_lengths),
             mutable_data<T>(d_depth_pred));
    });
  });
  return {d_w, d_s, d_lengths, d_depth_pred};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_depth_loss", TORCH_BOX(&fwd));
  m.impl("packed_depth_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
