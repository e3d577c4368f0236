// The features f [S, C] of a block's rays, on chip a tile of samples at a time: their sums with the
// weights w [S], and what the gradients g [C] of these give back, d_w_s = <g, f_s>, d_f_s = w_s g.
// A block owns one ray, or several short ones that lie end to end as one list of samples.
#pragma once

#include "launch.h"
#include "rays.h"

#include <algorithm>

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

// ---- how a kernel goes over the rays

// Values of f on chip at once: 16 KB.
template <class A>
constexpr int kTileValues = 16384 / sizeof(A);
// Blocks of several rays take half of that, so that there are more of them.
template <class A>
constexpr int kSharedTileValues = kTileValues<A> / 2;
constexpr int kMaxRays = 32;
constexpr int kMaxTileSamples = 1024;

struct Shape {
  int64_t R, S;
  int C;
  int rays;     // of a block
  int samples;  // of a tile
  int columns;  // threads side by side at the sums of all rays and channels, before a group repeats
  int groups;   // of columns, each with some of the samples
  int lanes;    // threads that share a sum over channels

  template <class A>
  static Shape of(int64_t R, int64_t S, int64_t C) {
    const auto at_most = [](int64_t x, int64_t most) {
      return static_cast<int>(std::max<int64_t>(std::min(x, most), 1));
    };
    Shape shape = {R, S, static_cast<int>(C), 1, 1, 1, 1, 1};
    shape.rays = at_most(kSharedTileValues<A> / std::max<int64_t>(S * C, 1), kMaxRays);
    shape.samples = at_most(kTileValues<A> / std::max<int64_t>(C, 1), kMaxTileSamples);
    if (shape.rays > 1 && shape.rays * S > shape.samples) {
      shape.rays = at_most(shape.samples / S, kMaxRays);
    }
    const int64_t sums = shape.rays * C;
    while (shape.columns < sums && shape.columns < kBlock) shape.columns *= 2;
    shape.groups = kBlock / shape.columns;
    if (shape.groups == 1) shape.columns = static_cast<int>(sums);
    while (shape.lanes < C && shape.lanes < kWarp) shape.lanes *= 2;
    return shape;
  }

  // Whether the sums over samples do not fit on chip: then they are in global memory.
  template <class A>
  __host__ __device__ bool is_wide() const {
    return C > kTileValues<A>;
  }
  __host__ __device__ int sums() const { return groups > 1 ? kBlock : columns; }
  template <class A>
  __host__ __device__ int sums_on_chip() const {
    return is_wide<A>() ? 0 : (sums() + 3) / 4 * 4;
  }

  template <class A>
  size_t shared_bytes() const {
    const int f = chip_size<half>(samples * std::min(C, kTileValues<A>));
    return (sums_on_chip<A>() + f + 2 * chip_size<half>(samples)) * sizeof(A);
  }
  template <class A>
  Grid grid(cudaStream_t stream) const {
    return {(R + rays - 1) / rays, kBlock, shared_bytes<A>(), stream};
  }
};

// Samples row .. row + rows of the block's list, with their channels from c on.
template <class A>
struct Tile {
  int64_t row;
  int rows, c, channels;
  const A *w, *f;  // [rows], [rows, channels]
};

template <int kThreads, class T>
class Features {
 public:
  using A = accumulator<T>;

  const int64_t first;  // ray
  const int count;      // of rays
  A* const sums;        // [count, C]

  // `wide_sums` [R, C] is where the sums go that do not fit on chip.
  __device__ Features(const Shape& shape, const Values& w, const T* f, A* wide_sums)
      : first(int64_t{blockIdx.x} * shape.rays),
        count(static_cast<int>(min(shape.R - first, int64_t{shape.rays}))),
        sums(shape.is_wide<A>() ? wide_sums + first * shape.C
                                : reinterpret_cast<A*>(shared_memory)),
        shape_(shape),
        w_(w),
        f_(f),
        w_chip_(reinterpret_cast<A*>(shared_memory) + shape.sums_on_chip<A>()),
        d_w_chip_(w_chip_ + chip_size<half>(shape.samples)),
        f_chip_(d_w_chip_ + chip_size<half>(shape.samples)) {}

  // Calls f(i, c) for the sums of all rays and channels; i counts them from the first ray's on.
  template <class F>
  __device__ void for_sums(const F& f) const {
    for (int i = threadIdx.x; i < count * shape_.C; i += kThreads) f(i, i % shape_.C);
  }

  // sums = sum_s w_s f_s, for all threads.
  __device__ void add_up() {
    const int C = shape_.C, all = shape_.sums();
    if (C == 0) return;
    for (int i = threadIdx.x; i < all; i += kThreads) sums[i] = 0;
    for_tiles(true, [&](const Tile<A>& tile) {
      for (int i = threadIdx.x; i < all; i += kThreads) {
        const int column = i % shape_.columns, group = i / shape_.columns;
        const int ray = column / C, c = column % C - tile.c;
        if (ray >= count || c < 0 || c >= tile.channels) continue;
        const int begin = static_cast<int>(max(ray * shape_.S - tile.row, int64_t{0}));
        const int end = static_cast<int>(min((ray + 1) * shape_.S - tile.row, int64_t{tile.rows}));
        A sum = 0;
        for (int s = begin + group; s < end; s += shape_.groups) {
          sum += tile.w[s] * tile.f[s * tile.channels + c];
        }
        sums[i] += sum;
      }
    });
    __syncthreads();
    if (shape_.groups > 1) {
      for_sums([&](int i, int) {
        A sum = 0;
        for (int group = 0; group < shape_.groups; ++group) sum += sums[group * shape_.columns + i];
        sums[i] = sum;
      });
      __syncthreads();
    }
  }

  // d_w_s = <g, f_s>, d_f_s = w_s g
  __device__ void spread(const A* g,  // [count, C]
                         const MutableValues& d_w, T* d_f) {
    for_tiles(d_w.data, [&](const Tile<A>& tile) {
      const int64_t row = first * shape_.S + tile.row;
      if (d_f) store_d_f(tile, g, d_f + row * shape_.C + tile.c);
      if (!d_w.data) return;
      with_type<A>(d_w.element, [&](auto type) {
        using W = decltype(type);
        W* const to = static_cast<W*>(d_w.data) + row;
        A* const d_w_here = on_chip(d_w_chip_, static_cast<const W*>(to));
        sum_over(
            tile.rows, tile.channels,
            [&](int s, int c) {
              return g[ray_of(tile, s) * shape_.C + tile.c + c] * tile.f[s * tile.channels + c];
            },
            [&](int s, A sum) { d_w_here[s] = tile.c ? d_w_here[s] + sum : sum; });
        __syncthreads();
        if (tile.c + tile.channels == shape_.C) store(to, d_w_here, tile.rows);
      });
    });
  }

  // Calls result(row, sum of value(row, i) over i < n) for some rows.
  template <class V, class F>
  __device__ void sum_over(int rows, int n, const V& value, const F& result) const {
    const int lanes = shape_.lanes, lane = threadIdx.x % lanes;
    for (int begin = 0; begin < rows; begin += kThreads / lanes) {
      const int row = begin + threadIdx.x / lanes;
      A sum = 0;
      for (int i = lane; row < rows && i < n; i += lanes) sum += value(row, i);
      for (int places = lanes / 2; places > 0; places /= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, places);
      }
      if (row < rows && lane == 0) result(row, sum);
    }
  }

 private:
  // Calls body(tile) for all tiles, for all threads; without f where it is not wanted.
  template <class F>
  __device__ void for_tiles(bool with_f, const F& body) {
    const int64_t rows = count * shape_.S;
    for (int64_t row = 0; row < rows; row += shape_.samples) {
      Tile<A> tile = {
          row, static_cast<int>(min(rows - row, int64_t{shape_.samples})), 0, 0, nullptr, nullptr};
      with_type<A>(w_.element, [&](auto type) {
        using W = decltype(type);
        const W* const from = static_cast<const W*>(w_.data) + first * shape_.S + row;
        A* const w_here = on_chip(w_chip_, from);
        load(from, w_here, tile.rows);
        tile.w = w_here;
      });
      // one piece, but for rows that are longer than a tile
      do {
        tile.channels = min(shape_.C - tile.c, kTileValues<A>);
        const T* const from = f_ + (first * shape_.S + row) * shape_.C + tile.c;
        A* const f_here = on_chip(f_chip_, from);
        if (with_f && !is_there_) load(from, f_here, tile.rows * tile.channels);
        tile.f = f_here;
        __syncthreads();
        body(tile);
        __syncthreads();
        tile.c += tile.channels;
      } while (tile.c < shape_.C);
    }
    is_there_ = with_f && rows <= shape_.samples && shape_.C <= kTileValues<A>;
  }

  __device__ int ray_of(const Tile<A>& tile, int s) const {
    return count > 1 ? static_cast<int>(tile.row + s) / static_cast<int>(shape_.S) : 0;
  }

  __device__ void store_d_f(const Tile<A>& tile, const A* g,
                            T* to) const {  // [tile.rows, tile.channels]
    const auto value = [&](int s, int c) {
      return narrow<T>(tile.w[s] * g[ray_of(tile, s) * shape_.C + tile.c + c]);
    };
    for_each_vector(
        static_cast<const T*>(to), tile.rows * tile.channels,
        [&](int i) { to[i] = value(i / tile.channels, i % tile.channels); },
        [&](int i) {
          Vector<T> x;
          int s = i / tile.channels, c = i % tile.channels;
#pragma unroll
          for (int j = 0; j < Vector<T>::kLanes; ++j) {
            x.value[j] = value(s, c);
            if (++c == tile.channels) c = 0, ++s;
          }
          __stwb(reinterpret_cast<uint4*>(to + i), x.bits);
        });
  }

  const Shape shape_;
  const Values w_;
  const T* const f_;
  A *const w_chip_, *const d_w_chip_, *const f_chip_;
  // the only tile
  bool is_there_ = false;
};

}  // namespace rayfuse
