// Interlevel loss: L = 1/S sum_i r_i u_i with r_i = max(0, w_i - w_outer_i), u_i = r_i / (w_i +
// eps), w_outer_i the weight of the envelope's bins that sample i touches (envelope.h). One thread
// owns a group of rays. Forward: one pass. Backward: the same pass again, then d_w_outer_i = -2
// u_i, d_w_i = u_i (2 - u_i), and each bin of w_env gets the gradients of the samples it bounds,
// all times d_loss / S. Source: Mip-NeRF 360, eq. 13; docs/interlevel.md.
#include "envelope.h"

namespace rayfuse {
namespace {

// Rays begin..end.
template <bool clamp, class T>
RAYFUSE_KERNEL void losses(int64_t begin, int64_t end, int64_t S, int64_t E, int64_t outside,
                           accumulator<T> eps,
                           const T* t,              // [R, S+1]
                           const T* w,              // [R, S]
                           const T* t_env,          // [R, E+1]
                           const T* w_env,          // [R, E]
                           accumulator<T>* loss) {  // [R]
  using A = accumulator<T>;
  Envelope<T, clamp> envelope(S, E, outside);
  for (int64_t first = begin; first < end; first += envelope.kGroup) {
    const int count = std::min<int64_t>(envelope.kGroup, end - first);
    envelope.read_edges(t + first * (S + 1), t_env + first * (E + 1), count);
    envelope.add_up(w_env + first * E, count);
    for (int j = 0; j < count; ++j) {
      const int64_t r = first + j, later = std::min(r + envelope.kGroup, end - 1);
      prefetch(t + later * (S + 1), S + 1);
      prefetch(w + later * S, S);
      prefetch(t_env + later * (E + 1), E + 1);
      prefetch(w_env + later * E, E);
      envelope.locate(j, t + r * (S + 1), t_env + r * (E + 1));
      using Sums = doubles<kLanes<A>>;
      Sums sums = {};
      for_each_register<A>(S, [&](int64_t i, int64_t n) {
        const Uncovered<A> here(load(w + r * S + i, n), load(envelope.w_outer() + i, n), eps);
        sums += __builtin_convertvector(here.r * here.u, Sums);
      });
      double total = 0;
      for (int i = 0; i < kLanes<A>; ++i) total += sums[i];
      loss[r] = static_cast<A>(total / std::max<int64_t>(S, 1));
    }
  }
}

// Rays begin..end.
template <bool clamp, class T>
RAYFUSE_KERNEL void gradients(int64_t begin, int64_t end, int64_t S, int64_t E, int64_t outside,
                              accumulator<T> eps,
                              const accumulator<T>* d_loss,  // [R]
                              const T* t,                    // [R, S+1]
                              const T* w,                    // [R, S]
                              const T* t_env,                // [R, E+1]
                              const T* w_env,                // [R, E]
                              T* d_w,                        // [R, S] or null
                              T* d_w_env) {                  // [R, E] or null
  using A = accumulator<T>;
  Envelope<T, clamp> envelope(S, E, outside);
  std::vector<A> d_outer(S + 1 + 2 * kLanes<A>);
  for (int64_t first = begin; first < end; first += envelope.kGroup) {
    const int count = std::min<int64_t>(envelope.kGroup, end - first);
    envelope.read_edges(t + first * (S + 1), t_env + first * (E + 1), count);
    envelope.add_up(w_env + first * E, count);
    for (int j = 0; j < count; ++j) {
      const int64_t r = first + j, later = std::min(r + envelope.kGroup, end - 1);
      prefetch(t + later * (S + 1), S + 1);
      prefetch(w + later * S, S);
      prefetch(t_env + later * (E + 1), E + 1);
      if (d_w_env) prefetch<true>(d_w_env + later * E, E);
      prefetch(w_env + later * E, E);
      const A scale = d_loss[r] / std::max<int64_t>(S, 1);
      envelope.locate(j, t + r * (S + 1), t_env + r * (E + 1));
      for_each_register<A>(S, [&](int64_t i, int64_t n) {
        const Uncovered<A> here(load(w + r * S + i, n), load(envelope.w_outer() + i, n), eps);
        if (d_w) store(d_w + r * S + i, scale * (here.u * (2 - here.u)), n);
        store(d_outer.data() + 1 + i, -2 * scale * here.u);
      });
      if (d_w_env) {
        envelope.store_gradient_of(r, end, d_outer.data() + 1, d_w_env);
      }
    }
  }
}

}  // namespace
}  // namespace rayfuse

#include "large_memory.h"
#include "registration.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& t, const Tensor& w, const Tensor& t_env, const Tensor& w_env,
           int64_t outside, double eps) {
  const int64_t S = w.size(-1), E = w_env.size(-1);
  Tensor loss = empty(t, leading_sizes(w, 1), accumulator_dtype(t));
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const T *t_ptr = data<T>(t), *w_ptr = data<T>(w);
    const T *t_env_ptr = data<T>(t_env), *w_env_ptr = data<T>(w_env);
    A* loss_ptr = mutable_data<A>(loss);
    for_rays<A>(loss.numel(), S + E, [=](int64_t begin, int64_t end) {
      as_constant(outside == kOutsideClamp, [=](auto clamp) {
        losses<clamp>(begin, end, S, E, outside, static_cast<A>(eps), t_ptr, w_ptr, t_env_ptr,
                      w_env_ptr, loss_ptr);
      });
    });
  });
  return loss;
}

std::tuple<Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& t, const Tensor& w,
                               const Tensor& t_env, const Tensor& w_env, int64_t outside,
                               double eps, int64_t needs) {
  const int64_t S = w.size(-1), E = w_env.size(-1);
  Tensor d_w = empty_gradient(w, needs, 0), d_w_env = large_gradient(w_env, needs, 1);
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const A* d_loss_ptr = data<A>(d_loss);
    const T *t_ptr = data<T>(t), *w_ptr = data<T>(w);
    const T *t_env_ptr = data<T>(t_env), *w_env_ptr = data<T>(w_env);
    T *d_w_ptr = mutable_data<T>(d_w), *d_w_env_ptr = mutable_data<T>(d_w_env);
    for_rays<A>(d_loss.numel(), S + E, [=](int64_t begin, int64_t end) {
      as_constant(outside == kOutsideClamp, [=](auto clamp) {
        gradients<clamp>(begin, end, S, E, outside, static_cast<A>(eps), d_loss_ptr, t_ptr, w_ptr,
                         t_env_ptr, w_env_ptr, d_w_ptr, d_w_env_ptr);
      });
    });
  });
  return {d_w, d_w_env};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("interlevel_loss", TORCH_BOX(&fwd));
  m.impl("interlevel_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
