// Interlevel loss of packed rays: L = 1/n sum_i r_i u_i over a ray's n samples, r_i = max(0, w_i -
// w_outer_i), u_i = r_i / (w_i + eps), w_outer_i the weight of the bins from the last that does not
// start beyond sample i to the first that ends beyond it. A warp owns a ray, a block one of many
// samples. Forward: each sample bisects the bins and adds up its own; each bin bisects the samples
// and adds up the -2 u_i / n of those that it bounds: dL/dw_env, kept beside dL/dw_i = u_i (2 -
// u_i) / n. All in order, so that these sums have few more terms than a ray has samples and bins.
// Backward: d_loss times what is kept. Source: Mip-NeRF 360, eq. 13; docs/interlevel.md.
#include "envelope.h"
#include "packed.h"
#include "uncovered.h"

namespace rayfuse {
namespace {

// A ray's samples, or the bins of its envelope.
template <class T>
struct Intervals {
  const T *starts, *ends, *w;
  int64_t n;
};

// Of all rays.
template <class T>
struct PackedIntervals {
  const T *starts, *ends, *w;  // [P]
  const int64_t* offsets;      // [R+1]
  int64_t P;

  // Whatever the offsets hold, it lies inside.
  __device__ PackedRay ray(int64_t r) const {
    const int64_t begin = min(max(offsets[r], int64_t{0}), P);
    return {r, begin, max(begin, min(offsets[r + 1], P))};
  }
  __device__ Intervals<T> of(const PackedRay& ray) const {
    return {starts + ray.begin, ends + ray.begin, w + ray.begin, ray.end - ray.begin};
  }
};

struct Range {
  int64_t begin, end;
};

// How many of n values that do not decrease are below x, or not above it. It is likely to be near
// `from`: a few steps from there, then by halves.
template <bool or_equal, class T>
__device__ int64_t count_below(const T* values, int64_t n, accumulator<T> x, int64_t from = 0) {
  constexpr int kSteps = 4;
  const auto is_below = [&](int64_t k) {
    const accumulator<T> value = widen(values[k]);
    return or_equal ? !(value > x) : value < x;
  };
  int64_t begin = 0, end = n;
  if (from > 0 && is_below(from - 1)) {
    begin = from;
    for (int step = 0; step < kSteps && begin < n; ++step, ++begin) {
      if (!is_below(begin)) return begin;
    }
  }
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (is_below(middle)) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// The bins that bound a sample.
template <class T>
__device__ Range bins_of(const Intervals<T>& bins, accumulator<T> start, accumulator<T> end,
                         int64_t outside) {
  const int64_t m = bins.n;
  if (m == 0) return {0, 0};
  const int64_t started = count_below<true>(bins.starts, m, start);
  Range range{max(started - 1, int64_t{0}),
              min(count_below<true>(bins.ends, m, end, started - 1) + 1, m)};
  if (outside != kOutsideClamp && widen(bins.starts[0]) > end) range.end = 0;
  if (outside == kOutsideZero && !(widen(bins.ends[m - 1]) > start)) range.begin = m;
  return range;
}

// The samples that bin k bounds.
template <class T>
__device__ Range samples_of(const Intervals<T>& bins, int64_t k, const Intervals<T>& samples,
                            int64_t outside) {
  const int64_t m = bins.n, n = samples.n;
  Range range{0, n};
  if (k > 0 || outside != kOutsideClamp) {
    const T before = k > 0 ? bins.ends[k - 1] : bins.starts[0];
    range.begin = count_below<false>(samples.ends, n, widen(before));
  }
  if (k < m - 1 || outside == kOutsideZero) {
    const T behind = k < m - 1 ? bins.starts[k + 1] : bins.ends[k];
    range.end = count_below<false>(samples.starts, n, widen(behind), range.begin);
  }
  return range;
}

// The sum of a range of values for each lane; the warp adds up long ones together.
template <class T>
__device__ double sum_of(const T* values, Range range) {
  constexpr int64_t kLong = 2 * kWarp;
  const int lane = threadIdx.x % kWarp;
  const bool is_long = range.end - range.begin > kLong;
  double sum = 0;
  for (int64_t k = range.begin; !is_long && k < range.end; ++k) sum += widen(values[k]);
  for (unsigned longs = __ballot_sync(kAllLanes, is_long); longs; longs &= longs - 1) {
    const int owner = __ffs(longs) - 1;
    const int64_t begin = __shfl_sync(kAllLanes, range.begin, owner);
    const int64_t end = __shfl_sync(kAllLanes, range.end, owner);
    double own = 0;
    for (int64_t k = begin + lane; k < end; k += kWarp) own += widen(values[k]);
    const double total = Team<kWarp>().sum(own);
    if (lane == owner) sum = total;
  }
  return sum;
}

// What is not covered of each thread's sample, from `first` on; nothing of one that does not exist.
template <class T, int kThreads>
__device__ Uncovered<accumulator<T>> uncovered(const Team<kThreads>& team,
                                               const Intervals<T>& samples,
                                               const Intervals<T>& bins, int64_t first,
                                               int64_t outside, accumulator<T> eps) {
  using A = accumulator<T>;
  const int64_t i = first + team.rank;
  Range range{0, 0};
  A w = 0;
  if (i < samples.n) {
    w = widen(samples.w[i]);
    range = bins_of(bins, widen(samples.starts[i]), widen(samples.ends[i]), outside);
  }
  const A w_outer = static_cast<A>(sum_of(bins.w, range));
  return Uncovered<A>(w, w_outer, eps);
}

template <class T>
__global__ void __launch_bounds__(kBlock, kResidentBlocks<T>)
    packed_interlevel_loss_fwd_kernel(int64_t R, int64_t outside, accumulator<T> eps,
                                      PackedIntervals<T> samples, PackedIntervals<T> bins,
                                      accumulator<T>* __restrict__ loss,  // [R]
                                      accumulator<T>* slope,              // [P]
                                      accumulator<T>* slope_env) {        // [Q]
  using A = accumulator<T>;
  for_each_stray_sample(samples.offsets, R, samples.P, [&](int64_t k) { slope[k] = 0; });
  for_each_stray_sample(bins.offsets, R, bins.P, [&](int64_t k) { slope_env[k] = 0; });
  for_each_packed_ray(samples.offsets, R, samples.P,
                      [&]<int kThreads>(const Team<kThreads>& team, const PackedRay& ray) {
                        const PackedRay env_ray = bins.ray(ray.index);
                        const Intervals<T> own = samples.of(ray), envelope = bins.of(env_ray);
                        const A mean = A(1) / max(own.n, int64_t{1});
                        // u until all bins have read it
                        A* const slope_here = slope + ray.begin;
                        double sum = 0;
                        for (int64_t first = 0; first < own.n; first += kThreads) {
                          const auto here = uncovered(team, own, envelope, first, outside, eps);
                          sum += here.r * here.u;
                          if (first + team.rank < own.n) slope_here[first + team.rank] = here.u;
                        }
                        sum = team.sum(sum);
                        if (team.rank == 0)
                          loss[ray.index] = static_cast<A>(sum / max(own.n, int64_t{1}));
                        sync(team);
                        for (int64_t first = 0; first < envelope.n; first += kThreads) {
                          const int64_t k = first + team.rank;
                          Range range{0, 0};
                          if (k < envelope.n) range = samples_of(envelope, k, own, outside);
                          const double u_sum = sum_of(slope_here, range);
                          if (k < envelope.n)
                            slope_env[env_ray.begin + k] = -2 * mean * static_cast<A>(u_sum);
                        }
                        sync(team);
                        for (int64_t i = team.rank; i < own.n; i += kThreads) {
                          const A u = slope_here[i];
                          slope_here[i] = mean * (u * (2 - u));
                        }
                      });
}

// d_x = d_loss slope.
template <class T>
__device__ void scale(const PackedIntervals<T>& x, int64_t R, const accumulator<T>* d_loss,
                      const accumulator<T>* slope, T* d_x) {
  if (!d_x) return;
  for_each_stray_sample(x.offsets, R, x.P, [&](int64_t k) { d_x[k] = narrow<T>(0); });
  for_each_packed_ray(x.offsets, R, x.P,
                      [&]<int kThreads>(const Team<kThreads>& team, const PackedRay& ray) {
                        for (int64_t k = ray.begin + team.rank; k < ray.end; k += kThreads) {
                          d_x[k] = narrow<T>(d_loss[ray.index] * slope[k]);
                        }
                      });
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    packed_interlevel_loss_bwd_kernel(int64_t R,
                                      const accumulator<T>* __restrict__ d_loss,  // [R]
                                      PackedIntervals<T> samples, PackedIntervals<T> bins,
                                      const accumulator<T>* __restrict__ slope,      // [P]
                                      const accumulator<T>* __restrict__ slope_env,  // [Q]
                                      T* __restrict__ d_w,                           // [P] or null
                                      T* __restrict__ d_w_env) {                     // [Q] or null
  scale(samples, R, d_loss, slope, d_w);
  scale(bins, R, d_loss, slope_env, d_w_env);
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

template <class T>
PackedIntervals<T> intervals(const Tensor& starts, const Tensor& ends, const Tensor& w,
                             const Tensor& offsets) {
  return {data<T>(starts), data<T>(ends), data<T>(w), data<int64_t>(offsets), w.numel()};
}

// One block at least, for samples and bins of no ray.
int64_t all_blocks(int64_t R) { return std::max<int64_t>(packed_blocks(R), 1); }

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& t_starts, const Tensor& t_ends,
                                       const Tensor& w, const Tensor& offsets,
                                       const Tensor& t_env_starts, const Tensor& t_env_ends,
                                       const Tensor& w_env, const Tensor& offsets_env,
                                       int64_t outside, double eps) {
  const Device device(w);
  const int64_t R = offsets.numel() - 1;
  const auto dtype = accumulator_dtype(w);
  Tensor loss = empty(w, {R}, dtype), slope = empty(w, {w.numel()}, dtype),
         slope_env = empty(w, {w_env.numel()}, dtype);
  dispatch(w, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    launch({all_blocks(R), kBlock, 0, device.stream()}, packed_interlevel_loss_fwd_kernel<T>, R,
           outside, static_cast<A>(eps), intervals<T>(t_starts, t_ends, w, offsets),
           intervals<T>(t_env_starts, t_env_ends, w_env, offsets_env), mutable_data<A>(loss),
           mutable_data<A>(slope), mutable_data<A>(slope_env));
  });
  return {loss, slope, slope_env};
}

std::tuple<Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& slope, const Tensor& slope_env,
                               const Tensor& t_starts, const Tensor& t_ends, const Tensor& w,
                               const Tensor& offsets, const Tensor& t_env_starts,
                               const Tensor& t_env_ends, const Tensor& w_env,
                               const Tensor& offsets_env, int64_t, double, int64_t needs) {
  const Device device(w);
  const int64_t R = offsets.numel() - 1;
  Tensor d_w = empty_gradient(w, needs, 0), d_w_env = empty_gradient(w_env, needs, 1);
  if (d_w.numel() + d_w_env.numel() == 0) return {d_w, d_w_env};
  dispatch(w, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    launch({all_blocks(R), kBlock, 0, device.stream()}, packed_interlevel_loss_bwd_kernel<T>, R,
           data<A>(d_loss), intervals<T>(t_starts, t_ends, w, offsets),
           intervals<T>(t_env_starts, t_env_ends, w_env, offsets_env), data<A>(slope),
           data<A>(slope_env), mutable_data<T>(d_w), mutable_data<T>(d_w_env));
  });
  return {d_w, d_w_env};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_interlevel_loss", TORCH_BOX(&fwd));
  m.impl("packed_interlevel_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
