// Outer bound: w_outer_i = sum of w_env over the bins from that of edge t_i to that of edge
// t_{i+1}. One thread owns a group of rays. Forward: running sums of w_env in double, then a search
// for every edge, 16 envelope edges at a time. Backward: the search again; each bin of w_env gets
// the gradients of the samples it bounds. Source: nerfstudio's `outer`, docs/interlevel.md.
#include "envelope.h"
#include "prefetch.h"

namespace rayfuse {
namespace {

// Rays begin..end.
template <bool clamp, class T>
RAYFUSE_KERNEL void bounds(int64_t begin, int64_t end, int64_t S, int64_t E, int64_t outside,
                           const T* t,                 // [R, S+1]
                           const T* t_env,             // [R, E+1]
                           const T* w_env,             // [R, E]
                           accumulator<T>* w_outer) {  // [R, S]
  Envelope<T, clamp> envelope(S, E, outside);
  for (int64_t first = begin; first < end; first += envelope.kGroup) {
    const int count = std::min<int64_t>(envelope.kGroup, end - first);
    envelope.read_edges(t + first * (S + 1), t_env + first * (E + 1), count);
    envelope.add_up(w_env + first * E, count);
    for (int i = 0; i < count; ++i) {
      const int64_t r = first + i, later = std::min(r + envelope.kGroup, end - 1);
      prefetch(t + later * (S + 1), S + 1);
      prefetch(t_env + later * (E + 1), E + 1);
      prefetch(w_env + later * E, E);
      envelope.locate(i, t + r * (S + 1), t_env + r * (E + 1));
      std::copy_n(envelope.w_outer(), S, w_outer + r * S);
    }
  }
}

// Rays begin..end.
template <bool clamp, class T>
RAYFUSE_KERNEL void gradients(int64_t begin, int64_t end, int64_t S, int64_t E, int64_t outside,
                              const accumulator<T>* d_outer,  // [R, S]
                              const T* t,                     // [R, S+1]
                              const T* t_env,                 // [R, E+1]
                              T* d_w_env) {                   // [R, E]
  using A = accumulator<T>;
  Envelope<T, clamp> envelope(S, E, outside);
  std::vector<A> d_outer_here(S + 1 + kLanes<A>);
  for (int64_t first = begin; first < end; first += envelope.kGroup) {
    const int count = std::min<int64_t>(envelope.kGroup, end - first);
    envelope.read_edges(t + first * (S + 1), t_env + first * (E + 1), count);
    for (int i = 0; i < count; ++i) {
      const int64_t r = first + i, later = std::min(r + envelope.kGroup, end - 1);
      prefetch(t + later * (S + 1), S + 1);
      prefetch(t_env + later * (E + 1), E + 1);
      prefetch<true>(d_w_env + later * E, E);
      prefetch(d_outer + later * S, S);
      envelope.locate(i, t + r * (S + 1), t_env + r * (E + 1));
      std::copy_n(d_outer + r * S, S, d_outer_here.data() + 1);
      envelope.store_gradient_of(r, end, d_outer_here.data() + 1, d_w_env);
    }
  }
}

}  // namespace
}  // namespace rayfuse

#include "large_memory.h"
#include "registration.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& t, const Tensor& t_env, const Tensor& w_env, int64_t outside) {
  const int64_t S = t.size(-1) - 1, E = w_env.size(-1), R = t.numel() / (S + 1);
  auto sizes = leading_sizes(t, 1);
  sizes.push_back(S);
  Tensor w_outer = empty(t, sizes, accumulator_dtype(t));
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const T *t_ptr = data<T>(t), *t_env_ptr = data<T>(t_env), *w_env_ptr = data<T>(w_env);
    A* w_outer_ptr = mutable_data<A>(w_outer);
    for_rays<A>(R, S + E, [=](int64_t begin, int64_t end) {
      as_constant(outside == kOutsideClamp, [=](auto clamp) {
        bounds<clamp>(begin, end, S, E, outside, t_ptr, t_env_ptr, w_env_ptr, w_outer_ptr);
      });
    });
  });
  return w_outer;
}

Tensor bwd(const Tensor& d_outer, const Tensor& t, const Tensor& t_env, const Tensor& w_env,
           int64_t outside, int64_t needs) {
  const int64_t S = t.size(-1) - 1, E = w_env.size(-1), R = t.numel() / (S + 1);
  Tensor d_w_env = large_gradient(w_env, needs, 0);
  if (d_w_env.numel() == 0) return d_w_env;
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const A* d_outer_ptr = data<A>(d_outer);
    const T *t_ptr = data<T>(t), *t_env_ptr = data<T>(t_env);
    T* d_w_env_ptr = mutable_data<T>(d_w_env);
    for_rays<A>(R, S + E, [=](int64_t begin, int64_t end) {
      as_constant(outside == kOutsideClamp, [=](auto clamp) {
        gradients<clamp>(begin, end, S, E, outside, d_outer_ptr, t_ptr, t_env_ptr, d_w_env_ptr);
      });
    });
  });
  return d_w_env;
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("outer_bound", TORCH_BOX(&fwd));
  m.impl("outer_bound_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
