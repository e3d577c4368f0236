// The square root of a vector, rounded once.
#pragma once

#include <cmath>

#include "simd.h"

namespace rayfuse {

template <class V>
V square_root(V x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, vec<float>>) return (V)_mm512_sqrt_ps((__m512)x);
  if constexpr (std::is_same_v<V, vec<double>>) return (V)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<V, vec<float>>) return (V)_mm256_sqrt_ps((__m256)x);
  if constexpr (std::is_same_v<V, vec<double>>) return (V)_mm256_sqrt_pd((__m256d)x);
#elif defined(__SSE2__)
  if constexpr (std::is_same_v<V, vec<float>>) return (V)_mm_sqrt_ps((__m128)x);
  if constexpr (std::is_same_v<V, vec<double>>) return (V)_mm_sqrt_pd((__m128d)x);
#else
  V root;
  for (int i = 0; i < kLanesOf<V>; ++i) root[i] = std::sqrt(x[i]);
  return root;
#endif
}

}  // namespace rayfuse
