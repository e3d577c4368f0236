// Outer bound: w_outer_i = sum of w_env over the bins from that of edge t_i to that of edge
// t_{i+1}. A few threads own a ray, a block a long one; all arrays of a ray are on chip, or in
// global memory where they do not fit. Running sums of w_env in double, a bisection for every edge;
// backward: running sums of the gradient, two bisections for every bin. One pass over memory each
// way. Source: nerfstudio's `outer`, docs/interlevel.md.
#include "envelope.h"

namespace rayfuse {
namespace {

// Of a multiprocessor: for more of them kernels would spill.
constexpr int kLeastBlocks = 3;

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, kLeastBlocks)
    outer_bound_fwd_kernel(RayBlocks blocks, int64_t outside,
                           const T* __restrict__ t,                 // [R, S+1]
                           const T* __restrict__ t_env,             // [R, E+1]
                           const T* __restrict__ w_env,             // [R, E]
                           accumulator<T>* __restrict__ w_outer) {  // [R, S]
  const int S = blocks.S, E = blocks.E;
  const Team<kThreads> team;
  const EnvelopeArrays<T> arrays(blocks.arena<kThreads>(), blocks.blurs, blocks.rays, S, E);
  const Envelope<kThreads, T> envelope(team, arrays, S, E);
  for (int64_t r = blocks.first(); r < blocks.R; r += blocks.step()) {
    const int count = blocks.count(r), ray = min(team.index, count - 1);
    const auto* t_here = load_rows(t + r * (S + 1), arrays.t, count * (S + 1));
    const auto* t_env_here = load_rows(t_env + r * (E + 1), arrays.t_env, count * (E + 1));
    const auto* w_env_here = load_rows(w_env + r * E, arrays.w_env, count * E);
    __syncthreads();
    envelope.locate(t_here + ray * (S + 1), t_env_here + ray * (E + 1), w_env_here + ray * E,
                    outside);
    auto* const w_outer_here = on_chip(arrays.w, w_outer + r * S);
    for (int i = team.rank; count > team.index && i < S; i += kThreads) {
      w_outer_here[ray * S + i] = envelope.w_outer(i);
    }
    __syncthreads();
    store(w_outer + r * S, w_outer_here, count * S);
    __syncthreads();
  }
}

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, kLeastBlocks)
    outer_bound_bwd_kernel(RayBlocks blocks, int64_t outside,
                           const accumulator<T>* __restrict__ d_w_outer,  // [R, S]
                           const T* __restrict__ t,                       // [R, S+1]
                           const T* __restrict__ t_env,                   // [R, E+1]
                           T* __restrict__ d_w_env) {                     // [R, E]
  const int S = blocks.S, E = blocks.E;
  const Team<kThreads> team;
  const EnvelopeArrays<T> arrays(blocks.arena<kThreads>(), blocks.blurs, blocks.rays, S, E);
  const Envelope<kThreads, T> envelope(team, arrays, S, E);
  for (int64_t r = blocks.first(); r < blocks.R; r += blocks.step()) {
    const int count = blocks.count(r), ray = min(team.index, count - 1);
    const auto* t_here = load_rows(t + r * (S + 1), arrays.t, count * (S + 1));
    const auto* t_env_here = load_rows(t_env + r * (E + 1), arrays.t_env, count * (E + 1));
    const auto* d_outer = load_rows(d_w_outer + r * S, arrays.w, count * S) + ray * S;
    __syncthreads();
    envelope.find_bins(t_here + ray * (S + 1), t_env_here + ray * (E + 1), outside);
    auto* const d_w_env_here = on_chip(arrays.w_env, d_w_env + r * E);
    envelope.gradient([&](int i) { return d_outer[i]; },
                      count > team.index ? d_w_env_here + ray * E : nullptr);
    __syncthreads();
    store(d_w_env + r * E, d_w_env_here, count * E);
    __syncthreads();
  }
}

}  // namespace
}  // namespace rayfuse

#include "envelope_plan.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& t, const Tensor& t_env, const Tensor& w_env, int64_t outside) {
  const Device device(t);
  const int64_t S = t.size(-1) - 1, E = w_env.size(-1), R = t.numel() / (S + 1);
  auto sizes = leading_sizes(t, 1);
  sizes.push_back(S);
  Tensor w_outer = empty(t, sizes, accumulator_dtype(t));
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    const EnvelopePlan<T> plan(t, R, S, E);
    launch(plan.grid(device.stream()),
           plan.pick(outer_bound_fwd_kernel<kFew, T>, outer_bound_fwd_kernel<kWarp, T>,
                     outer_bound_fwd_kernel<kBlock, T>),
           plan.blocks, outside, data<T>(t), data<T>(t_env), data<T>(w_env),
           mutable_data<accumulator<T>>(w_outer));
  });
  return w_outer;
}

Tensor bwd(const Tensor& d_w_outer, const Tensor& t, const Tensor& t_env, const Tensor& w_env,
           int64_t outside, int64_t needs) {
  const Device device(t);
  const int64_t S = t.size(-1) - 1, E = w_env.size(-1), R = t.numel() / (S + 1);
  Tensor d_w_env = empty_gradient(w_env, needs, 0);
  if (d_w_env.numel() == 0) return d_w_env;
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    const EnvelopePlan<T> plan(t, R, S, E);
    launch(plan.grid(device.stream()),
           plan.pick(outer_bound_bwd_kernel<kFew, T>, outer_bound_bwd_kernel<kWarp, T>,
                     outer_bound_bwd_kernel<kBlock, T>),
           plan.blocks, outside, data<accumulator<T>>(d_w_outer), data<T>(t), data<T>(t_env),
           mutable_data<T>(d_w_env));
  });
  return d_w_env;
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("outer_bound", TORCH_BOX(&fwd));
  m.impl("outer_bound_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
