// Interlevel loss: L = 1/S sum_i r_i u_i with r_i = max(0, w_i - w_outer_i), u_i = r_i / (w_i +
// eps), w_outer_i the weight of the envelope's bins that sample i touches (envelope.h). A few
// threads own a ray, a block a long one; all arrays of a ray are on chip, or in global memory where
// they do not fit. Forward: one pass, which keeps dL/dw_i = u_i (2 - u_i) / S and dL/dw_env, where
// each bin gets the dL/dw_outer_i = -2 u_i / S of the samples it bounds. Backward: a thread
// multiplies a few of these by d_loss. Source: Mip-NeRF 360, eq. 13; docs/interlevel.md.
#include "envelope.h"
#include "uncovered.h"

namespace rayfuse {
namespace {

// Of a multiprocessor: for more of them kernels would spill.
template <int kThreads>
constexpr int kLeastBlocks = kThreads < kBlock ? 3 : 2;

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, kLeastBlocks<kThreads>)
    interlevel_loss_fwd_kernel(RayBlocks blocks, int64_t outside, accumulator<T> eps,
                               const T* __restrict__ t,                   // [R, S+1]
                               const T* __restrict__ w,                   // [R, S]
                               const T* __restrict__ t_env,               // [R, E+1]
                               const T* __restrict__ w_env,               // [R, E]
                               accumulator<T>* __restrict__ loss,         // [R]
                               accumulator<T>* __restrict__ slope,        // [R, S]
                               accumulator<T>* __restrict__ slope_env) {  // [R, E]
  using A = accumulator<T>;
  const int S = blocks.S, E = blocks.E;
  const A mean = A(1) / max(S, 1);
  const Team<kThreads> team;
  const EnvelopeArrays<T> arrays(blocks.arena<kThreads>(), blocks.blurs, blocks.rays, S, E);
  const Envelope<kThreads, T> envelope(team, arrays, S, E);
  for (int64_t r = blocks.first(); r < blocks.R; r += blocks.step()) {
    const int count = blocks.count(r), ray = min(team.index, count - 1);
    const bool is_own = count > team.index;
    const auto* t_here = load_rows(t + r * (S + 1), arrays.t, count * (S + 1));
    const auto* w_here = load_rows(w + r * S, arrays.w, count * S) + ray * S;
    const auto* t_env_here = load_rows(t_env + r * (E + 1), arrays.t_env, count * (E + 1));
    const auto* w_env_here = load_rows(w_env + r * E, arrays.w_env, count * E);
    __syncthreads();
    envelope.locate(t_here + ray * (S + 1), t_env_here + ray * (E + 1), w_env_here + ray * E,
                    outside);
    // the edges and the weights of the envelope have done their duty
    A* const slope_here = on_chip(arrays.t, slope + r * S);
    A* const slope_env_here = on_chip(arrays.w_env, slope_env + r * E);
    // until all bins have read it
    A* const u = slope_here + ray * S;
    DoubleSum own = {};
    for (int i = team.rank; i < S; i += kThreads) {
      const Uncovered here(w_here[i], envelope.w_outer(i), eps);
      own.value += here.r * here.u;
      if (is_own) u[i] = here.u;
    }
    const double total = team.template scan<false>(own).total.value;
    if (team.rank == 0 && is_own) loss[r + ray] = static_cast<A>(total / max(S, 1));
    __syncthreads();
    envelope.gradient([&](int i) { return -2 * mean * u[i]; },
                      is_own ? slope_env_here + ray * E : nullptr);
    for (int i = team.rank; is_own && i < S; i += kThreads) u[i] = mean * (u[i] * (2 - u[i]));
    __syncthreads();
    store(slope + r * S, slope_here, count * S);
    store(slope_env + r * E, slope_env_here, count * E);
    __syncthreads();
  }
}

// An input, and the gradient of each ray's loss to it.
template <class T>
struct Slopes {
  static constexpr int kOfBlock = 4 * kBlock;

  const accumulator<T>* slope;  // [R, n]
  T* d_x;                       // [R, n] or null
  int64_t R;
  int n;

  int64_t blocks() const { return d_x ? (R * n + kOfBlock - 1) / kOfBlock : 0; }

  __device__ void scale(const accumulator<T>* d_loss) const {
    using A = accumulator<T>;
    __shared__ __align__(16) A from[chip_size<A>(kOfBlock)], to[chip_size<T>(kOfBlock)];
    const int64_t first = int64_t{blockIdx.x} * kOfBlock;
    if (!d_x || first >= R * n) return;
    const int64_t r = first / n;
    const int into = first % n, count = min(R * n - first, int64_t{kOfBlock});
    A *const slope_here = on_chip(from, slope + first), *const d_x_here = on_chip(to, d_x + first);
    load(slope + first, slope_here, count);
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kBlock) {
      d_x_here[i] = d_loss[r + (into + i) / n] * slope_here[i];
    }
    __syncthreads();
    store(d_x + first, d_x_here, count);
  }
};

template <class T>
__global__ void __launch_bounds__(kBlock)
    interlevel_loss_bwd_kernel(const accumulator<T>* __restrict__ d_loss,  // [R]
                               Slopes<T> w, Slopes<T> w_env) {
  w.scale(d_loss);
  w_env.scale(d_loss);
}

}  // namespace
}  // namespace rayfuse

#include "envelope_plan.h"

namespace rayfuse {
namespace {

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& t, const Tensor& w, const Tensor& t_env,
                                       const Tensor& w_env, int64_t outside, double eps) {
  const Device device(t);
  const int64_t S = w.size(-1), E = w_env.size(-1);
  const auto dtype = accumulator_dtype(t);
  Tensor loss = empty(t, leading_sizes(w, 1), dtype), slope = empty(t, leading_sizes(w, 0), dtype),
         slope_env = empty(t, leading_sizes(w_env, 0), dtype);
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const EnvelopePlan<T> plan(t, loss.numel(), S, E);
    launch(plan.grid(device.stream()),
           plan.pick(interlevel_loss_fwd_kernel<kFew, T>, interlevel_loss_fwd_kernel<kWarp, T>,
                     interlevel_loss_fwd_kernel<kBlock, T>),
           plan.blocks, outside, static_cast<A>(eps), data<T>(t), data<T>(w), data<T>(t_env),
           data<T>(w_env), mutable_data<A>(loss), mutable_data<A>(slope),
           mutable_data<A>(slope_env));
  });
  return {loss, slope, slope_env};
}

std::tuple<Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& slope, const Tensor& slope_env,
                               const Tensor&, const Tensor& w, const Tensor&, const Tensor& w_env,
                               int64_t, double, int64_t needs) {
  const Device device(w);
  const int64_t R = d_loss.numel();
  Tensor d_w = empty_gradient(w, needs, 0), d_w_env = empty_gradient(w_env, needs, 1);
  dispatch(w, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const auto slopes = [&](const Tensor& slope, const Tensor& d_x) {
      return Slopes<T>{data<A>(slope), mutable_data<T>(d_x), R, static_cast<int>(slope.size(-1))};
    };
    const Slopes<T> of_w = slopes(slope, d_w), of_w_env = slopes(slope_env, d_w_env);
    launch({std::max(of_w.blocks(), of_w_env.blocks()), kBlock, 0, device.stream()},
           interlevel_loss_bwd_kernel<T>, data<A>(d_loss), of_w, of_w_env);
  });
  return {d_w, d_w_env};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("interlevel_loss", TORCH_BOX(&fwd));
  m.impl("interlevel_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
