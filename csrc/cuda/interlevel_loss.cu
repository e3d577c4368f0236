// Interlevel loss: L = 1/S sum_i r_i u_i with r_i = max(0, w_i - w_outer_i), u_i = r_i / (w_i +
// eps), w_outer_i the weight of the envelope's bins that sample i touches (envelope.h). A warp owns
// a ray, a block a long one; all arrays of a ray are on chip, or in global memory where they do not
// fit. One pass over memory each way. Backward: d_w_outer_i = -2 u_i, d_w_i = u_i (2 - u_i), and
// each bin of w_env gets the gradients of the samples it bounds, all times d_loss / S. Source:
// Mip-NeRF 360, eq. 13; docs/interlevel.md.
#include "envelope.h"
#include "uncovered.h"

namespace rayfuse {
namespace {

// Of a multiprocessor: for more of them kernels would spill.
constexpr int kLeastBlocks = 3;

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, kLeastBlocks)
    interlevel_loss_fwd_kernel(RayBlocks blocks, int64_t outside, accumulator<T> eps,
                               const T* __restrict__ t,              // [R, S+1]
                               const T* __restrict__ w,              // [R, S]
                               const T* __restrict__ t_env,          // [R, E+1]
                               const T* __restrict__ w_env,          // [R, E]
                               accumulator<T>* __restrict__ loss) {  // [R]
  const int S = blocks.S, E = blocks.E;
  const Team<kThreads> team;
  const EnvelopeArrays<T> arrays(blocks.arena<kThreads>(), blocks.rays, S, E);
  const Envelope<kThreads, T> envelope(team, arrays, S, E);
  for (int64_t r = blocks.first(); r < blocks.R; r += blocks.step()) {
    const int count = blocks.count(r), ray = min(team.index, count - 1);
    const auto* t_here = load_rows(t + r * (S + 1), arrays.t, count * (S + 1));
    const auto* w_here = load_rows(w + r * S, arrays.w, count * S) + ray * S;
    const auto* t_env_here = load_rows(t_env + r * (E + 1), arrays.t_env, count * (E + 1));
    const auto* w_env_here = load_rows(w_env + r * E, arrays.w_env, count * E);
    __syncthreads();
    envelope.locate(t_here + ray * (S + 1), t_env_here + ray * (E + 1), w_env_here + ray * E,
                    outside);
    DoubleSum own = {};
    for (int i = team.rank; i < S; i += kThreads) {
      const Uncovered here(w_here[i], envelope.w_outer(i), eps);
      own.value += here.r * here.u;
    }
    const double total = team.template scan<false>(own).total.value;
    if (team.rank == 0 && count > team.index) {
      loss[r + ray] = static_cast<accumulator<T>>(total / max(S, 1));
    }
    __syncthreads();
  }
}

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, kLeastBlocks)
    interlevel_loss_bwd_kernel(RayBlocks blocks, int64_t outside, accumulator<T> eps,
                               const accumulator<T>* __restrict__ d_loss,  // [R]
                               const T* __restrict__ t,                    // [R, S+1]
                               const T* __restrict__ w,                    // [R, S]
                               const T* __restrict__ t_env,                // [R, E+1]
                               const T* __restrict__ w_env,                // [R, E]
                               T* __restrict__ d_w,                        // [R, S] or null
                               T* __restrict__ d_w_env) {                  // [R, E] or null
  using A = accumulator<T>;
  const int S = blocks.S, E = blocks.E;
  const Team<kThreads> team;
  const EnvelopeArrays<T> arrays(blocks.arena<kThreads>(), blocks.rays, S, E);
  const Envelope<kThreads, T> envelope(team, arrays, S, E);
  for (int64_t r = blocks.first(); r < blocks.R; r += blocks.step()) {
    const int count = blocks.count(r), ray = min(team.index, count - 1);
    const auto* t_here = load_rows(t + r * (S + 1), arrays.t, count * (S + 1));
    const auto* w_here = load_rows(w + r * S, arrays.w, count * S) + ray * S;
    const auto* t_env_here = load_rows(t_env + r * (E + 1), arrays.t_env, count * (E + 1));
    const auto* w_env_here = load_rows(w_env + r * E, arrays.w_env, count * E);
    const A scale = d_loss[r + ray] / max(S, 1);
    __syncthreads();
    envelope.locate(t_here + ray * (S + 1), t_env_here + ray * (E + 1), w_env_here + ray * E,
                    outside);
    const auto uncovered = [&](int i) { return Uncovered<A>(w_here[i], envelope.w_outer(i), eps); };
    // the edges and the weights of the envelope have done their duty
    auto* const d_w_here = on_chip(arrays.t, d_w ? d_w + r * S : nullptr);
    auto* const d_w_env_here = on_chip(arrays.w_env, d_w_env ? d_w_env + r * E : nullptr);
    for (int i = team.rank; d_w && count > team.index && i < S; i += kThreads) {
      const A u = uncovered(i).u;
      d_w_here[ray * S + i] = scale * (u * (2 - u));
    }
    if (d_w_env) {
      envelope.gradient([&](int i) { return -2 * scale * uncovered(i).u; },
                        count > team.index ? d_w_env_here + ray * E : nullptr);
    }
    __syncthreads();
    if (d_w) store(d_w + r * S, d_w_here, count * S);
    if (d_w_env) store(d_w_env + r * E, d_w_env_here, count * E);
    __syncthreads();
  }
}

}  // namespace
}  // namespace rayfuse

#include "envelope_plan.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& t, const Tensor& w, const Tensor& t_env, const Tensor& w_env,
           int64_t outside, double eps) {
  const Device device(t);
  const int64_t S = w.size(-1), E = w_env.size(-1);
  Tensor loss = empty(t, leading_sizes(w, 1), accumulator_dtype(t));
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const EnvelopePlan<T> plan(t, loss.numel(), S, E);
    launch(
        plan.grid(device.stream()),
        plan.warps ? interlevel_loss_fwd_kernel<kWarp, T> : interlevel_loss_fwd_kernel<kBlock, T>,
        plan.blocks, outside, static_cast<A>(eps), data<T>(t), data<T>(w), data<T>(t_env),
        data<T>(w_env), mutable_data<A>(loss));
  });
  return loss;
}

std::tuple<Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& t, const Tensor& w,
                               const Tensor& t_env, const Tensor& w_env, int64_t outside,
                               double eps, int64_t needs) {
  const Device device(t);
  const int64_t S = w.size(-1), E = w_env.size(-1);
  Tensor d_w = empty_gradient(w, needs, 0), d_w_env = empty_gradient(w_env, needs, 1);
  if (d_w.numel() + d_w_env.numel() == 0) return {d_w, d_w_env};
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const EnvelopePlan<T> plan(t, d_loss.numel(), S, E);
    launch(
        plan.grid(device.stream()),
        plan.warps ? interlevel_loss_bwd_kernel<kWarp, T> : interlevel_loss_bwd_kernel<kBlock, T>,
        plan.blocks, outside, static_cast<A>(eps), data<A>(d_loss), data<T>(t), data<T>(w),
        data<T>(t_env), data<T>(w_env), mutable_data<T>(d_w), mutable_data<T>(d_w_env));
  });
  return {d_w, d_w_env};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("interlevel_loss", TORCH_BOX(&fwd));
  m.impl("interlevel_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
