// Packed rays: samples lie end to end, ray r has offsets[r] .. offsets[r+1] of them. A block takes
// as many rays as it has warps, and all its threads together those that are long: one launch for
// rays of very uneven lengths.
#pragma once

#include "rays.h"

namespace rayfuse {

constexpr int kPackedRays = kBlock / kWarp;
// Longer rays get all threads of their block.
constexpr int64_t kShortRay = 1024;

struct PackedRay {
  int64_t index, begin, end;

  __device__ bool has(int64_t k) const { return begin <= k && k < end; }
};

inline int64_t packed_blocks(int64_t R) { return (R + kPackedRays - 1) / kPackedRays; }

// Calls visit(team, ray) for all rays of the block, empty ones too. Whatever the offsets hold, rays
// lie inside of the P samples.
template <class Visit>
__device__ void for_each_packed_ray(const int64_t* offsets, int64_t R, int64_t P,
                                    const Visit& visit, int rays = kPackedRays,
                                    int64_t short_ray = kShortRay) {
  const Team<kWarp> warp;
  const int64_t first = int64_t{blockIdx.x} * rays;
  int64_t begin = 0;
  if (warp.lane <= rays) begin = offsets[min(first + warp.lane, R)];
  begin = min(max(begin, int64_t{0}), P);
  const int64_t end = max(begin, int64_t{__shfl_down_sync(kAllLanes, begin, 1)});
  // the same in every warp: lane i knows ray i
  const auto ray = [&](int i) {
    return PackedRay{first + i, __shfl_sync(kAllLanes, begin, i), __shfl_sync(kAllLanes, end, i)};
  };
  const PackedRay own = ray(warp.index);
  if (warp.index < rays && own.index < R && own.end - own.begin <= short_ray) visit(warp, own);
  unsigned longs = __ballot_sync(kAllLanes, warp.lane < rays && end - begin > short_ray);
  for (; longs; longs &= longs - 1) visit(Team<kBlock>(), ray(__ffs(longs) - 1));
}

// Calls f(k) for the samples of no ray, of which there are none unless the offsets are wrong: what
// rays rise through from offsets[0] to offsets[R] they own. One block looks for them, so that no
// other waits for these offsets.
template <class F>
__device__ void for_each_stray_sample(const int64_t* offsets, int64_t R, int64_t P, const F& f) {
  if (blockIdx.x > 0) return;
  const int64_t first = min(offsets[0], P), last = max(offsets[R], int64_t{0});
  for (int64_t k = threadIdx.x; k < first; k += blockDim.x) f(k);
  for (int64_t k = last + threadIdx.x; k < P; k += blockDim.x) f(k);
}

// Where the tiles of a ray that begins at k start: whole sectors of every type before.
__device__ inline int64_t first_tile(int64_t k) { return k / kSector<half> * kSector<half>; }

template <int kThreads>
__device__ void sync(const Team<kThreads>&) {
  if constexpr (kThreads == kWarp) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// A sum over a team as the simplest state of a scan.
template <class A>
struct Sum {
  A value;

  __device__ Sum join(const Sum& next) const { return {value + next.value}; }
  __device__ Sum shuffle(int lane) const { return {__shfl_sync(kAllLanes, value, lane)}; }
  __device__ Sum shuffle_up(int places) const { return {__shfl_up_sync(kAllLanes, value, places)}; }
  __device__ Sum shuffle_down(int places) const {
    return {__shfl_down_sync(kAllLanes, value, places)};
  }
};

// A running sum along a ray, one sample of each thread of a team at a time. What a step rounds off
// is added with the next one, so that a million samples lose no more than a few.
template <class A, bool from_right>
struct Running {
  A sum = 0, lost = 0;

  // The sum before this thread's x, as the scan goes.
  template <int kThreads>
  __device__ A add(const Team<kThreads>& team, A x) {
    const auto [before, total] = team.template scan<from_right>(Sum<A>{x});
    const A here = sum + before.value;
    const A term = total.value - lost, next = sum + term;
    lost = (next - sum) - term;
    sum = next;
    return here;
  }
};

}  // namespace rayfuse
