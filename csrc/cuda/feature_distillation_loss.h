// Feature distillation of a ray by a team, of dense and of packed rays: loss = mean_c e_c^2 with
// the error e = sum_s w_s f_s - target. Forward: some channels at a time, one pass over f for their
// part of e, and one, from the cache, for their part of the products p_s = <e, f_s>; both are kept.
// Backward: no features. With scale = 2 d_loss / C, d_w_s = scale p_s, d_f_s = w_s scale e and
// d_target = -scale e. Threads stand in rows: those of a row go along the channels of a sample,
// with their part of e in registers, and rows take samples in turn.
#pragma once

#include "packed_features.h"

namespace rayfuse {

template <class T>
struct Loss {
  using A = accumulator<T>;

  Values w;       // [P]
  const T* f;     // [P, C]
  Values target;  // [R, C]
  A* loss;        // [R]
  A* error;       // [R, C]
  A* product;     // [P]

  template <int kThreads>
  __device__ void of_ray(const Team<kThreads>& team, const PackedRay& ray,
                         const PackedShape& shape) const {
    shape.C % 8 == 0 ? compare<true>(team, ray, shape) : compare<false>(team, ray, shape);
  }

 private:
  template <bool vectors, int kThreads>
  __device__ void compare(const Team<kThreads>& team, const PackedRay& ray,
                          const PackedShape& shape) const {
    const PackedFeatures<kThreads, T, vectors> features(team, ray, shape, w, f);
    const A square = features.compare(target, error, product);
    if (team.rank == 0) loss[ray.index] = square / shape.C;
  }
};

template <class T>
struct LossGradients {
  using A = accumulator<T>;

  int C;
  const A* d_loss;         // [R]
  const A* error;          // [R, C]
  const A* product;        // [P]
  Values w;                // [P]
  MutableValues d_w;       // [P]
  T* d_f;                  // [P, C] or null
  MutableValues d_target;  // [R, C]

  template <int kThreads>
  __device__ void of_ray(const Team<kThreads>& team, const PackedRay& ray) const {
    const A scale = 2 * d_loss[ray.index] / C;
    const A* const e = error + ray.index * C;
    for (int c = team.rank; d_target.data && c < C; c += kThreads) {
      set_value<A>(d_target, ray.index * C + c, -scale * e[c]);
    }
    for (int64_t k = ray.begin + team.rank; d_w.data && k < ray.end; k += kThreads) {
      set_value<A>(d_w, k, scale * product[k]);
    }
    if (!d_f) return;
    constexpr int kLanes = Vector<T>::kLanes;
    const bool is_aligned = C % kLanes == 0 && reinterpret_cast<uintptr_t>(error) % 16 == 0;
    is_aligned ? spread<kLanes>(team, ray, e, scale) : spread<1>(team, ray, e, scale);
  }

 private:
  // d_f_s = w_s scale e, kWidth channels of a thread at a time: 16 bytes, or one.
  template <int kWidth, int kThreads>
  __device__ void spread(const Team<kThreads>& team, const PackedRay& ray, const A* e,
                         A scale) const {
    const int lanes = min(C / kWidth, kThreads), rows = kThreads / lanes, row = team.rank / lanes;
    if (row == rows) return;
    for (int c = team.rank % lanes * kWidth; c < C; c += lanes * kWidth) {
      WideVector<T> g;
      if constexpr (kWidth == 1) {
        g[0] = e[c];
      } else {
#pragma unroll
        for (int p = 0; p < WideVector<T>::kParts; ++p) {
          g.part[p].bits = __ldg(reinterpret_cast<const uint4*>(e + c) + p);
        }
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) g[j] *= scale;
      for (int64_t k = ray.begin + row; k < ray.end; k += rows) {
        const A w_k = value_at<A>(w, k);
        Vector<T> x;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) x.value[j] = narrow<T>(w_k * g[j]);
        T* const to = d_f + k * C + c;
        if constexpr (kWidth == 1) {
          *to = x.value[0];
        } else {
          __stwb(reinterpret_cast<uint4*>(to), x.bits);
        }
      }
    }
  }
};

}  // namespace rayfuse
