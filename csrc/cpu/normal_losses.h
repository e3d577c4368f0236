// Losses of Ref-NeRF on normals, of dense and of packed rays: orientation = sum_i w_i o_i^2 with
// o_i = max(0, n_i . d), and predicted = sum_i w_i (1 - n_i . p_i), p the predicted normals. One
// thread owns a few rays and goes over each once, forward and backward, kLanes samples at a time.
// With g the gradients of the two losses: d_w_i = g_o o_i^2 + g_p (1 - n_i . p_i), d_n_i = 2 g_o
// w_i o_i d - g_p w_i p_i, d_p_i = -g_p w_i n_i, d_d = sum_i 2 g_o w_i o_i n_i. Verbin et al.,
// Ref-NeRF (2022); docs/normals.md.
#pragma once

#include "rays.h"
#include "triples.h"

#include <limits>

namespace rayfuse {
namespace {

// Ray r, whose samples begin at `first`; a term whose tensor is absent is not computed.
template <bool orientation, bool predicted, class T>
struct Ray {
  using A = accumulator<T>;

  Ray(int64_t r, int64_t first, const T* w, const T* n, const T* n_pred, const T* d, A of_nan)
      : w(w + first), n(n + 3 * first), of_nan(of_nan) {
    if constexpr (predicted) this->n_pred = n_pred + 3 * first;
    if constexpr (orientation) {
      direction = repeat_triple<A>(widen(d[3 * r]), widen(d[3 * r + 1]), widen(d[3 * r + 2]));
    }
  }

  void load_at(int64_t k, int64_t count) {
    w_here = count < kLanes<A> ? load(w + k, count) : load(w + k);
    n_here = load_triples(n + 3 * k, count);
    if constexpr (orientation) {
      const vec<A> dot = sum_components(n_here * direction);
      away = dot > 0 ? dot : (dot <= 0 ? vec<A>{} : of_nan - vec<A>{});
    }
    if constexpr (predicted) {
      n_pred_here = load_triples(n_pred + 3 * k, count);
      apart = 1 - sum_components(n_here * n_pred_here);
    }
  }

  const T *w, *n, *n_pred = nullptr;
  A of_nan;
  Triples<A> direction = {}, n_here, n_pred_here = {};
  vec<A> w_here;
  vec<A> away = {};   // o
  vec<A> apart = {};  // 1 - n . p
};

// Rays begin..end.
template <bool orientation, bool predicted, class T, class Rays>
RAYFUSE_KERNEL void losses(int64_t begin, int64_t end, const Rays& rays, accumulator<T> of_nan,
                           const T* w,                             // [P]
                           const T* n,                             // [P, 3]
                           const T* n_pred,                        // [P, 3]
                           const T* d,                             // [R, 3]
                           accumulator<T>* orientation_loss,       // [R]
                           accumulator<T>* predicted_normal_loss)  // [R]
{
  using A = accumulator<T>;
  for (int64_t r = begin; r < end; r += kRays<A>) {
    const int count = std::min<int64_t>(kRays<A>, end - r);
    Block<A> orientations = {}, predictions = {};
    for (int i = 0; i < count; ++i) {
      const int64_t first = rays.begin(r + i), S = rays.begin(r + i + 1) - first;
      Ray<orientation, predicted, T> ray(r + i, first, w, n, n_pred, d, of_nan);
      LevelledSum<A, true> away, apart;
      for (int64_t k = 0; k < S; k += kLanes<A>) {
        ray.load_at(k, S - k);
        if (orientation) away.add(ray.w_here * (ray.away * ray.away));
        if (predicted) apart.add(ray.w_here * ray.apart);
      }
      orientations.column[i] = away.total(), predictions.column[i] = apart.total();
    }
    store(orientation_loss + r, sum_rows(orientations), count);
    store(predicted_normal_loss + r, sum_rows(predictions), count);
  }
}

// Rays begin..end.
template <bool orientation, bool predicted, class T, class Rays>
RAYFUSE_KERNEL void gradients(int64_t begin, int64_t end, const Rays& rays, accumulator<T> of_nan,
                              const accumulator<T>* d_orientation_loss,       // [R]
                              const accumulator<T>* d_predicted_normal_loss,  // [R]
                              const T* w,                                     // [P]
                              const T* n,                                     // [P, 3]
                              const T* n_pred,                                // [P, 3]
                              const T* d,                                     // [R, 3]
                              T* d_w,                                         // [P] or null
                              T* d_n,                                         // [P, 3] or null
                              T* d_n_pred,                                    // [P, 3] or null
                              T* d_d) {                                       // [R, 3] or null
  using A = accumulator<T>;
  for (int64_t r = begin; r < end; ++r) {
    const A g_o = orientation ? d_orientation_loss[r] : A(0);
    const A g_p = predicted ? d_predicted_normal_loss[r] : A(0);
    const int64_t first = rays.begin(r), S = rays.begin(r + 1) - first;
    Ray<orientation, predicted, T> ray(r, first, w, n, n_pred, d, of_nan);
    LevelledSum<A, true> d_direction[3];
    for (int64_t k = 0; k < S; k += kLanes<A>) {
      ray.load_at(k, S - k);
      const int64_t at = first + k;
      if (d_w) {
        const vec<A> d_w_here = g_o * (ray.away * ray.away) + g_p * ray.apart;
        S - k < kLanes<A> ? store(d_w + at, d_w_here, S - k) : store(d_w + at, d_w_here);
      }
      // selected, as what is multiplied with may be NaN where a NaN was dropped
      const vec<A> turn = ray.away != 0 ? 2 * g_o * ray.w_here * ray.away : vec<A>{};
      const Triples<A> turns = expand<A>(turn), pulls = expand<A>(-g_p * ray.w_here);
      const auto selected = [&](const Triples<A>& x) {
        return each_part<A>(
            [&](int j) { return turns.part[j] != 0 ? turns.part[j] * x.part[j] : vec<A>{}; });
      };
      if (d_n) {
        const Triples<A> pull = pulls * ray.n_pred_here, turned = selected(ray.direction);
        store_triples(d_n + 3 * at,
                      each_part<A>([&](int j) { return turned.part[j] + pull.part[j]; }), S - k);
      }
      if (d_n_pred) store_triples(d_n_pred + 3 * at, pulls * ray.n_here, S - k);
      if (d_d) {
        const Triples<A> turned = selected(ray.n_here);
        for (int j = 0; j < 3; ++j) d_direction[j].add(turned.part[j]);
      }
    }
    if (d_d) {
      const Triples<A> sum = each_part<A>([&](int j) { return d_direction[j].total(); });
      const A total[3] = {sum_lanes<A>(component<0>(sum)), sum_lanes<A>(component<1>(sum)),
                          sum_lanes<A>(component<2>(sum))};
      for (int c = 0; c < 3; ++c) d_d[3 * r + c] = narrow<T>(total[c]);
    }
  }
}

}  // namespace
}  // namespace rayfuse

#include "large_memory.h"
#include "registration.h"

namespace rayfuse {
namespace {

// What stands for a NaN of n . v, by the choice of `nan`.
template <class A>
A of_nan(int64_t nan) {
  return nan == 0 ? A(0) : std::numeric_limits<A>::quiet_NaN();
}

// Both losses, of the leading sizes.
template <class Rays>
std::tuple<Tensor, Tensor> losses(const Rays& rays, const std::vector<int64_t>& sizes,
                                  const Tensor& w, const Tensor& n,
                                  const std::optional<Tensor>& n_pred,
                                  const std::optional<Tensor>& d, int64_t nan) {
  Tensor orientation_loss = empty(w, sizes, accumulator_dtype(w));
  Tensor predicted_normal_loss = empty(w, sizes, accumulator_dtype(w));
  dispatch(w, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const T *w_ptr = data<T>(w), *n_ptr = data<T>(n), *n_pred_ptr = data<T>(n_pred),
            *d_ptr = data<T>(d);
    A* orientation_ptr = mutable_data<A>(orientation_loss);
    A* predicted_ptr = mutable_data<A>(predicted_normal_loss);
    rays.for_each_piece(1, [=](int64_t begin, int64_t end) {
      as_constant(d_ptr != nullptr, [=](auto orientation) {
        as_constant(n_pred_ptr != nullptr, [=](auto predicted) {
          losses<orientation, predicted>(begin, end, rays, of_nan<A>(nan), w_ptr, n_ptr, n_pred_ptr,
                                         d_ptr, orientation_ptr, predicted_ptr);
        });
      });
    });
  });
  return {orientation_loss, predicted_normal_loss};
}

template <class Rays>
std::tuple<Tensor, Tensor, Tensor, Tensor> gradients(
    const Rays& rays, const std::optional<Tensor>& d_orientation_loss,
    const std::optional<Tensor>& d_predicted_normal_loss, const Tensor& w, const Tensor& n,
    const std::optional<Tensor>& n_pred, const std::optional<Tensor>& d, int64_t nan,
    int64_t needs) {
  Tensor d_w = empty_gradient(w, needs, 0), d_n = large_gradient(n, needs, 1);
  Tensor d_n_pred = large_gradient(n_pred, w, needs, 2), d_d = empty_gradient(d, w, needs, 3);
  dispatch(w, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const A *d_orientation_ptr = data<A>(d_orientation_loss),
            *d_predicted_ptr = data<A>(d_predicted_normal_loss);
    const T *w_ptr = data<T>(w), *n_ptr = data<T>(n), *n_pred_ptr = data<T>(n_pred),
            *d_ptr = data<T>(d);
    T *d_w_ptr = mutable_data<T>(d_w), *d_n_ptr = mutable_data<T>(d_n),
      *d_n_pred_ptr = mutable_data<T>(d_n_pred), *d_d_ptr = mutable_data<T>(d_d);
    rays.for_each_piece(1, [=](int64_t begin, int64_t end) {
      as_constant(d_ptr && d_orientation_ptr, [=](auto orientation) {
        as_constant(n_pred_ptr && d_predicted_ptr, [=](auto predicted) {
          gradients<orientation, predicted>(begin, end, rays, of_nan<A>(nan), d_orientation_ptr,
                                            d_predicted_ptr, w_ptr, n_ptr, n_pred_ptr, d_ptr,
                                            d_w_ptr, d_n_ptr, d_n_pred_ptr, d_d_ptr);
        });
      });
    });
  });
  return {d_w, d_n, d_n_pred, d_d};
}

}  // namespace
}  // namespace rayfuse
