// The square root of a vector, rounded once.
#pragma once

#include <cmath>

#include "simd.h"

namespace rayfuse {

template <class A>
vec<A> root_of(vec<A> x) {
  constexpr bool wide = sizeof(A) == 8;
#if defined(__AVX512F__)
  if constexpr (wide) return (vec<A>)_mm512_sqrt_pd((__m512d)x);
  if constexpr (!wide) return (vec<A>)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  if constexpr (wide) return (vec<A>)_mm256_sqrt_pd((__m256d)x);
  if constexpr (!wide) return (vec<A>)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  if constexpr (wide) return (vec<A>)_mm_sqrt_pd((__m128d)x);
  if constexpr (!wide) return (vec<A>)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kLanes<A>; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

}  // namespace rayfuse
