// The step from tensors to kernels on the CPU, included after the kernels of a file.
#pragma once

#include "rays.h"
#include "../common.h"

// Every instruction set has a namespace of its own, so that all can be loaded at once.
#define RAYFUSE_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(RAYFUSE_NAMESPACE, CPU, m)

namespace rayfuse {

// Calls f with a flag that templates can take.
template <class F>
void as_constant(bool flag, const F& f) {
  if (flag) {
    f(std::true_type());
  } else {
    f(std::false_type());
  }
}

// Calls f(first ray, last ray + 1) on torch's threads, the first one a multiple of kRays. A thread
// starts for at least 2^14 samples: below that waking it costs more than it saves.
template <class A, class F>
void for_rays(int64_t rays, int64_t samples_per_ray, const F& f) {
  constexpr int64_t K = kRays<A>;
  const int64_t grain = (1 << 14) / K / std::max<int64_t>(samples_per_ray, 1);
  torch::stable::parallel_for(
      0, (rays + K - 1) / K, std::max<int64_t>(grain, 1),
      [&](int64_t begin, int64_t end) { f(begin * K, std::min(end * K, rays)); });
}

}  // namespace rayfuse
