// What a block reads and writes of its rays, and the scans of a team along one of them: of a few
// threads, a warp, or all of a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../accumulator.h"

namespace rayfuse {

using half = __half;
using bfloat16 = __nv_bfloat16;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(half x) { return __half2float(x); }
__device__ inline float widen(bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T narrow(accumulator<T> x) {
  return x;
}
template <>
__device__ inline half narrow<half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline bfloat16 narrow<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

constexpr int kWarp = 32;
// Threads of a short ray. A scan has as many steps for a ray that gives each lane one sample as for
// one that gives it ten: a warp on 48 samples took 500 instructions where four such teams take 100.
constexpr int kFew = 8;
constexpr unsigned kAllLanes = 0xffffffff;
// Threads in a block, whatever the teams.
constexpr int kBlock = 256;
// Blocks that the registers of a multiprocessor must suffice for: their warps hide what each of
// them waits for, and nvcc takes more registers than it needs where it may.
template <class T>
constexpr int kResidentBlocks = 16 / sizeof(accumulator<T>);

// ---- values of a ray on chip

// Memory moves in sectors, and a warp that cuts its requests elsewhere moves some of them twice.
template <class T>
constexpr int kSector = 32 / sizeof(T);

// Elements that n values take on chip, with one more before and after them, wherever in a sector
// they start.
template <class T>
__host__ __device__ constexpr int chip_size(int n) {
  return (n + 2 * kSector<T> + 4) / 4 * 4;
}

// Where in a buffer of chip_size the values at `from` lie: as far into a sector as in memory, so
// that both can be addressed in vectors.
template <class T>
__device__ accumulator<T>* on_chip(accumulator<T>* buffer, const T* from) {
  return buffer + kSector<T> + reinterpret_cast<uintptr_t>(from) % 32 / sizeof(T);
}

// The block, or those who call themselves `thread` of `threads`, call one(i) for the values up to
// the first and after the last whole sector of n values at `from`, vector(i) for every 16 bytes
// between.
template <class T, class One, class Vector>
__device__ void for_each_vector(const T* from, int n, const One& one, const Vector& vector,
                                int thread = threadIdx.x, int threads = blockDim.x) {
  constexpr int kLanes = 16 / sizeof(T);
  [[maybe_unused]] constexpr int kAtOnce = sizeof(T) == 2 ? 2 : 4;
  const int into = reinterpret_cast<uintptr_t>(from) % 32 / sizeof(T);
  const int head = min(n, (kSector<T> - into) % kSector<T>);
  const int body = head + (n - head) / kSector<T> * kSector<T>;
  // of so few values, unrolled, there was more code than of all vectors
#pragma unroll 1
  for (int i = thread; i < head; i += threads) one(i);
#pragma unroll kAtOnce
  for (int i = head + thread * kLanes; i < body; i += threads * kLanes) vector(i);
#pragma unroll 1
  for (int i = body + thread; i < n; i += threads) one(i);
}

// A 16-byte vector of T, and its values in the accumulator's type as whole 16-byte vectors.
template <class T>
union Vector {
  static constexpr int kLanes = 16 / sizeof(T);

  __device__ Vector() : bits() {}

  uint4 bits;
  T value[kLanes];
};
template <class T>
struct WideVector {
  static constexpr int kParts = sizeof(accumulator<T>) / sizeof(T);

  Vector<accumulator<T>> part[kParts];

  __device__ accumulator<T>& operator[](int i) {
    constexpr int kLanes = Vector<accumulator<T>>::kLanes;
    return part[i / kLanes].value[i % kLanes];
  }
};

template <class T>
__device__ void load(const T* from, accumulator<T>* chip, int n, int thread = threadIdx.x,
                     int threads = blockDim.x) {
  for_each_vector(
      from, n, [&](int i) { chip[i] = widen(from[i]); },
      [&](int i) {
        Vector<T> narrow_;
        WideVector<T> wide;
        narrow_.bits = __ldg(reinterpret_cast<const uint4*>(from + i));
#pragma unroll
        for (int j = 0; j < Vector<T>::kLanes; ++j) wide[j] = widen(narrow_.value[j]);
        uint4* to = reinterpret_cast<uint4*>(chip + i);
#pragma unroll
        for (int p = 0; p < WideVector<T>::kParts; ++p) to[p] = wide.part[p].bits;
      },
      thread, threads);
}

template <class T>
__device__ void store(T* to, const accumulator<T>* chip, int n, int thread = threadIdx.x,
                      int threads = blockDim.x) {
  for_each_vector(
      to, n, [&](int i) { to[i] = narrow<T>(chip[i]); },
      [&](int i) {
        Vector<T> narrow_;
        WideVector<T> wide;
        const uint4* from = reinterpret_cast<const uint4*>(chip + i);
#pragma unroll
        for (int p = 0; p < WideVector<T>::kParts; ++p) wide.part[p].bits = from[p];
#pragma unroll
        for (int j = 0; j < Vector<T>::kLanes; ++j) narrow_.value[j] = narrow<T>(wide[j]);
        // a plain store of a uint4 came out as four (nvcc 13.0)
        __stwb(reinterpret_cast<uint4*>(to + i), narrow_.bits);
      },
      thread, threads);
}

// ---- the team

// A state of nothing: State::none() where there is one, else zero.
template <class State>
__device__ State nothing() {
  if constexpr (requires { State::none(); }) {
    return State::none();
  } else {
    return State{};
  }
}

// kThreads threads on one ray. What scans go over is a State: an aggregate, zero or none() if there
// is nothing, with join(next), its sum with what comes after it, and shuffle, shuffle_up and
// shuffle_down.
template <int kThreads>
struct Team {
  static constexpr int kLanes = kThreads < kWarp ? kThreads : kWarp;
  static constexpr int kWarps = kThreads / kLanes;
  static_assert(kThreads == kFew || kThreads % kWarp == 0);

  // the team's in the block, the thread's in the team
  const int index = threadIdx.x / kThreads, rank = threadIdx.x % kThreads;
  const int lane = threadIdx.x % kLanes;

  template <class State>
  struct Scan {
    State before, total;
  };
  // What comes before this thread, from the left or from the right, and the sum over all.
  template <bool from_right, class State>
  __device__ Scan<State> scan(State x) const {
    const int place = from_right ? kLanes - 1 - lane : lane;
#pragma unroll
    for (int places = 1; places < kLanes; places *= 2) {
      const State before = from_right ? x.shuffle_down(places) : x.shuffle_up(places);
      if (place >= places) x = before.join(x);
    }
    State before = from_right ? x.shuffle_down(1) : x.shuffle_up(1);
    if (place == 0) before = nothing<State>();
    const int first_lane = threadIdx.x % kWarp - lane;
    State total = x.shuffle(first_lane + (from_right ? 0 : kLanes - 1));
    if constexpr (kWarps > 1) {
      __shared__ State warps[kWarps];
      const int warp = rank / kWarp;
      __syncthreads();
      if (lane == 0) warps[warp] = total;
      __syncthreads();
      State before_warp = nothing<State>();
      total = nothing<State>();
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        const int next = from_right ? kWarps - 1 - i : i;
        if (next == warp) before_warp = total;
        total = total.join(warps[next]);
      }
      before = before_warp.join(before);
    }
    return {before, total};
  }

  // The sum over all of the team, for each of its threads.
  template <class A>
  __device__ A sum(A x) const {
#pragma unroll
    for (int places = kLanes / 2; places > 0; places /= 2) {
      x += __shfl_xor_sync(kAllLanes, x, places);
    }
    if constexpr (kWarps > 1) {
      __shared__ A warps[kWarps];
      __syncthreads();
      if (lane == 0) warps[rank / kWarp] = x;
      __syncthreads();
      x = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) x += warps[i];
    }
    return x;
  }
};

// The teams that rays of S samples get, of all of whose edges `most` are on chip at once.
struct Teams {
  int threads;

  Teams(int64_t S, int64_t most) : threads(kBlock) {
    if (S < 512 && S < most) threads = kWarp;
    if (S <= 64 && (S + 1) * (kWarp / kFew) <= most) threads = kFew;
  }

  // Rays of a block, of which so many fit on chip: whole warps.
  int rays(int64_t fit) const {
    if (threads == kBlock) return 1;
    const int most = static_cast<int>(fit < kBlock / threads ? fit : kBlock / threads);
    return threads == kFew ? most / (kWarp / kFew) * (kWarp / kFew) : most;
  }
  // The kernel for them.
  template <class Kernel>
  Kernel pick(Kernel few, Kernel warp, Kernel block) const {
    return threads == kFew ? few : threads == kWarp ? warp : block;
  }
};

}  // namespace rayfuse
