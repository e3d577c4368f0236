// Samples at even steps of the cdf of a packed ray, or the edges of intervals around them
// (csrc/math/packed_importance_samples.h). A warp owns a ray's results, a block those of one that
// has many; each thread bisects the cdf for its own sample, or for the two beside its edge. Source:
// nerfacc's `importance_sampling`, docs/interlevel.md.
#include "ray_search.h"

#include <cmath>

namespace rayfuse {

// a b, rounded before anything is added to it.
#if defined(__CUDA_ARCH__)
__device__ inline float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double multiply(double a, double b) { return __dmul_rn(a, b); }
#else
template <class A>
A multiply(A a, A b) {
  return a * b;
}
#endif

}  // namespace rayfuse

#include "../math/packed_importance_samples.h"

namespace rayfuse {
namespace {

// The n samples of a ray.
template <class T>
struct Samples {
  using A = accumulator<T>;

  const T *edges, *cdf;
  int64_t bins, n;
  EvenSteps<A> steps;

  __device__ Samples(const T* edges, const T* cdf, int64_t bins, A bias, int64_t n)
      : edges(edges), cdf(cdf), bins(bins), n(n), steps(widen(cdf[0]), widen(cdf[bins]), bias, n) {}

  __device__ Corner<A> corner(int64_t k) const { return {widen(edges[k]), widen(cdf[k])}; }
  __device__ A sample(int64_t i) const {
    const A u = steps.at(static_cast<A>(i));
    const int64_t p = count_up_to(cdf, bins, u);
    return position(u, corner(max(p - 1, int64_t{0})), corner(p));
  }
  // Of the intervals around them.
  __device__ A edge(int64_t j) const {
    if (j > 0 && j < n) return middle(sample(j - 1), sample(j));
    const A limit = widen(edges[j == 0 ? 0 : bins]);
    if (n == 1) return limit;
    return j == 0 ? outer_end<true>(sample(0), sample(1), limit)
                  : outer_end<false>(sample(n - 1), sample(n - 2), limit);
  }
};

template <class T>
__global__ void __launch_bounds__(kBlock, 1)
    packed_importance_samples_fwd_kernel(int64_t R, int64_t Q, int64_t P, bool intervals,
                                         const T* __restrict__ edges,               // [Q]
                                         const T* __restrict__ cdf,                 // [Q]
                                         const int64_t* __restrict__ edge_offsets,  // [R+1]
                                         const accumulator<T>* __restrict__ bias,   // [R]
                                         const int64_t* __restrict__ offsets,       // [R+1]
                                         accumulator<T>* __restrict__ out) {        // [P]
  using A = accumulator<T>;
  for_each_packed_ray(offsets, R, P,
                      [&]<int kThreads>(const Team<kThreads>& team, const PackedRay& ray) {
                        const PackedRay own = packed_ray(edge_offsets, ray.index, Q);
                        const int64_t n = ray.end - ray.begin - intervals;
                        if (own.begin == own.end || n < 1) {
                          for (int64_t k = ray.begin + team.rank; k < ray.end; k += kThreads)
                            out[k] = static_cast<A>(NAN);
                          return;
                        }
                        const Samples<T> samples(edges + own.begin, cdf + own.begin,
                                                 own.end - own.begin - 1, bias[ray.index], n);
                        for (int64_t k = ray.begin + team.rank; k < ray.end; k += kThreads) {
                          const int64_t i = k - ray.begin;
                          out[k] = intervals ? samples.edge(i) : samples.sample(i);
                        }
                      });
}

}  // namespace
}  // namespace rayfuse

#include "launch.h"
#include "registration.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& edges, const Tensor& cdf, const Tensor& edge_offsets, const Tensor& bias,
           const Tensor& offsets, int64_t total, bool intervals) {
  const Device device(edges);
  const int64_t R = offsets.numel() - 1;
  Tensor out = empty(edges, {total}, accumulator_dtype(edges));
  if (total == 0) return out;
  dispatch(edges, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    launch({packed_blocks(R), kBlock, 0, device.stream()}, packed_importance_samples_fwd_kernel<T>,
           R, edges.numel(), total, intervals, data<T>(edges), data<T>(cdf),
           data<int64_t>(edge_offsets), data<A>(bias), data<int64_t>(offsets),
           mutable_data<A>(out));
  });
  return out;
}

}  // namespace

RAYFUSE_REGISTER(m) { m.impl("packed_importance_samples", TORCH_BOX(&fwd)); }

}  // namespace rayfuse
