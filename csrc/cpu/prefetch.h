// Memory is asked ahead for n values at p, where the processor's own prefetcher does not foresee
// them.
#pragma once

#include <cstdint>

namespace rayfuse {

// They will be read, or written, soon, from the first or the second level of the caches.
template <bool write = false, int level = 1, class T>
void prefetch(const T* p, int64_t n) {
  for (int64_t k = 0; k < n; k += 64 / sizeof(T)) __builtin_prefetch(p + k, write, 4 - level);
}

}  // namespace rayfuse
