// One vector register of whatever the instruction set offers, and what all kernels do with it.
// Built on the vector extension of GCC and Clang: arithmetic is written with operators, and only
// what the extension cannot say (masks, half precision) falls back on intrinsics.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../accumulator.h"

// Before a kernel: inline all that it calls, so that vectors stay in registers.
#define RAYFUSE_KERNEL __attribute__((flatten))

namespace rayfuse {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

template <class A>
struct vector_of {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using vec = typename vector_of<A>::type;
template <class A>
constexpr int kLanes = kVectorBytes / sizeof(A);

template <class V>
constexpr int kLanesOf = sizeof(V) / sizeof(std::declval<V>()[0]);

// ---- one value

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(half x) {
  _Float16 value;
  std::memcpy(&value, &x, sizeof value);
  return value;
}
inline float widen(bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T narrow(accumulator<T> x) {
  return x;
}
template <>
inline half narrow<half>(float x) {
  const _Float16 value = static_cast<_Float16>(x);
  half out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}
template <>
inline bfloat16 narrow<bfloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// ---- arithmetic

// a b + c, rounded once where the instruction set can: the same in every context, while the
// compiler fuses the operators where it likes.
template <class V>
V multiply_add(V a, V b, V c) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, vec<float>>) {
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  } else {
    return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  }
#elif defined(__FMA__)
  if constexpr (std::is_same_v<V, vec<float>>) {
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  } else {
    return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }
#else
  return a * b + c;
#endif
}

// a < b ? a : b and a > b ? a : b, in one instruction each: b where either is NaN.
template <class V>
V smaller(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, vec<float>>) return (V)_mm512_min_ps((__m512)a, (__m512)b);
  if constexpr (std::is_same_v<V, vec<double>>) return (V)_mm512_min_pd((__m512d)a, (__m512d)b);
#endif
  return a < b ? a : b;
}
template <class V>
V larger(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, vec<float>>) return (V)_mm512_max_ps((__m512)a, (__m512)b);
  if constexpr (std::is_same_v<V, vec<double>>) return (V)_mm512_max_pd((__m512d)a, (__m512d)b);
#endif
  return a > b ? a : b;
}

// ---- between memory and a register; with n, only the first n lanes, the others are 0

template <class T>
vec<accumulator<T>> load(const T* p) {
  vec<accumulator<T>> x;
  if constexpr (sizeof(T) == sizeof(accumulator<T>)) {
    std::memcpy(&x, p, sizeof x);
    return x;
  }
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if constexpr (std::is_same_v<T, half>) return (vec<float>)_mm512_cvtph_ps(bits);
  if constexpr (std::is_same_v<T, bfloat16>) {
    return (vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
  }
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if constexpr (std::is_same_v<T, half>) return (vec<float>)_mm256_cvtph_ps(bits);
  if constexpr (std::is_same_v<T, bfloat16>) {
    return (vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
  }
#endif
  for (int i = 0; i < kLanes<accumulator<T>>; ++i) x[i] = widen(p[i]);
  return x;
}

template <class T>
void store(T* p, vec<accumulator<T>> x) {
  if constexpr (sizeof(T) == sizeof(accumulator<T>)) {
    std::memcpy(p, &x, sizeof x);
    return;
  }
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, half>) {
#if defined(__AVX512F__)
    const auto bits = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
    const auto bits = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#endif
    std::memcpy(p, &bits, sizeof bits);
    return;
  }
#endif
  if constexpr (std::is_same_v<T, bfloat16>) {
    typedef uint32_t words __attribute__((vector_size(kVectorBytes)));
    typedef uint16_t halves __attribute__((vector_size(kVectorBytes / 2)));
    const words bits = (words)x;
    // to nearest even; a NaN stays one
    const words rounded = x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
    const halves out = __builtin_convertvector(rounded >> 16, halves);
    std::memcpy(p, &out, sizeof out);
    return;
  }
  for (int i = 0; i < kLanes<accumulator<T>>; ++i) p[i] = narrow<T>(x[i]);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// All bits of the first n lanes.
template <class A>
__m256i first_lanes(int64_t n) {
  if constexpr (sizeof(A) == 8) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

template <class T>
vec<accumulator<T>> load(const T* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    return (vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  }
  if constexpr (std::is_same_v<T, double>) {
    return (vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
  }
  if constexpr (sizeof(T) == 2) {
    const auto bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
    return load(reinterpret_cast<const T*>(&bits));
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    return (vec<float>)_mm256_maskload_ps(p, first_lanes<float>(n));
  }
  if constexpr (std::is_same_v<T, double>) {
    return (vec<double>)_mm256_maskload_pd(p, first_lanes<double>(n));
  }
#endif
  T lanes[kLanes<accumulator<T>>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class T>
void store(T* p, vec<accumulator<T>> x, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)x);
  }
  if constexpr (std::is_same_v<T, double>) {
    return _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)x);
  }
  if constexpr (sizeof(T) == 2) {
    T lanes[kLanes<float>];
    store(lanes, x);
    __m256i bits;
    std::memcpy(&bits, lanes, sizeof bits);
    return _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), bits);
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    return _mm256_maskstore_ps(p, first_lanes<float>(n), (__m256)x);
  }
  if constexpr (std::is_same_v<T, double>) {
    return _mm256_maskstore_pd(p, first_lanes<double>(n), (__m256d)x);
  }
#endif
  for (int64_t i = 0; i < n; ++i) p[i] = narrow<T>(x[i]);
}

// store past the cache: lines that are written whole are not read first. p is aligned to the bytes
// stored; other threads see them after finish_stream(). Fresh pages are in cache already, where the
// kernel has cleared them, and gain nothing: 604 MB of them took 23 ms so, 20 ms with plain stores,
// and 8 against 11 ms when they were not fresh (2 threads, huge pages).
template <class T>
void stream(T* p, vec<accumulator<T>> x) {
#if defined(__SSE2__)
  constexpr int kBytes = kLanes<accumulator<T>> * sizeof(T);
  if constexpr (kBytes >= 16) {
    T bits[kLanes<accumulator<T>>];
    store(bits, x);
    typedef long long words __attribute__((vector_size(kBytes)));
    words out;
    std::memcpy(&out, bits, sizeof out);
#if defined(__AVX512F__)
    if constexpr (kBytes == 64)
      return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)out);
#endif
#if defined(__AVX2__)
    if constexpr (kBytes == 32)
      return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)out);
#endif
    if constexpr (kBytes == 16)
      return _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)out);
  }
#endif
  store(p, x);
}
inline void finish_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// x in every lane. 0 + x would be an instruction, as it is not x where that is -0.
template <class A>
vec<A> broadcast(A x) {
  return x - vec<A>{};
}

// ---- comparison

// Bit i of the result says whether a <= b in lane i.
template <class V>
uint32_t lanes_up_to(V a, V b) {
  constexpr bool wide = sizeof(a[0]) == 8;
#if defined(__AVX512F__)
  if constexpr (wide) return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LE_OQ);
  if constexpr (!wide) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
#elif defined(__AVX2__)
  if constexpr (wide) return _mm256_movemask_pd((__m256d)(a <= b));
  if constexpr (!wide) return _mm256_movemask_ps((__m256)(a <= b));
#elif defined(__SSE2__)
  if constexpr (wide) return _mm_movemask_pd((__m128d)(a <= b));
  if constexpr (!wide) return _mm_movemask_ps((__m128)(a <= b));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanesOf<V>; ++i) bits |= uint32_t{a[i] <= b[i]} << i;
  return bits;
#endif
}
template <class A>
constexpr uint32_t kAllLanes = (1u << kLanes<A>)-1;

// How many of the lowest bits are set, before all that are not.
inline int count_bits(uint32_t bits) {
#if defined(__POPCNT__)
  return __builtin_popcountll(bits);
#else
  return __builtin_ctz(~bits);
#endif
}

// ---- between lanes

// Lane i of the result is lane i + from of low and high laid end to end.
template <int from, class V>
V window(V low, V high) {
  // one instruction where the compiler would build an index and permute two registers
#if defined(__AVX512F__)
  constexpr int kBytes = sizeof(std::declval<V>()[0]);
  const __m512i l = (__m512i)low, h = (__m512i)high;
  if constexpr (kBytes == 4) return (V)_mm512_alignr_epi32(h, l, from);
  if constexpr (kBytes == 8) return (V)_mm512_alignr_epi64(h, l, from);
#elif defined(__AVX2__)
  constexpr int kBytes = from * sizeof(std::declval<V>()[0]);
  const __m256i l = (__m256i)low, h = (__m256i)high;
  const __m256i middle = _mm256_permute2x128_si256(l, h, 0x21);
  if constexpr (kBytes < 16) return (V)_mm256_alignr_epi8(middle, l, kBytes);
  if constexpr (kBytes >= 16) return (V)_mm256_alignr_epi8(h, middle, kBytes - 16);
#endif
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(low, high, (i + from)...);
  }(std::make_integer_sequence<int, kLanesOf<V>>());
}

// Lane i of the result is lane index[i] of x.
template <class A>
struct index_of {
  typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> integer;
  typedef integer type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using lane_index = typename index_of<A>::type;

// 0, 1, 2, ...
template <class A>
lane_index<A> lane_numbers() {
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return lane_index<A>{i...};
  }(std::make_integer_sequence<int, kLanes<A>>());
}

template <class V, class I>
V permute(V x, I index) {
#if defined(__AVX512F__)
  if constexpr (kLanesOf<V> == 16) return (V)_mm512_permutexvar_epi32((__m512i)index, (__m512i)x);
  if constexpr (kLanesOf<V> == 8) return (V)_mm512_permutexvar_epi64((__m512i)index, (__m512i)x);
#elif defined(__AVX2__)
  if constexpr (kLanesOf<V> == 8) {
    return (V)_mm256_permutevar8x32_epi32((__m256i)x, (__m256i)index);
  }
#endif
  V out;
  for (int i = 0; i < kLanesOf<V>; ++i) out[i] = x[index[i]];
  return out;
}

// a in the lanes whose bits are set, b in the others.
template <uint32_t bits, class V>
V select_lanes(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (kLanesOf<V> == 16) return (V)_mm512_mask_mov_ps((__m512)b, bits, (__m512)a);
  if constexpr (kLanesOf<V> == 8) return (V)_mm512_mask_mov_pd((__m512d)b, bits, (__m512d)a);
#endif
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, (bits >> i & 1 ? i : kLanesOf<V> + i)...);
  }(std::make_integer_sequence<int, kLanesOf<V>>());
}

// Lanes move up, or down, by a number of places; zeros come in.
template <int places, class V>
V shift_up(V x) {
  return window<kLanesOf<V> - places>(V{}, x);
}
template <int places, class V>
V shift_down(V x) {
  return window<places>(x, V{});
}

// Lanes first .. first + count, over and over.
template <int first, int count, class V>
V repeat(V x) {
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(x, x, (first + i % count)...);
  }(std::make_integer_sequence<int, kLanesOf<V>>());
}

// The 128-bit lane that starts at lane `first`, in every 128-bit lane.
template <int first, class V>
V repeat_lane(V x) {
  return repeat<first, 16 / sizeof(std::declval<V>()[0])>(x);
}

// Values move up by a number of places inside their 128-bit lane, or down by a negative one; zeros
// come in.
template <int places, class V>
V shift_inside(V x) {
  constexpr int kBytes = places * int{sizeof(std::declval<V>()[0])};
#if defined(__AVX512F__)
  if constexpr (kBytes > 0) return (V)_mm512_bslli_epi128((__m512i)x, kBytes);
  if constexpr (kBytes < 0) return (V)_mm512_bsrli_epi128((__m512i)x, -kBytes);
#elif defined(__AVX2__)
  if constexpr (kBytes > 0) return (V)_mm256_slli_si256((__m256i)x, kBytes);
  if constexpr (kBytes < 0) return (V)_mm256_srli_si256((__m256i)x, -kBytes);
#else
  if constexpr (kBytes > 0) return shift_up<places>(x);
  if constexpr (kBytes < 0) return shift_down<-places>(x);
#endif
}

// Each 128-bit lane filled with the last value of the one so many before it, or with the first
// value of the one so many after it if their number is negative; 0 where there is none.
template <int lanes, class V>
V carry_from(V x) {
  constexpr int n = kLanesOf<V>, k = 16 / sizeof(std::declval<V>()[0]);
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(x, V{},
                                   (i / k - lanes < 0 || i / k - lanes >= n / k
                                        ? n
                                        : (i / k - lanes) * k + (lanes > 0 ? k - 1 : 0))...);
  }(std::make_integer_sequence<int, n>());
}

// The 128-bit lane `lane`, as a vector of its own.
template <int lane, class V>
auto lane128(V x) {
  constexpr int k = 16 / sizeof(std::declval<V>()[0]);
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(x, x, (lane * k + i)...);
  }(std::make_integer_sequence<int, k>());
}

// x with 16 bytes of memory as its 128-bit lane `lane`. As a shuffle this would go through the
// stack, in a store too narrow for the load behind it.
template <int lane, class V>
V with_lane128(V x, const void* p) {
#if defined(__AVX512F__)
  return (V)_mm512_inserti32x4((__m512i)x, _mm_loadu_si128(static_cast<const __m128i*>(p)), lane);
#elif defined(__AVX2__)
  return (V)_mm256_inserti128_si256((__m256i)x, _mm_loadu_si128(static_cast<const __m128i*>(p)),
                                    lane);
#else
  std::memcpy(&x, p, sizeof x);
  return x;
#endif
}

// Within each 128-bit lane, the low or high halves of a and b, taken in turn `unit` values at a
// time.
template <int unit, bool high, class V>
V unpack(V a, V b) {
  constexpr int n = kLanesOf<V>, k = 16 / sizeof(std::declval<V>()[0]);
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(
        a, b,
        (i / k * k + high * k / 2 + i % k / (2 * unit) * unit + i % unit + (i / unit % 2) * n)...);
  }(std::make_integer_sequence<int, n>());
}

}  // namespace rayfuse
