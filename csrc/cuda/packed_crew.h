// Packed rays of which a warp takes several at a time if they are short.
#pragma once

#include "crew.h"
#include "packed.h"

#include <algorithm>

namespace rayfuse {

// Threads of a block whose warps take several short rays at a time, and the rays of such a block.
constexpr int kCrewBlock = 4 * kWarp;
constexpr int kCrewRays = kCrewBlock / kFew;

// The ray of a team, and the piece of memory that it shares with the other rays of a warp, or has
// alone.
struct PackedCrew {
  PackedRay ray;
  int64_t begin, end;
  int longest;  // of the rays, if there are several

  static int64_t blocks(int64_t R) { return std::max<int64_t>((R + kCrewRays - 1) / kCrewRays, 1); }
};

// Calls visit(team, crew) for all rays of a block of kCrewBlock threads: kFew threads for each of a
// warp's rays if these have at most so many samples together, else the warp for one after the
// other, and the block for the long ones.
template <class Visit>
__device__ void for_each_packed_crew(const int64_t* offsets, int64_t R, int64_t P, int most,
                                     const Visit& visit) {
  constexpr int kTeams = kWarp / kFew;
  const int lane = threadIdx.x % kWarp, left = threadIdx.x / kWarp * kTeams;
  const int64_t first = int64_t{blockIdx.x} * kCrewRays;
  // the same in every warp: lane i knows ray i
  const auto edge = [&](int64_t r) { return min(max(offsets[min(r, R)], int64_t{0}), P); };
  const int64_t begin = edge(first + lane), end = max(begin, edge(first + lane + 1));
  const auto ray = [&](int i) {
    return PackedRay{first + i, __shfl_sync(kAllLanes, begin, i), __shfl_sync(kAllLanes, end, i)};
  };
  const auto alone = [&](const PackedRay& own) { return PackedCrew{own, own.begin, own.end, 0}; };

  const PackedRay own = ray(left + lane / kFew);
  const int64_t from = __shfl_sync(kAllLanes, begin, left);
  const int64_t to = __shfl_sync(kAllLanes, end, left + kTeams - 1);
  // wrong offsets may put the next ray anywhere
  const bool follows = begin == __shfl_up_sync(kAllLanes, end, 1) || lane % kTeams == 0;
  const unsigned apart = __ballot_sync(kAllLanes, !follows) >> left & ((1 << kTeams) - 1);
  const bool are_few = to - from <= most && !apart;
  if (are_few && first + left < R) {
    int longest = static_cast<int>(own.end - own.begin);
#pragma unroll
    for (int places = kFew; places < kWarp; places *= 2) {
      longest = max(longest, __shfl_xor_sync(kAllLanes, longest, places));
    }
    visit(Team<kFew>(), PackedCrew{own, from, to, longest});
  }
  for (int i = left; !are_few && i < left + kTeams; ++i) {
    const PackedRay next = ray(i);
    if (next.index < R && next.end - next.begin <= kShortRay) visit(Team<kWarp>(), alone(next));
  }
  unsigned longs = __ballot_sync(kAllLanes, lane < kCrewRays && end - begin > kShortRay);
  for (; longs; longs &= longs - 1) visit(Team<kCrewBlock>(), alone(ray(__ffs(longs) - 1)));
}

// A warp's rays are on chip together if they have no more samples for each thread: most are.
constexpr int kMostItems = 9;

// The rays of a crew, and the one of a team among them.
template <int threads>
struct PackedRays {
  static constexpr int kThreads = threads;
  static constexpr bool kOneTile = threads < kWarp;
  // of all that a warp has on chip
  static constexpr int kRooms = kOneTile ? 1 : threads / kWarp;

  const int64_t index, samples;
  const bool exists;
  // in memory the crew's first sample, and where the team's first is among the crew's
  const int64_t begin, lead;
  const int own, others, longest;
  const Crew<threads> crew = {};

  // Tiles of a ray start at whole sectors.
  __device__ PackedRays(int64_t R, const PackedCrew& rays)
      : index(rays.ray.index),
        samples(rays.ray.end - rays.ray.begin),
        exists(index < R),
        begin(rays.begin),
        lead(kOneTile ? 0 : begin - first_tile(begin)),
        own(kOneTile ? static_cast<int>(rays.ray.begin - begin) : 0),
        others(kOneTile ? static_cast<int>(rays.end - begin - samples) : 0),
        longest(rays.longest) {}
};

}  // namespace rayfuse
