// Zip-NeRF's interlevel loss: L = 1/E sum_k r_k u_k with r_k = max(0, w_blur_k - w_env_k) and
// u_k = r_k / (w_env_k + eps). The weight up to x, blurred by a box of half-width p, is
// (I(x + p) - I(x - p)) / 2p, I the integral of the weight up to a place: a parabola in each
// sample. A few threads own a ray, a block a long one; all arrays of a ray are on chip, or in
// global memory where they do not fit. One pass over memory each way, the blur in double. Backward:
// d_w_env_k = -u_k (2 + u_k) d_loss / E. Source: Zip-NeRF, section 4; docs/interlevel.md.
#include "envelope.h"

namespace rayfuse {
namespace {

// The blurred weights of a team's ray.
template <int kThreads, class T>
struct Blur {
  using A = accumulator<T>;

  const Envelope<kThreads, T>& ray;
  const A *const t, *const w, *const t_env;
  double *const before, *const integral, *const until;
  const double pulse_width;

  // The block meets before the weights are read.
  __device__ void prepare() const {
    const auto width = [&](int i) { return double{t[i + 1]} - t[i]; };
    ray.add_up(ray.S, before, [&](int i) { return double{w[i]}; });
    __syncthreads();
    ray.add_up(ray.S, integral, [&](int i) { return (before[i] + double{w[i]} / 2) * width(i); });
    __syncthreads();
    const Run run(ray.team, ray.E + 1);
    Place left, right;
    for (int k = run.begin; k < run.end; ++k) {
      const double x = t_env[k];
      until[k] = (integral_until(x + pulse_width, right) - integral_until(x - pulse_width, left)) /
                 (2 * pulse_width);
    }
    __syncthreads();
  }
  __device__ A weight(int k) const { return static_cast<A>(until[k + 1] - until[k]); }

 private:
  // The sample that a place on the ray is in, and how the integral bends there.
  struct Place {
    int sample = -1;
    double curve;
  };
  __device__ double integral_until(double x, Place& place) const {
    int i = place.sample;
    if (i < 0 || x < t[i]) {
      i = max(count_up_to(t, ray.S + 1, x) - 1, 0);
    } else {
      while (i < ray.S && !(t[i + 1] > x)) ++i;
    }
    if (i != place.sample) {
      const double width = i < ray.S ? double{t[i + 1]} - t[i] : 0;
      place = {i, width > 0 ? double{w[i]} / width / 2 : 0};
    }
    const double d = x < t[i] ? 0 : x - t[i];
    return integral[i] + d * (before[i] + place.curve * d);
  }
};

// What a bin lacks, and its ratio to the bin's weight; exactly 0 where it has enough.
template <class A>
struct Lacking {
  A r = 0, u = 0;

  __device__ Lacking(A w_blur, A w_env, A eps) {
    const A rest = w_blur - w_env;
    if (!(rest <= 0)) r = rest, u = rest / (w_env + eps);
  }
};

// Of a multiprocessor: for more of them kernels of long rays would spill.
template <int kThreads>
constexpr int kLeastBlocks = kThreads < kBlock ? 3 : 2;

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, kLeastBlocks<kThreads>)
    zip_interlevel_loss_fwd_kernel(RayBlocks blocks, double pulse_width, accumulator<T> eps,
                                   const T* __restrict__ t,              // [R, S+1]
                                   const T* __restrict__ w,              // [R, S]
                                   const T* __restrict__ t_env,          // [R, E+1]
                                   const T* __restrict__ w_env,          // [R, E]
                                   accumulator<T>* __restrict__ loss) {  // [R]
  const int S = blocks.S, E = blocks.E;
  const Team<kThreads> team;
  const EnvelopeArrays<T> arrays(blocks.arena<kThreads>(), blocks.blurs, blocks.rays, S, E);
  const Envelope<kThreads, T> envelope(team, arrays, S, E);
  for (int64_t r = blocks.first(); r < blocks.R; r += blocks.step()) {
    const int count = blocks.count(r), ray = min(team.index, count - 1);
    const auto* t_here = load_rows(t + r * (S + 1), arrays.t, count * (S + 1)) + ray * (S + 1);
    const auto* w_here = load_rows(w + r * S, arrays.w, count * S) + ray * S;
    const auto* t_env_here =
        load_rows(t_env + r * (E + 1), arrays.t_env, count * (E + 1)) + ray * (E + 1);
    const auto* w_env_here = load_rows(w_env + r * E, arrays.w_env, count * E) + ray * E;
    __syncthreads();
    const Blur<kThreads, T> blur = {envelope,       t_here,        w_here,
                                    t_env_here,     envelope.sums, envelope.more_sums,
                                    envelope.until, pulse_width};
    blur.prepare();
    DoubleSum own = {};
    for (int k = team.rank; k < E; k += kThreads) {
      const Lacking here(blur.weight(k), w_env_here[k], eps);
      own.value += here.r * here.u;
    }
    const double total = team.template scan<false>(own).total.value;
    if (team.rank == 0 && count > team.index) {
      loss[r + ray] = static_cast<accumulator<T>>(total / max(E, 1));
    }
    __syncthreads();
  }
}

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, kLeastBlocks<kThreads>)
    zip_interlevel_loss_bwd_kernel(RayBlocks blocks, double pulse_width, accumulator<T> eps,
                                   const accumulator<T>* __restrict__ d_loss,  // [R]
                                   const T* __restrict__ t,                    // [R, S+1]
                                   const T* __restrict__ w,                    // [R, S]
                                   const T* __restrict__ t_env,                // [R, E+1]
                                   const T* __restrict__ w_env,                // [R, E]
                                   T* __restrict__ d_w_env) {                  // [R, E]
  using A = accumulator<T>;
  const int S = blocks.S, E = blocks.E;
  const Team<kThreads> team;
  const EnvelopeArrays<T> arrays(blocks.arena<kThreads>(), blocks.blurs, blocks.rays, S, E);
  const Envelope<kThreads, T> envelope(team, arrays, S, E);
  for (int64_t r = blocks.first(); r < blocks.R; r += blocks.step()) {
    const int count = blocks.count(r), ray = min(team.index, count - 1);
    const auto* t_here = load_rows(t + r * (S + 1), arrays.t, count * (S + 1)) + ray * (S + 1);
    const auto* w_here = load_rows(w + r * S, arrays.w, count * S) + ray * S;
    const auto* t_env_here =
        load_rows(t_env + r * (E + 1), arrays.t_env, count * (E + 1)) + ray * (E + 1);
    const auto* w_env_here = load_rows(w_env + r * E, arrays.w_env, count * E) + ray * E;
    const A scale = -d_loss[r + ray] / max(E, 1);
    __syncthreads();
    const Blur<kThreads, T> blur = {envelope,       t_here,        w_here,
                                    t_env_here,     envelope.sums, envelope.more_sums,
                                    envelope.until, pulse_width};
    blur.prepare();
    // the edges of the envelope have done their duty
    auto* const d_w_env_here = on_chip(arrays.t_env, d_w_env + r * E);
    for (int k = team.rank; count > team.index && k < E; k += kThreads) {
      const A u = Lacking<A>(blur.weight(k), w_env_here[k], eps).u;
      d_w_env_here[ray * E + k] = scale * (u * (2 + u));
    }
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

Tensor fwd(const Tensor& t, const Tensor& w, const Tensor& t_env, const Tensor& w_env,
           double pulse_width, double eps) {
  const Device device(t);
  const int64_t S = w.size(-1), E = w_env.size(-1);
  Tensor loss = empty(t, leading_sizes(w, 1), accumulator_dtype(t));
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const EnvelopePlan<T> plan(t, loss.numel(), S, E, true);
    launch(
        plan.grid(device.stream()),
        plan.pick(zip_interlevel_loss_fwd_kernel<kFew, T>, zip_interlevel_loss_fwd_kernel<kWarp, T>,
                  zip_interlevel_loss_fwd_kernel<kBlock, T>),
        plan.blocks, pulse_width, static_cast<A>(eps), data<T>(t), data<T>(w), data<T>(t_env),
        data<T>(w_env), mutable_data<A>(loss));
  });
  return loss;
}

Tensor bwd(const Tensor& d_loss, const Tensor& t, const Tensor& w, const Tensor& t_env,
           const Tensor& w_env, double pulse_width, double eps, int64_t needs) {
  const Device device(t);
  const int64_t S = w.size(-1), E = w_env.size(-1);
  Tensor d_w_env = empty_gradient(w_env, needs, 0);
  if (d_w_env.numel() == 0) return d_w_env;
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const EnvelopePlan<T> plan(t, d_loss.numel(), S, E, true);
    launch(
        plan.grid(device.stream()),
        plan.pick(zip_interlevel_loss_bwd_kernel<kFew, T>, zip_interlevel_loss_bwd_kernel<kWarp, T>,
                  zip_interlevel_loss_bwd_kernel<kBlock, T>),
        plan.blocks, pulse_width, static_cast<A>(eps), data<A>(d_loss), data<T>(t), data<T>(w),
        data<T>(t_env), data<T>(w_env), mutable_data<T>(d_w_env));
  });
  return d_w_env;
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("zip_interlevel_loss", TORCH_BOX(&fwd));
  m.impl("zip_interlevel_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
