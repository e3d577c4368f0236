// A search among the values of one packed ray, by one thread.
#pragma once

#include "packed.h"

namespace rayfuse {

// Ray r of P samples; it lies inside of them whatever the offsets hold.
__device__ inline PackedRay packed_ray(const int64_t* offsets, int64_t r, int64_t P) {
  const int64_t begin = min(max(offsets[r], int64_t{0}), P);
  return {r, begin, max(begin, min(offsets[r + 1], P))};
}

// How many of n values that do not decrease are not above x, as torch.searchsorted finds it.
template <class T>
__device__ int64_t count_up_to(const T* values, int64_t n, accumulator<T> x) {
  int64_t begin = 0, end = n;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (widen(values[middle]) > x) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

}  // namespace rayfuse
