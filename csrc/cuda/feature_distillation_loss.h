// Feature distillation of a ray by a team, of dense and of packed rays: loss = mean_c e_c^2 with
// the error e = sum_s w_s f_s - target. Forward: some channels at a time, one pass over f for their
// part of e, and one, from the cache, for their part of the products p_s = <e, f_s>; both are kept.
// Backward: no features. With scale = 2 d_loss / C, d_w_s = scale p_s, d_f_s = w_s scale e and
// d_target = -scale e.
#pragma once

#include "ray_features.h"

namespace rayfuse {

template <class T>
struct Loss {
  using A = accumulator<T>;

  FeatureShape shape;
  Values w;       // [P]
  const T* f;     // [P, C]
  Values target;  // [R, C]
  A* loss;        // [R]
  A* error;       // [R, C]
  A* product;     // [P]

  template <int kThreads>
  __device__ void of_ray(const Team<kThreads>& team, const PackedRay& ray) const {
    const int64_t place = ray.index * shape.C;
    const auto body = [&]<Layout layout>() {
      const Features<kThreads, layout, T> samples(team, shape, ray, w, f);
      A square[1] = {}, dots[samples.kDepth] = {};
      samples.for_pieces([&](int first) {
        Quad<T> tile[samples.kDepth];
        Quad<A> e;
        const int64_t last = samples.add_up(first, tile, e);
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
          const int c = samples.channel(first, i);
          if (c < shape.C) e.value[i] -= value_at<A>(target, place + c);
          square[0] = fma(e.value[i], e.value[i], square[0]);
        }
        if (samples.is_first_row()) samples.write(error + place, first, e);
        samples.multiply(first, last, tile, e, dots, product);
      });
      samples.sum_of_lanes(square);
      if (team.rank == 0) loss[ray.index] = square[0] / shape.C;
    };
    with_layout(shape.C, body, f);
  }
};

template <class T>
struct LossGradients {
  using A = accumulator<T>;

  FeatureShape shape;
  const A* d_loss;         // [R]
  const A* error;          // [R, C]
  const A* product;        // [P]
  Values w;                // [P]
  MutableValues d_w;       // [P]
  T* d_f;                  // [P, C] or null
  MutableValues d_target;  // [R, C]

  template <int kThreads>
  __device__ void of_ray(const Team<kThreads>& team, const PackedRay& ray) const {
    const A scale = 2 * d_loss[ray.index] / shape.C;
    const A* const e = error + ray.index * shape.C;
    for (int c = team.rank; d_target.data && c < shape.C; c += kThreads) {
      set_value<A>(d_target, ray.index * shape.C + c, -scale * e[c]);
    }
    for (int64_t k = ray.begin + team.rank; d_w.data && k < ray.end; k += kThreads) {
      set_value<A>(d_w, k, scale * product[k]);
    }
    if (!d_f) return;
    const auto body = [&]<Layout layout>() {
      Features<kThreads, layout, T>(team, shape, ray, w, nullptr).spread(e, scale, {}, d_f);
    };
    with_layout(shape.C, body, d_f, error);
  }
};

}  // namespace rayfuse
