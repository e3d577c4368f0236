// How threads share rays that have samples of two kinds, included after the kernels of a file.
#pragma once

#include "registration.h"

#include <ranges>

namespace rayfuse {

// Calls f(first ray, last ray + 1) on torch's threads for about as many samples of both kinds
// each.
template <class F>
void for_each_piece(const PackedRays& rays, const PackedRays& others, const F& f) {
  // a ray costs as much as this many samples before it has any
  constexpr int64_t kRayWork = 64;
  const auto work_before = [&](int64_t r) {
    return rays.offsets[r] + others.offsets[r] + r * kRayWork;
  };
  // the first ray that begins at or after so much work
  const auto first_from = [&](int64_t work) {
    const auto all = std::views::iota(int64_t{0}, rays.R);
    return *std::ranges::partition_point(all, [&](int64_t r) { return work_before(r) < work; });
  };
  torch::stable::parallel_for(0, work_before(rays.R), 1 << 14, [&](int64_t begin, int64_t end) {
    f(first_from(begin), first_from(end));
  });
}

}  // namespace rayfuse
