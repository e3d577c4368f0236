// The features f [S, C] of one packed ray: their sum with the weights w [S], and what the gradient
// g [C] of that gives back, d_w_s = <g, f_s>, d_f_s = w_s g. A team owns a ray. Its threads stand
// in rows: those of a row go along the channels of a sample, and rows take samples in turn, so that
// a warp reads and writes one piece of memory.
#pragma once

#include "levelled_sum.h"
#include "packed.h"
#include "ray_features.h"

namespace rayfuse {

// Channels of a thread that are added up at a time.
constexpr int kChannels = 4;

struct PackedShape {
  int64_t R, P;
  int C;
  int lanes;  // of a row

  PackedShape(int64_t R, int64_t P, int64_t C) : R(R), P(P), C(static_cast<int>(C)), lanes(1) {
    while (lanes < C && lanes < kWarp) lanes *= 2;
  }

  // One block at least, for samples of no ray.
  Grid grid(size_t shared_bytes, cudaStream_t stream) const {
    return {std::max<int64_t>(packed_blocks(R), 1), kBlock, shared_bytes, stream};
  }
};

template <int kThreads, class T>
class PackedFeatures {
 public:
  using A = accumulator<T>;

  __device__ PackedFeatures(const Team<kThreads>& team, const PackedRay& ray,
                            const PackedShape& shape, const Values& w, const T* f)
      : team_(team),
        ray_(ray),
        w_(w),
        f_(f),
        C_(shape.C),
        lanes_(shape.lanes),
        lane_(team.rank % lanes_),
        row_(team.rank / lanes_),
        rows_(kThreads / lanes_) {}

  // Calls result(c, sum_s w_s f_sc) for each channel, in one of the threads.
  template <class F>
  __device__ void add_up(const F& result) const {
    for (int first = 0; first < C_; first += kChannels * lanes_) {
      LevelledSum<A> sums[kChannels];
      for (int64_t k = ray_.begin + row_; k < ray_.end; k += rows_) {
        const A w_k = value_at<A>(w_, k);
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
          const int c = channel(first, i);
          if (c < C_) sums[i].add(w_k * widen(f_[k * C_ + c]));
        }
      }
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        const A sum = sum_of_rows(sums[i].total());
        if (row_ == 0 && channel(first, i) < C_) result(channel(first, i), sum);
      }
    }
  }

  // d_w_s = <g, f_s>, d_f_s = w_s g
  __device__ void spread(const A* g,  // [C]
                         const MutableValues& d_w, T* d_f) const {
    for (int64_t first = ray_.begin; first < ray_.end; first += rows_) {
      const int64_t k = first + row_;
      const bool exists = k < ray_.end;
      const A w_k = exists ? value_at<A>(w_, k) : A(0);
      A dot = 0;
      for (int c = lane_; exists && c < C_; c += lanes_) {
        if (d_w.data) dot += g[c] * widen(f_[k * C_ + c]);
        if (d_f) d_f[k * C_ + c] = narrow<T>(w_k * g[c]);
      }
      if (!d_w.data) continue;
      for (int places = lanes_ / 2; places > 0; places /= 2) {
        dot += __shfl_xor_sync(kAllLanes, dot, places);
      }
      if (exists && lane_ == 0) set_value(d_w, k, dot);
    }
  }

 private:
  __device__ int channel(int first, int i) const { return first + i * lanes_ + lane_; }

  // The sum over the threads of this lane, for the first row.
  __device__ A sum_of_rows(A x) const {
    for (int places = lanes_; places < kWarp; places *= 2) {
      x += __shfl_xor_sync(kAllLanes, x, places);
    }
    if constexpr (kThreads > kWarp) {
      __shared__ A warps[kThreads];
      __syncthreads();
      warps[team_.rank] = x;
      __syncthreads();
      x = 0;
      for (int i = team_.lane; i < kThreads; i += kWarp) x += warps[i];
    }
    return x;
  }

  const Team<kThreads>& team_;
  const PackedRay& ray_;
  const Values w_;
  const T* const f_;
  const int C_, lanes_, lane_, row_, rows_;
};

// The gradients of samples that belong to no ray are 0.
template <class T>
__device__ void clear_stray_features(const int64_t* offsets, const PackedShape& shape,
                                     const MutableValues& d_w, T* d_f) {
  for_each_stray_sample(offsets, shape.R, shape.P, [&](int64_t k) {
    if (d_w.data) set_value(d_w, k, accumulator<T>(0));
    for (int c = 0; d_f && c < shape.C; ++c) d_f[k * shape.C + c] = narrow<T>(0);
  });
}

}  // namespace rayfuse
