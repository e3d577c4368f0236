// The part of CUDA that kernels use, for a C++ compiler: it stands before the toolkit's headers on
// the include path. What threads do together is in csrc/simt/executor.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// one copy for each OS thread, which runs one block at a time; at block scope it implies static
#define __shared__ thread_local

// ---- types

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
#define SIMT_VECTORS(type, name)                           \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; }; \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; };
SIMT_VECTORS(float, float)
SIMT_VECTORS(double, double)
SIMT_VECTORS(int, int)
SIMT_VECTORS(unsigned, uint)
#undef SIMT_VECTORS

// set at each switch of threads; const for the kernels, so that their reads are not watched
#if defined(SIMT_EXECUTOR)
extern "C" uint3 threadIdx, blockIdx, blockDim, gridDim;
#else
extern "C" const uint3 threadIdx, blockIdx, blockDim, gridDim;
#endif
constexpr int warpSize = 32;

// ---- launches

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace simt {

using Site = std::source_location;

// Runs body(call) for every thread. `call` is the kernel's argument record, `size` bytes.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*),
                   void* call, size_t size);

// What one lane brings to a call that a warp makes together. Its result is the value of the lane
// `source`, or, if there is `combine`, that of all values in the mask.
struct WarpCall {
  const char* name;
  unsigned mask;
  uint64_t value;
  int source;
  uint64_t (*combine)(const uint64_t* values, unsigned mask);
};
uint64_t warp_call(const WarpCall& call, const Site& site);

// Waits for the whole block; how many threads brought a predicate that holds.
int block_barrier(const char* name, bool predicate, const Site& site);
void warp_barrier(unsigned mask, const Site& site);
unsigned active_lanes();
// Called before an atomic access, which is one step: threads switch only where they wait.
void atomic_access(const void* address, int size, const void* caller);

template <class T>
uint64_t to_bits(T x) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <class T>
T shuffle(const char* name, unsigned mask, T x, int source, const Site& site) {
  return from_bits<T>(warp_call({name, mask, to_bits(x), source, nullptr}, site));
}

// Folds the values of a mask with F.
template <class T, class F>
uint64_t fold(const uint64_t* values, unsigned mask) {
  T sum = {};
  for (bool first = true; mask; mask &= mask - 1, first = false) {
    const T x = from_bits<T>(values[__builtin_ctz(mask)]);
    sum = first ? x : F()(sum, x);
  }
  return to_bits(sum);
}
inline uint64_t ballot(const uint64_t* values, unsigned mask) {
  uint64_t lanes = 0;
  for (; mask; mask &= mask - 1) lanes |= values[__builtin_ctz(mask)] << __builtin_ctz(mask);
  return lanes;
}

}  // namespace simt

template <class... P, class... Q>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               Q&&... args) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } call{kernel, {static_cast<P>(args)...}};
  const auto body = [](void* record) {
    auto& [kernel, args] = *static_cast<Call*>(record);
    std::apply(kernel, args);
  };
  return simt::launch(*config, reinterpret_cast<const void*>(kernel), body, &call, sizeof call);
}
// The first report of the launch that failed last.
const char* cudaGetErrorString(cudaError_t error);

// ---- barriers

inline void __syncthreads(simt::Site site = simt::Site::current()) {
  simt::block_barrier("__syncthreads", false, site);
}
inline int __syncthreads_count(int predicate, simt::Site site = simt::Site::current()) {
  return simt::block_barrier("__syncthreads_count", predicate, site);
}
inline int __syncthreads_or(int predicate, simt::Site site = simt::Site::current()) {
  return simt::block_barrier("__syncthreads_or", predicate, site) > 0;
}
inline int __syncthreads_and(int predicate, simt::Site site = simt::Site::current()) {
  return simt::block_barrier("__syncthreads_and", !predicate, site) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffff, simt::Site site = simt::Site::current()) {
  simt::warp_barrier(mask, site);
}
inline void __threadfence_block() {}
inline void __threadfence() {}

// ---- shuffles, votes, reductions

// a lane that the whole segment of `width` lanes does not hold is the caller's own
#define SIMT_SHUFFLE(name, argument, lane_of_source)                                              \
  template <class T>                                                                              \
  T name(unsigned mask, T x, argument, int width = 32, simt::Site site = simt::Site::current()) { \
    const int lane = threadIdx.x % 32, begin = lane / width * width;                              \
    const int source = lane_of_source;                                                            \
    const bool inside = source >= begin && source < begin + width;                                \
    return simt::shuffle(#name, mask, x, inside ? source : lane, site);                           \
  }
SIMT_SHUFFLE(__shfl_sync, int from, begin + (from & (width - 1)))
SIMT_SHUFFLE(__shfl_up_sync, unsigned places, lane - static_cast<int>(places))
SIMT_SHUFFLE(__shfl_down_sync, unsigned places, lane + static_cast<int>(places))
SIMT_SHUFFLE(__shfl_xor_sync, int bits, lane ^ bits)
#undef SIMT_SHUFFLE

inline unsigned __activemask() { return simt::active_lanes(); }
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              simt::Site site = simt::Site::current()) {
  return static_cast<unsigned>(
      simt::warp_call({"__ballot_sync", mask, predicate != 0, 0, simt::ballot}, site));
}
inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::warp_call({"__any_sync", mask, predicate != 0, 0, simt::ballot}, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::warp_call({"__all_sync", mask, predicate == 0, 0, simt::ballot}, site) == 0;
}
#define SIMT_REDUCTION(name, ...)                                                               \
  template <class T>                                                                            \
  T name(unsigned mask, T x, simt::Site site = simt::Site::current()) {                         \
    return simt::from_bits<T>(                                                                  \
        simt::warp_call({#name, mask, simt::to_bits(x), 0, simt::fold<T, __VA_ARGS__>}, site)); \
  }
namespace simt {
struct Least {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};
struct Greatest {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};
}  // namespace simt
SIMT_REDUCTION(__reduce_add_sync, std::plus<T>)
SIMT_REDUCTION(__reduce_min_sync, simt::Least)
SIMT_REDUCTION(__reduce_max_sync, simt::Greatest)
SIMT_REDUCTION(__reduce_and_sync, std::bit_and<T>)
SIMT_REDUCTION(__reduce_or_sync, std::bit_or<T>)
#undef SIMT_REDUCTION

// ---- atomics

#define SIMT_ATOMIC(name, updated)                                                                 \
  template <class T>                                                                               \
  __attribute__((noinline, no_sanitize("thread"))) T name(T* address, std::type_identity_t<T> x) { \
    simt::atomic_access(address, sizeof(T), __builtin_return_address(0));                          \
    const T old = *address;                                                                        \
    *address = updated;                                                                            \
    return old;                                                                                    \
  }
SIMT_ATOMIC(atomicAdd, old + x)
SIMT_ATOMIC(atomicSub, old - x)
SIMT_ATOMIC(atomicMin, old < x ? old : x)
SIMT_ATOMIC(atomicMax, old > x ? old : x)
SIMT_ATOMIC(atomicAnd, old& x)
SIMT_ATOMIC(atomicOr, old | x)
SIMT_ATOMIC(atomicExch, x)
#undef SIMT_ATOMIC
template <class T>
__attribute__((noinline, no_sanitize("thread"))) T atomicCAS(T* address,
                                                             std::type_identity_t<T> expected,
                                                             std::type_identity_t<T> x) {
  simt::atomic_access(address, sizeof(T), __builtin_return_address(0));
  const T old = *address;
  if (old == expected) *address = x;
  return old;
}

// ---- arithmetic

#define SIMT_MINMAX(type)                                   \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
SIMT_MINMAX(int)
SIMT_MINMAX(unsigned)
SIMT_MINMAX(long)
SIMT_MINMAX(long long)
#undef SIMT_MINMAX
// of a number and a NaN CUDA takes the number
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
void __stwb(T* address, T x) {
  *address = x;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
