// The bins of an envelope in which the edges of a ray lie, the weight between them, and the way
// back: what outer_bound and interlevel_loss share. Bins are counted from 1: bin 0 and bin E + 1
// are what lies outside, and weigh nothing. Derivation: docs/interlevel.md.
#pragma once

#include "launch.h"
#include "rays.h"

namespace rayfuse {

// The choices of `outside`, in their order.
enum : int64_t { kOutsideClamp, kOutsideZero, kOutsideBelowZero };

// What kernels may ask for: the static arrays of a scan need some.
constexpr size_t kArenaBytes = kSharedBytes - 1024;

// Memory that is cut into arrays: shared, or global where a ray is too long for that.
struct Arena {
  unsigned char* base;
  size_t used = 0;

  template <class X>
  __host__ __device__ X* take(int64_t n) {
    X* const array = reinterpret_cast<X*>(base + used);
    used += (n * sizeof(X) + 15) / 16 * 16;
    return array;
  }
};

// A sum over a team as a state of its scan.
struct DoubleSum {
  double value;

  __device__ DoubleSum join(const DoubleSum& next) const { return {value + next.value}; }
  __device__ DoubleSum shuffle(int lane) const { return {__shfl_sync(kAllLanes, value, lane)}; }
  __device__ DoubleSum shuffle_up(int places) const {
    return {__shfl_up_sync(kAllLanes, value, places)};
  }
  __device__ DoubleSum shuffle_down(int places) const {
    return {__shfl_down_sync(kAllLanes, value, places)};
  }
};

// How a kernel goes over R rays: so many in a block at a time, a team for each.
struct RayBlocks {
  int64_t R;
  int S, E, rays;
  bool blurs;
  // bytes for every block; null where all arrays are in shared memory
  unsigned char* global;
  size_t bytes;

  template <int kThreads>
  __device__ Arena arena() const {
    if (kThreads < kBlock || !global) return {shared_memory};
    return {global + blockIdx.x * bytes};
  }
  __device__ int64_t first() const { return int64_t{blockIdx.x} * rays; }
  __device__ int64_t step() const { return int64_t{gridDim.x} * rays; }
  __device__ int count(int64_t r) const { return static_cast<int>(min(R - r, int64_t{rays})); }
};

// The arrays of a block's rays, which lie end to end as in memory.
template <class T>
struct EnvelopeArrays {
  using A = accumulator<T>;

  A *t, *w, *t_env, *w_env;  // buffers of chip_size
  double *until, *sums;      // [rays, E+3], [rays, S+1]
  double* more_sums;         // [rays, S+1], of a blur
  int* bins;                 // [rays, S+1], of none
  size_t bytes;

  __host__ __device__ EnvelopeArrays(Arena arena, bool blurs, int rays, int64_t S, int64_t E)
      : t(arena.take<A>(chip_size<T>(rays * (S + 1)))),
        w(arena.take<A>(chip_size<T>(rays * (S + 1)))),
        t_env(arena.take<A>(chip_size<T>(rays * (E + 1)))),
        w_env(arena.take<A>(chip_size<T>(rays * (E + 1)))),
        until(arena.take<double>(rays * (E + 3))),
        sums(arena.take<double>(rays * (S + 1))),
        more_sums(arena.take<double>(blurs ? rays * (S + 1) : 0)),
        bins(arena.take<int>(blurs ? 0 : rays * (S + 1))),
        bytes(arena.used) {}
};

// How many of n values that do not decrease are not above x, as torch.searchsorted finds it.
template <class X, class Y>
__device__ int count_up_to(const X* values, int n, Y x) {
  int begin = 0, end = n;
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (values[middle] > x) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

// The block copies n values of its rays; returns where they are.
template <class T>
__device__ accumulator<T>* load_rows(const T* from, accumulator<T>* buffer, int64_t n) {
  accumulator<T>* const here = on_chip(buffer, from);
  load(from, here, static_cast<int>(n));
  return here;
}

// Those of n values that a thread takes: a run, of an odd number, so that its banks differ from its
// neighbours'.
struct Run {
  int begin, end;

  template <int kThreads>
  __device__ Run(const Team<kThreads>& team, int n) {
    const int each = (n + kThreads - 1) / kThreads | 1;
    begin = min(team.rank * each, n), end = min(begin + each, n);
  }
};

// The ray of a team.
template <int kThreads, class T>
struct Envelope {
  using A = accumulator<T>;

  const Team<kThreads>& team;
  const int S, E;
  double *const until, *const sums, *const more_sums;
  int* const bins;

  __device__ Envelope(const Team<kThreads>& team, const EnvelopeArrays<T>& arrays, int S, int E)
      : team(team),
        S(S),
        E(E),
        until(arrays.until + team.index * (E + 3)),
        sums(arrays.sums + team.index * (S + 1)),
        more_sums(arrays.more_sums + team.index * (S + 1)),
        bins(arrays.bins + team.index * (S + 1)) {}

  // Running sums of n values: to[i] is the one before value i.
  template <class F>
  __device__ void add_up(int n, double* to, const F& value) const {
    const Run run(team, n);
    DoubleSum own = {};
    for (int i = run.begin; i < run.end; ++i) own.value += value(i);
    const auto scan = team.template scan<false>(own);
    double sum = scan.before.value;
    for (int i = run.begin; i < run.end; ++i) {
      to[i] = sum;
      sum += value(i);
    }
    if (team.rank == 0) to[n] = scan.total.value;
  }

  // The block meets before the results are read.
  __device__ void locate(const A* t, const A* t_env, const A* w_env, int64_t outside) const {
    add_up(E, until + 1, [&](int k) { return w_env[k]; });
    if (team.rank == 0) until[0] = 0, until[E + 2] = until[E + 1];
    find_bins(t, t_env, outside);
  }
  __device__ void find_bins(const A* t, const A* t_env, int64_t outside) const {
    const int first = outside == kOutsideClamp, last = outside == kOutsideZero ? E + 1 : E;
    const Run run(team, S + 1);
    int bin = 0;
    for (int i = run.begin; i < run.end; ++i) {
      if (i > run.begin && t[i] >= t[i - 1]) {
        while (bin <= E && !(t_env[bin] > t[i])) ++bin;
      } else {
        bin = count_up_to(t_env, E + 1, t[i]);
      }
      bins[i] = max(min(bin, last), first);
    }
    __syncthreads();
  }

  __device__ A w_outer(int i) const {
    return static_cast<A>(until[bins[i + 1] + 1] - until[bins[i]]);
  }

  // From the gradient of w_outer, d_outer(i), to that of w_env: each bin gets those of the samples
  // from the one before its first edge to the one behind its last. The block meets on the way.
  template <class F>
  __device__ void gradient(const F& d_outer, A* d_w_env) const {
    add_up(S, sums, d_outer);
    bool falls = false;
    for (int i = team.rank; i < S; i += kThreads) falls |= bins[i] > bins[i + 1];
    falls = kThreads < kBlock ? __any_sync(kAllLanes, falls) : __syncthreads_or(falls);
    __syncthreads();
    if (!d_w_env) return;
    const Run run(team, E);
    // edges in bins up to k
    int before = count_up_to(bins, S + 1, run.begin);
    for (int k = run.begin; k < run.end; ++k) {
      int until_here = before;
      while (until_here <= S && bins[until_here] <= k + 1) ++until_here;
      double d = sums[min(until_here, S)] - sums[max(before - 1, 0)];
      before = until_here;
      if (falls) {
        // edges that are not in order: every sample, for every bin
        d = 0;
        for (int i = 0; i < S; ++i) {
          d += ((k + 1 >= bins[i]) - (k + 1 > bins[i + 1])) * (sums[i + 1] - sums[i]);
        }
      }
      d_w_env[k] = static_cast<A>(d);
    }
  }
};

}  // namespace rayfuse
