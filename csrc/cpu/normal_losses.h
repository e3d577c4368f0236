// Losses of Ref-NeRF on normals, of dense and of packed rays: orientation = sum_i w_i o_i^2 with
// o_i = max(0, n_i . d), and predicted = sum_i w_i (1 - n_i . p_i), p the predicted normals. One
// thread owns a few rays and goes over each once, forward, backward or for both, kLanes samples at
// a time. With g the gradients of the two losses: d_w_i = g_o o_i^2 + g_p (1 - n_i . p_i), d_n_i =
// 2 g_o w_i o_i d - g_p w_i p_i, d_p_i = -g_p w_i n_i, d_d = sum_i 2 g_o w_i o_i n_i. Verbin et
// al., Ref-NeRF (2022); docs/normals.md.
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

// What is computed of both losses; any of the gradients may be null.
template <class A>
struct Losses {
  A *orientation, *predicted;  // [R]
};
template <class T>
struct Gradients {
  const accumulator<T>*d_orientation, *d_predicted;  // [R]
  T *d_w,                                            // [P]
      *d_n, *d_n_pred,                               // [P, 3]
      *d_d;                                          // [R, 3]
};

// Rays begin..end: losses, gradients or both.
template <bool orientation, bool predicted, bool with_losses, bool with_gradients, class T,
          class Rays>
RAYFUSE_KERNEL void compute(int64_t begin, int64_t end, const Rays& rays, accumulator<T> of_nan,
                            const T* w,       // [P]
                            const T* n,       // [P, 3]
                            const T* n_pred,  // [P, 3]
                            const T* d,       // [R, 3]
                            Losses<accumulator<T>> loss, Gradients<T> grad) {
  using A = accumulator<T>;
  for (int64_t group = begin; group < end; group += kRays<A>) {
    const int count = std::min<int64_t>(kRays<A>, end - group);
    Block<A> orientations = {}, predictions = {};
    for (int i = 0; i < count; ++i) {
      const int64_t r = group + i, first = rays.begin(r), S = rays.begin(r + 1) - first;
      const A g_o = with_gradients && orientation ? grad.d_orientation[r] : A(0);
      const A g_p = with_gradients && predicted ? grad.d_predicted[r] : A(0);
      Ray<orientation, predicted, T> ray(r, first, w, n, n_pred, d, of_nan);
      LevelledSum<A, true> away, apart, d_direction[3];
      for (int64_t k = 0; k < S; k += kLanes<A>) {
        ray.load_at(k, S - k);
        if (with_losses && orientation) away.add(ray.w_here * (ray.away * ray.away));
        if (with_losses && predicted) apart.add(ray.w_here * ray.apart);
        if (!with_gradients) continue;
        const int64_t at = first + k;
        if (grad.d_w) {
          const vec<A> d_w_here = g_o * (ray.away * ray.away) + g_p * ray.apart;
          S - k < kLanes<A> ? store(grad.d_w + at, d_w_here, S - k)
                            : store(grad.d_w + at, d_w_here);
        }
        // selected, as what is multiplied with may be NaN where a NaN was dropped
        const vec<A> turn = ray.away != 0 ? 2 * g_o * ray.w_here * ray.away : vec<A>{};
        const Triples<A> turns = expand<A>(turn), pulls = expand<A>(-g_p * ray.w_here);
        const auto selected = [&](const Triples<A>& x) {
          return each_part<A>(
              [&](int j) { return turns.part[j] != 0 ? turns.part[j] * x.part[j] : vec<A>{}; });
        };
        if (grad.d_n) {
          const Triples<A> pull = pulls * ray.n_pred_here, turned = selected(ray.direction);
          store_triples(grad.d_n + 3 * at,
                        each_part<A>([&](int j) { return turned.part[j] + pull.part[j]; }), S - k);
        }
        if (grad.d_n_pred) store_triples(grad.d_n_pred + 3 * at, pulls * ray.n_here, S - k);
        if (grad.d_d) {
          const Triples<A> turned = selected(ray.n_here);
          for (int j = 0; j < 3; ++j) d_direction[j].add(turned.part[j]);
        }
      }
      orientations.column[i] = away.total(), predictions.column[i] = apart.total();
      if (with_gradients && grad.d_d) {
        const Triples<A> sum = each_part<A>([&](int j) { return d_direction[j].total(); });
        const A total[3] = {sum_lanes<A>(component<0>(sum)), sum_lanes<A>(component<1>(sum)),
                            sum_lanes<A>(component<2>(sum))};
        for (int c = 0; c < 3; ++c) grad.d_d[3 * r + c] = narrow<T>(total[c]);
      }
    }
    if (!with_losses) continue;
    store(loss.orientation + group, sum_rows(orientations), count);
    store(loss.predicted + group, sum_rows(predictions), count);
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

struct Inputs {
  const Tensor &w, &n;
  const std::optional<Tensor>&n_pred, &d;
  int64_t nan;
};
// Of w, n, n_pred and d; empty where `needs` has no bit.
struct GradientTensors {
  Tensor d_w, d_n, d_n_pred, d_d;

  GradientTensors(const Inputs& x, int64_t needs)
      : d_w(empty_gradient(x.w, needs, 0)),
        d_n(large_gradient(x.n, needs, 1)),
        d_n_pred(large_gradient(x.n_pred, x.w, needs, 2)),
        d_d(empty_gradient(x.d, x.w, needs, 3)) {}
};
// Of the leading sizes.
struct LossTensors {
  Tensor orientation, predicted;

  LossTensors(const Inputs& x, const std::vector<int64_t>& sizes)
      : orientation(empty(x.w, sizes, accumulator_dtype(x.w))),
        predicted(empty(x.w, sizes, accumulator_dtype(x.w))) {}
};

// Losses, if there are tensors for them, and likewise gradients. A term whose tensor is absent is
// not computed, nor are gradients of a loss without one.
template <bool with_losses, bool with_gradients, class Rays>
void compute(const Rays& rays, const Inputs& x, const LossTensors* loss,
             const std::optional<Tensor>& d_orientation, const std::optional<Tensor>& d_predicted,
             const GradientTensors* grad) {
  dispatch(x.w, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const T *w = data<T>(x.w), *n = data<T>(x.n), *n_pred = data<T>(x.n_pred), *d = data<T>(x.d);
    const A of_nan = x.nan == 0 ? A(0) : std::numeric_limits<A>::quiet_NaN();
    Losses<A> losses = {};
    if constexpr (with_losses) {
      losses = {mutable_data<A>(loss->orientation), mutable_data<A>(loss->predicted)};
    }
    Gradients<T> gradients = {};
    if constexpr (with_gradients) {
      gradients = {data<A>(d_orientation),          data<A>(d_predicted),
                   mutable_data<T>(grad->d_w),      mutable_data<T>(grad->d_n),
                   mutable_data<T>(grad->d_n_pred), mutable_data<T>(grad->d_d)};
    }
    const bool orients = d && (with_losses || gradients.d_orientation);
    const bool predicts = n_pred && (with_losses || gradients.d_predicted);
    rays.for_each_piece(1, [=](int64_t begin, int64_t end) {
      as_constant(orients, [=](auto orientation) {
        as_constant(predicts, [=](auto predicted) {
          compute<orientation, predicted, with_losses, with_gradients>(
              begin, end, rays, of_nan, w, n, n_pred, d, losses, gradients);
        });
      });
    });
  });
}

template <class Rays>
std::tuple<Tensor, Tensor> losses(const Rays& rays, const std::vector<int64_t>& sizes,
                                  const Inputs& x) {
  const LossTensors loss(x, sizes);
  compute<true, false>(rays, x, &loss, {}, {}, nullptr);
  return {loss.orientation, loss.predicted};
}

template <class Rays>
std::tuple<Tensor, Tensor, Tensor, Tensor> gradients(const Rays& rays,
                                                     const std::optional<Tensor>& d_orientation,
                                                     const std::optional<Tensor>& d_predicted,
                                                     const Inputs& x, int64_t needs) {
  const GradientTensors grad(x, needs);
  compute<false, true>(rays, x, nullptr, d_orientation, d_predicted, &grad);
  return {grad.d_w, grad.d_n, grad.d_n_pred, grad.d_d};
}

template <class Rays>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> losses_and_gradients(
    const Rays& rays, const std::vector<int64_t>& sizes, double d_orientation, double d_predicted,
    const Inputs& x, int64_t needs) {
  const LossTensors loss(x, sizes);
  const GradientTensors grad(x, needs);
  compute<true, true>(rays, x, &loss, full(x.w, sizes, d_orientation),
                      full(x.w, sizes, d_predicted), &grad);
  return {sum_of_rays(loss.orientation),
          sum_of_rays(loss.predicted),
          grad.d_w,
          grad.d_n,
          grad.d_n_pred,
          grad.d_d};
}

}  // namespace
}  // namespace rayfuse
