// Interlevel loss: L = 1/S sum_i r_i u_i with r_i = max(0, w_i - w_outer_i), u_i = r_i / (w_i +
// eps), w_outer_i the weight of the envelope's bins that sample i touches (envelope.h). One thread
// owns a group of rays. Forward: one pass, which keeps dL/dw_i = u_i (2 - u_i) / S and dL/dw_env,
// where each bin gets the dL/dw_outer_i = -2 u_i / S of the samples it bounds. Backward: d_loss
// times these; at once with the loss, these of d_loss times it. Source: Mip-NeRF 360, eq. 13;
// docs/interlevel.md.
#include "interlevel_loss.h"

namespace rayfuse {
namespace {

// Rays begin..end, with the gradients of d_loss times each loss.
template <bool clamp, class T, class G>
RAYFUSE_KERNEL void losses(int64_t begin, int64_t end, int64_t S, int64_t E, int64_t outside,
                           accumulator<T> eps, accumulator<T> d_loss,
                           const T* t,            // [R, S+1]
                           const T* w,            // [R, S]
                           const T* t_env,        // [R, E+1]
                           const T* w_env,        // [R, E]
                           accumulator<T>* loss,  // [R]
                           G* d_w,                // [R, S] or null
                           G* d_w_env) {          // [R, E] or null
  using A = accumulator<T>;
  Envelope<T, clamp> envelope(S, E, outside);
  std::vector<A> slope_outer(S + 1 + 2 * kLanes<A>);
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
      if (d_w) prefetch<true>(d_w + later * S, S);
      if (d_w_env) prefetch<true>(d_w_env + later * E, E);
      envelope.locate(j, t + r * (S + 1), t_env + r * (E + 1));
      loss[r] = loss_and_slopes({r * S, S, end * S}, eps, d_loss, w, envelope.w_outer(), d_w,
                                slope_outer.data() + 1);
      if (d_w_env) envelope.store_gradient_of(r, end, slope_outer.data() + 1, d_w_env);
    }
  }
}

// The losses. Gradients to w and w_env go to the tensors that are given for them, whose elements
// are sums or, of half precision, values.
template <bool of_sums>
Tensor losses(double d_loss, const Tensor& t, const Tensor& w, const Tensor& t_env,
              const Tensor& w_env, int64_t outside, double eps, const Tensor& d_w,
              const Tensor& d_w_env) {
  const int64_t S = w.size(-1), E = w_env.size(-1);
  Tensor loss = empty(t, leading_sizes(w, 1), accumulator_dtype(t));
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    using G = std::conditional_t<of_sums, A, T>;
    const T *t_ptr = data<T>(t), *w_ptr = data<T>(w);
    const T *t_env_ptr = data<T>(t_env), *w_env_ptr = data<T>(w_env);
    A* loss_ptr = mutable_data<A>(loss);
    G *d_w_ptr = mutable_data<G>(d_w), *d_w_env_ptr = mutable_data<G>(d_w_env);
    for_rays<A>(loss.numel(), S + E, [=](int64_t begin, int64_t end) {
      as_constant(outside == kOutsideClamp, [=](auto clamp) {
        losses<clamp>(begin, end, S, E, outside, static_cast<A>(eps), static_cast<A>(d_loss), t_ptr,
                      w_ptr, t_env_ptr, w_env_ptr, loss_ptr, d_w_ptr, d_w_env_ptr);
      });
    });
  });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& t, const Tensor& w, const Tensor& t_env,
                                       const Tensor& w_env, int64_t outside, double eps) {
  const auto dtype = accumulator_dtype(t);
  Tensor slope = empty(t, leading_sizes(w, 0), dtype),
         slope_env = empty(t, leading_sizes(w_env, 0), dtype);
  return {losses<true>(1, t, w, t_env, w_env, outside, eps, slope, slope_env), slope, slope_env};
}

std::tuple<Tensor, Tensor, Tensor> fwd_bwd(double d_loss, const Tensor& t, const Tensor& w,
                                           const Tensor& t_env, const Tensor& w_env,
                                           int64_t outside, double eps, int64_t needs) {
  Tensor d_w = empty_gradient(w, needs, 0), d_w_env = large_gradient(w_env, needs, 1);
  const Tensor loss = losses<false>(d_loss, t, w, t_env, w_env, outside, eps, d_w, d_w_env);
  return {sum_of_rays(loss), d_w, d_w_env};
}

std::tuple<Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& slope, const Tensor& slope_env,
                               const Tensor&, const Tensor& w, const Tensor&, const Tensor& w_env,
                               int64_t, double, int64_t needs) {
  const auto d = [&](const Tensor& x, const Tensor& slope, int i) {
    return scaled(DenseRays(d_loss.numel(), x.size(-1)), d_loss, slope, x, needs, i);
  };
  return {d(w, slope, 0), d(w_env, slope_env, 1)};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("interlevel_loss", TORCH_BOX(&fwd));
  m.impl("interlevel_loss_bwd", TORCH_BOX(&bwd));
  m.impl("interlevel_loss_fwd_bwd", TORCH_BOX(&fwd_bwd));
}

}  // namespace rayfuse
