// The features f [S, C] of one packed ray: their sum with the weights w [S], and what the gradient
// g [C] of that gives back, d_w_s = <g, f_s>, d_f_s = w_s g. A team owns a ray. Its threads stand
// in rows: those of a row go along the channels of a sample, and rows take samples in turn, so that
// a warp reads and writes one piece of memory.
#pragma once

#include "levelled_sum.h"
#include "packed.h"
#include "ray_features.h"

namespace rayfuse {

struct PackedShape {
  int64_t R, P;
  int C;
  int lanes;  // of a row

  PackedShape(int64_t R, int64_t P, int64_t C)
      : R(R), P(P), C(static_cast<int>(C)), lanes(lanes_of(this->C)) {}

  // Threads of a row that has n pieces.
  __host__ __device__ static int lanes_of(int n) {
    int lanes = 1;
    while (lanes < n && lanes < kWarp) lanes *= 2;
    return lanes;
  }

  // One block at least, for samples of no ray.
  Grid grid(cudaStream_t stream) const {
    return {std::max<int64_t>(packed_blocks(R), 1), kBlock, 0, stream};
  }
};

// A thread adds up some channels at a time: where `vectors`, 8 in 16-byte pieces, of which C must
// be a multiple; else 4 that are a row's lanes apart.
template <int kThreads, class T, bool vectors = false>
class PackedFeatures {
 public:
  using A = accumulator<T>;
  static constexpr int kChannels = vectors ? 8 : 4;
  static constexpr int kWidth = vectors ? Vector<T>::kLanes : 1;
  static constexpr int kParts = kChannels / 4;

  __device__ PackedFeatures(const Team<kThreads>& team, const PackedRay& ray,
                            const PackedShape& shape, const Values& w, const T* f)
      : team_(team),
        ray_(ray),
        w_(w),
        f_(f),
        C_(shape.C),
        lanes_(vectors ? PackedShape::lanes_of(shape.C / kChannels) : shape.lanes),
        lane_(team.rank % lanes_),
        row_(team.rank / lanes_),
        rows_(kThreads / lanes_) {}

  // Calls result(c, sum_s w_s f_sc) for each channel, in one of the threads.
  template <class F>
  __device__ void add_up(const F& result) const {
    for_sums([&](int first, const A* sums) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        if (row_ == 0 && channel(first, i) < C_) result(channel(first, i), sums[i]);
      }
    });
  }

  // error = sum_s w_s f_s - target and product_s = <error, f_s>; returns |error|^2 in the first
  // row. The products grow by some channels at a time, while these are still in cache.
  __device__ A compare(const Values& target,  // [R, C]
                       A* error,              // [R, C]
                       A* product) const {    // [P]
    A square = 0;
    for_sums([&](int first, A* sums) {
      A squares[kParts] = {};
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        const int c = channel(first, i);
        if (c >= C_) sums[i] = 0;
        if (row_ > 0 || c >= C_) continue;
        const int64_t place = ray_.index * C_ + c;
        error[place] = sums[i] -= value_at<A>(target, place);
        squares[i / 4] += sums[i] * sums[i];
      }
      square += sum_of_lanes(squares);
      share(sums);
      for_rows([&](int64_t k, bool exists) {
        A dots[kParts] = {};
        if (exists) for_channels(k, first, [&](int i, A f) { dots[i / 4] += sums[i] * f; });
        const A dot = sum_of_lanes(dots);
        if (exists && lane_ == 0) product[k] = first ? product[k] + dot : dot;
      });
    });
    return square;
  }

  // d_w_s = <g, f_s>, d_f_s = w_s g
  __device__ void spread(const A* g,  // [C]
                         const MutableValues& d_w, T* d_f) const {
    for_rows([&](int64_t k, bool exists) {
      const A w_k = exists ? value_at<A>(w_, k) : A(0);
      A dot = 0;
      for (int c = lane_; exists && c < C_; c += lanes_) {
        if (d_w.data) dot += g[c] * widen(f_[k * C_ + c]);
        if (d_f) d_f[k * C_ + c] = narrow<T>(w_k * g[c]);
      }
      if (!d_w.data) return;
      for (int places = lanes_ / 2; places > 0; places /= 2) {
        dot += __shfl_xor_sync(kAllLanes, dot, places);
      }
      if (exists && lane_ == 0) set_value(d_w, k, dot);
    });
  }

 private:
  __device__ int channel(int first, int i) const {
    return first + (i / kWidth * lanes_ + lane_) * kWidth + i % kWidth;
  }

  // Calls visit(i, f_kc) for the thread's channels from `first` on.
  template <class F>
  __device__ void for_channels(int64_t k, int first, const F& visit) const {
#pragma unroll
    for (int i = 0; i < kChannels; i += kWidth) {
      const int c = channel(first, i);
      if (c >= C_) continue;
      const T* const f = f_ + k * C_ + c;
      if (vectors && reinterpret_cast<uintptr_t>(f_) % 16 == 0) {
        Vector<T> x;
        x.bits = __ldg(reinterpret_cast<const uint4*>(f));
#pragma unroll
        for (int j = 0; j < kWidth; ++j) visit(i + j, widen(x.value[j]));
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) visit(i + j, widen(f[j]));
      }
    }
  }

  // Calls f(k, exists) for the samples of the row, for all of a warp at once.
  template <class F>
  __device__ void for_rows(const F& f) const {
    for (int64_t first = ray_.begin; first < ray_.end; first += rows_) {
      f(first + row_, first + row_ < ray_.end);
    }
  }

  // Calls visit(first, sums) in all threads; those of the first row have the sums over samples of
  // their channels from `first` on.
  template <class F>
  __device__ void for_sums(const F& visit) const {
    for (int first = 0; first < C_; first += kChannels * lanes_) {
      LevelledSum<A> levels[kChannels];
      for (int64_t k = ray_.begin + row_; k < ray_.end; k += rows_) {
        const A w_k = value_at<A>(w_, k);
        for_channels(k, first, [&](int i, A f) { levels[i].add(w_k * f); });
      }
      A sums[kChannels];
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sums[i] = levels[i].total();
      add_rows(sums);
      visit(first, sums);
    }
  }

  // The sum over the threads of this row, of parts of 4 channels each. They meet as the channels
  // lie, neighbours first, so that sums of halves are those of floats to the bit.
  __device__ A sum_of_lanes(A (&parts)[kParts]) const {
    constexpr bool are_neighbours = kWidth == kChannels;
    if constexpr (kParts > 1 && are_neighbours) parts[0] += parts[1];
    for (int places = 1; places < lanes_; places *= 2) {
#pragma unroll
      for (int p = 0; p < (are_neighbours ? 1 : kParts); ++p) {
        parts[p] += __shfl_xor_sync(kAllLanes, parts[p], places);
      }
    }
    if constexpr (kParts > 1 && !are_neighbours) parts[0] += parts[1];
    return parts[0];
  }

  // Sums over the threads of this lane, for the first row.
  __device__ void add_rows(A* sums) const {
    for (int places = lanes_; places < kWarp; places *= 2) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], places);
    }
    if constexpr (kThreads > kWarp) {
      __shared__ A warps[kChannels][kThreads];
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kChannels; ++i) warps[i][team_.rank] = sums[i];
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        sums[i] = 0;
        for (int j = team_.lane; j < kThreads; j += kWarp) sums[i] += warps[i][j];
      }
    }
  }

  // Values of the first row's threads, for those of all rows.
  __device__ void share(A* values) const {
    if constexpr (kThreads > kWarp) {
      __shared__ A row[kChannels][kWarp];
      if (row_ == 0) {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) row[i][lane_] = values[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kChannels; ++i) values[i] = row[i][lane_];
    } else {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) values[i] = __shfl_sync(kAllLanes, values[i], lane_);
    }
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
