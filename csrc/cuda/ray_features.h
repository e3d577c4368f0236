// The features f [S, C] of a ray: their sums with the weights w [S], and what the gradients g [C]
// of these give back, d_w_s = <g, f_s>, d_f_s = w_s g. A team owns a ray. Its threads stand in
// rows: those of a row go along the channels of a sample, four each, and rows take samples in turn,
// eight at a time, so that a warp reads and writes whole pieces of memory and waits for many at
// once. Nothing depends on the type of f but how it is read and written: the sums of halves are
// those of floats to the bit, for which products that are added up are fused by name.
#pragma once

#include "launch.h"
#include "levelled_sum.h"
#include "packed.h"

#include <algorithm>
#include <type_traits>

namespace rayfuse {

// ---- arrays small beside the features: the type of their elements is not a kernel's own

enum class Element { kDouble, kFloat, kHalf, kBfloat16 };
struct Values {
  const void* data;
  Element element;
};
struct MutableValues {
  void* data;  // or null
  Element element;
};

// Calls f with a value of the element type, which is computed in A.
template <class A, class F>
__device__ void with_type(Element element, const F& f) {
  if constexpr (sizeof(A) == sizeof(double)) {
    f(double{});
  } else {
    switch (element) {
      case Element::kHalf:
        return f(half{});
      case Element::kBfloat16:
        return f(bfloat16{});
      default:
        return f(float{});
    }
  }
}
template <class A>
__device__ A value_at(const Values& x, int64_t i) {
  A value = 0;
  with_type<A>(x.element,
               [&](auto type) { value = widen(static_cast<const decltype(type)*>(x.data)[i]); });
  return value;
}
template <class A>
__device__ void set_value(const MutableValues& x, int64_t i, A value) {
  with_type<A>(x.element, [&](auto type) {
    using T = decltype(type);
    static_cast<T*>(x.data)[i] = narrow<T>(value);
  });
}

// ---- how the threads stand

constexpr int kChannels = 4;  // of a thread

struct FeatureShape {
  int C;
  int log_lanes = 0;  // of a row

  explicit FeatureShape(int64_t C) : C(static_cast<int>(C)) {
    while (kChannels << log_lanes < C && 1 << log_lanes < kWarp) ++log_lanes;
  }

  // Samples of the longest ray of a warp: none of its threads adds up more than a level of terms.
  int64_t short_ray() const {
    const int64_t of_a_row = kChannels << log_lanes;
    return (kInLevel * kWarp >> log_lanes) / std::max<int64_t>((C + of_a_row - 1) / of_a_row, 1);
  }
};

enum class Layout {
  kVectors,     // a thread has four neighbours, in one access
  kNeighbours,  // in four, as memory begins inside of a vector
  kStrided,     // its channels are a row's lanes apart, as C is no multiple of four
};

// Calls body<layout>() for arrays of rows of C channels.
template <class F, class... T>
__device__ void with_layout(int C, const F& body, const T*... arrays) {
  if (C % kChannels != 0) {
    body.template operator()<Layout::kStrided>();
  } else if ((reinterpret_cast<uintptr_t>(arrays) | ...) % 16 != 0) {
    body.template operator()<Layout::kNeighbours>();
  } else {
    body.template operator()<Layout::kVectors>();
  }
}

// The channels of a thread.
template <class T>
union Quad {
  using Bits = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  static constexpr int kParts = kChannels * sizeof(T) / sizeof(Bits);

  __device__ Quad() : bits() {}

  Bits bits[kParts];
  T value[kChannels];
};

// Sums over the warps of a block, of which each has lanes `first` with numbers of their own.
template <class A>
__device__ void add_warps(Quad<A>& sums, int lane, bool first) {
  constexpr int kWarps = kBlock / kWarp;
  __shared__ __align__(16) A warps[kWarps][kWarp][kChannels];
  __syncthreads();
  if (first) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) warps[threadIdx.x / kWarp][lane][i] = sums.value[i];
  }
  __syncthreads();
  sums = {};
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) sums.value[i] += warps[warp][lane][i];
  }
}

template <int kThreads, Layout layout, class T>
class Features {
 public:
  using A = accumulator<T>;
  // Samples of a thread in flight, and where they are written as well: so many that 16 warps wait
  // for what a GPU moves meanwhile.
  static constexpr int kDepth = layout == Layout::kVectors ? 32 / sizeof(A) : 4;
  static constexpr int kSpreadDepth = kDepth / 2;

  __device__ Features(const Team<kThreads>& team, const FeatureShape& shape, const PackedRay& ray,
                      const Values& w, const T* f)
      : team_(team),
        C_(shape.C),
        lanes_(1 << shape.log_lanes),
        lane_(team.rank & (lanes_ - 1)),
        row_(team.rank >> shape.log_lanes),
        rows_(kThreads >> shape.log_lanes),
        stride_(int64_t{shape.C} * kThreads >> shape.log_lanes),
        begin_(ray.begin),
        end_(ray.end),
        w_(w),
        f_(f) {}

  __device__ bool is_first_row() const { return row_ == 0; }
  __device__ int channel(int first, int i) const {
    return layout == Layout::kStrided ? first + i * lanes_ + lane_ : first + lane_ * kChannels + i;
  }

  // Calls visit(first) for pieces of the channels, from `first` on: four of each thread of a row.
  template <class F>
  __device__ void for_pieces(const F& visit) const {
    for (int first = 0; first < C_; first += lanes_ * kChannels) visit(first);
  }

  // The thread's channels of a row [C]; 0 for those that do not exist.
  template <class X>
  __device__ void read(const X* row, int first, Quad<X>& x) const {
    if constexpr (layout == Layout::kVectors) {
      if (channel(first, 0) >= C_) return;
      const auto* const from =
          reinterpret_cast<const typename Quad<X>::Bits*>(row + channel(first, 0));
#pragma unroll
      for (int p = 0; p < Quad<X>::kParts; ++p) x.bits[p] = __ldg(from + p);
    } else {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        if (channel(first, i) < C_) x.value[i] = row[channel(first, i)];
      }
    }
  }
  template <class X>
  __device__ void write(X* row, int first, const Quad<X>& x) const {
    if constexpr (layout == Layout::kVectors) {
      if (channel(first, 0) >= C_) return;
      auto* const to = reinterpret_cast<typename Quad<X>::Bits*>(row + channel(first, 0));
#pragma unroll
      for (int p = 0; p < Quad<X>::kParts; ++p) __stwb(to + p, x.bits[p]);
    } else {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        if (channel(first, i) < C_) row[channel(first, i)] = x.value[i];
      }
    }
  }

  // sums = sum_s w_s f_s of a piece, in the threads of all rows. Returns where the last samples
  // begin, which `tile` holds.
  __device__ int64_t add_up(int first, Quad<T> (&tile)[kDepth], Quad<A>& sums) const {
    LevelledSum<A> levels[kChannels];
    int tiles = 0;
    int64_t last = begin_ - 1;
    for (int64_t k = begin_; k < end_; k += kDepth * rows_) {
      A w[kDepth];
      load_weights(k, w);
      load(k, first, tile);
#pragma unroll
      for (int j = 0; j < kDepth; ++j) {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) levels[i].add_product(w[j], widen(tile[j].value[i]));
      }
      if (kThreads > kWarp && ++tiles % (kInLevel / kDepth) == 0) {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) levels[i].close();
      }
      last = k;
    }
#pragma unroll
    for (int i = 0; i < kChannels; ++i) sums.value[i] = levels[i].total();
    add_rows(sums);
    return last;
  }

  // product_s = <e, f_s>, of which each piece adds its part. From the last samples on, which are
  // still in `tile`; those before are still in cache. A ray of one tile keeps the sums in `dots`
  // from piece to piece.
  __device__ void multiply(int first, int64_t last, Quad<T> (&tile)[kDepth], const Quad<A>& e,
                           A (&dots)[kDepth], A* product) const {
    const bool keeps = last <= begin_, more = first + lanes_ * kChannels < C_;
    for (int64_t k = last; k >= begin_; k -= kDepth * rows_) {
      if (k != last) load(k, first, tile);
      add_products(e, tile, dots);
      if (keeps && more) return;
      sum_of_lanes(dots);
      A* const to = product + k + row_;
      for_samples<kDepth>(k, [&](int j) {
        if (lane_ == 0) to[j * rows_] = first && !keeps ? to[j * rows_] + dots[j] : dots[j];
      });
#pragma unroll
      for (int j = 0; j < kDepth; ++j) dots[j] = 0;
    }
  }

  // d_w_s = <g, f_s>, d_f_s = w_s g with g = scale row
  __device__ void spread(const A* row, A scale, const MutableValues& d_w, T* d_f) const {
    for (int64_t k = begin_; k < end_; k += kSpreadDepth * rows_) {
      A w[kSpreadDepth], dots[kSpreadDepth] = {};
      if (d_f) load_weights(k, w);
      for_pieces([&](int first) {
        Quad<A> g;
        read(row, first, g);
#pragma unroll
        for (int i = 0; i < kChannels; ++i) g.value[i] *= scale;
        Quad<T> tile[kSpreadDepth];
        if (d_w.data) load(k, first, tile);
        if (d_f) {
          T* const to = d_f + (k + row_) * C_;
          for_samples<kSpreadDepth>(k, [&](int j) {
            Quad<T> x;
#pragma unroll
            for (int i = 0; i < kChannels; ++i) x.value[i] = narrow<T>(w[j] * g.value[i]);
            write(to + j * stride_, first, x);
          });
        }
        if (d_w.data) add_products(g, tile, dots);
      });
      if (!d_w.data) continue;
      sum_of_lanes(dots);
      with_type<A>(d_w.element, [&](auto type) {
        using W = decltype(type);
        W* const to = static_cast<W*>(d_w.data) + k + row_;
        for_samples<kSpreadDepth>(k, [&](int j) {
          if (lane_ == 0) to[j * rows_] = narrow<W>(dots[j]);
        });
      });
    }
  }

  // Sums over the threads of a row, for all of them.
  template <int n>
  __device__ void sum_of_lanes(A (&x)[n]) const {
    for (int places = 1; places < lanes_; places *= 2) {
#pragma unroll
      for (int j = 0; j < n; ++j) x[j] += __shfl_xor_sync(kAllLanes, x[j], places);
    }
  }

 private:
  // Calls visit(j) for those of n samples of this row from k on that exist.
  template <int n, class F>
  __device__ void for_samples(int64_t k, const F& visit) const {
    const int left = static_cast<int>(min(end_ - k, int64_t{n * kThreads})) - row_;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (j * rows_ < left) visit(j);
    }
  }
  template <int n>
  __device__ void load(int64_t k, int first, Quad<T> (&tile)[n]) const {
    const T* const from = f_ + (k + row_) * C_;
#pragma unroll
    for (int j = 0; j < n; ++j) tile[j] = {};
    for_samples<n>(k, [&](int j) { read(from + j * stride_, first, tile[j]); });
  }
  template <int n>
  __device__ void load_weights(int64_t k, A (&w)[n]) const {
#pragma unroll
    for (int j = 0; j < n; ++j) w[j] = 0;
    with_type<A>(w_.element, [&](auto type) {
      const auto* const from = static_cast<const decltype(type)*>(w_.data) + k + row_;
      for_samples<n>(k, [&](int j) { w[j] = widen(from[j * rows_]); });
    });
  }

  template <int n>
  __device__ void add_products(const Quad<A>& g, const Quad<T> (&tile)[n], A (&dots)[n]) const {
#pragma unroll
    for (int j = 0; j < n; ++j) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        dots[j] = fma(g.value[i], widen(tile[j].value[i]), dots[j]);
      }
    }
  }

  // Sums over all rows, for the threads of each of them.
  __device__ void add_rows(Quad<A>& sums) const {
    for (int places = lanes_; places < kWarp; places *= 2) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        sums.value[i] += __shfl_xor_sync(kAllLanes, sums.value[i], places);
      }
    }
    if constexpr (kThreads > kWarp) add_warps(sums, lane_, team_.lane < lanes_);
  }

  const Team<kThreads>& team_;
  const int C_, lanes_, lane_, row_, rows_;
  const int64_t stride_;  // from a sample of a row to its next one
  const int64_t begin_, end_;
  const Values w_;
  const T* const f_;
};

// ---- what kernels do with a ray

// features = sum_s w_s f_s
template <class T>
struct Rendering {
  using A = accumulator<T>;

  FeatureShape shape;
  Values w;     // [P]
  const T* f;   // [P, C]
  A* features;  // [R, C]

  template <int kThreads>
  __device__ void of_ray(const Team<kThreads>& team, const PackedRay& ray) const {
    const auto body = [&]<Layout layout>() {
      const Features<kThreads, layout, T> samples(team, shape, ray, w, f);
      samples.for_pieces([&](int first) {
        Quad<T> tile[samples.kDepth];
        Quad<A> sums;
        samples.add_up(first, tile, sums);
        if (samples.is_first_row()) samples.write(features + ray.index * shape.C, first, sums);
      });
    };
    with_layout(shape.C, body, f);
  }
};

// d_w_s = <d_features, f_s>, d_f_s = w_s d_features
template <class T>
struct RenderingGradients {
  using A = accumulator<T>;

  FeatureShape shape;
  const A* d_features;  // [R, C]
  Values w;             // [P]
  const T* f;           // [P, C]
  MutableValues d_w;    // [P]
  T* d_f;               // [P, C] or null

  template <int kThreads>
  __device__ void of_ray(const Team<kThreads>& team, const PackedRay& ray) const {
    const auto body = [&]<Layout layout>() {
      Features<kThreads, layout, T>(team, shape, ray, w, f)
          .spread(d_features + ray.index * shape.C, A(1), d_w, d_f);
    };
    with_layout(shape.C, body, f, d_f, d_features);
  }
};

// ---- dense rays, of S samples: a warp owns a short one, a block a long one

template <int kThreads, class Work>
__device__ void do_dense_ray(int64_t R, int64_t S, const Work& work) {
  const Team<kThreads> team;
  const int64_t r = int64_t{blockIdx.x} * (kBlock / kThreads) + team.index;
  if (r < R) work.of_ray(team, {r, r * S, (r + 1) * S});
}

// Starts one of two kernels, that of warps or that of blocks.
template <class Work>
void launch_dense(cudaStream_t stream, void (*of_warps)(int64_t, int64_t, Work),
                  void (*of_blocks)(int64_t, int64_t, Work), int64_t R, int64_t S,
                  const std::type_identity_t<Work>& work) {
  const bool is_short = S <= work.shape.short_ray();
  const int64_t rays = is_short ? kBlock / kWarp : 1;
  launch({(R + rays - 1) / rays, kBlock, 0, stream}, is_short ? of_warps : of_blocks, R, S, work);
}

}  // namespace rayfuse
