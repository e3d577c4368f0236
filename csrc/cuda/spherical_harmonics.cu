// Colours of splats, the formulas of csrc/cpu/spherical_harmonics.cpp: color_d = sum_k Y_k(u)
// coeff_kd with u = dir / |dir|, of C cameras that share the coefficients. A block owns some splats
// and has their coefficients in shared memory, up to 32 channels of them; a thread a harmonic
// series, then a value. Backward, with g the gradient of a colour, in the order of cameras:
// d_coeff_kd = sum_c Y_k g_d, a thread a coefficient; then d_dir = (d_u - <d_u, u> u) / |dir| with
// d_u = sum_k <coeff_k, g> grad Y_k. docs/splats.md
#include <cfloat>

#include "launch.h"
#include "rays.h"
#include "../math/spherical_harmonics.h"

namespace rayfuse {
namespace {

constexpr int kThreads = 128;
constexpr int kMostSplats = 64;
constexpr int kMostChannels = 32;
// Several blocks fit into a multiprocessor.
constexpr int kTileBytes = 24 << 10;

template <class T, class F>
struct Splats {
  using A = accumulator<T>;

  const T* dirs;      // [R, C, N, 3]
  const F* coeffs;    // [R, N, K, D]
  const bool* masks;  // [R, C, N] or null
  int64_t R, C, N, K, D, degree;
  // how blocks divide them: so many splats, and channels, at a time
  int splats, channels;

  Splats(const T* dirs, const F* coeffs, const bool* masks, int64_t R, int64_t C, int64_t N,
         int64_t K, int64_t D, int64_t degree)
      : dirs(dirs), coeffs(coeffs), masks(masks), R(R), C(C), N(N), K(K), D(D), degree(degree) {
    channels = static_cast<int>(D < kMostChannels ? D : kMostChannels);
    const int fitting = kTileBytes / static_cast<int>(sizeof(A)) / (splat_stride() + Y_stride());
    splats = fitting < 1 ? 1 : fitting < kMostSplats ? fitting : kMostSplats;
  }

  __host__ __device__ int harmonics() const { return count_harmonics(static_cast<int>(degree)); }
  // Odd, so that what threads read of different splats, or harmonics, is in different banks.
  __host__ __device__ int k_stride() const { return channels | 1; }
  __host__ __device__ int splat_stride() const { return harmonics() * k_stride() | 1; }
  __host__ __device__ int Y_stride() const { return harmonics() | 1; }

  int64_t blocks() const { return R * ((N + splats - 1) / splats); }
  int64_t chunks() const { return (D + kMostChannels - 1) / kMostChannels; }
  size_t shared_bytes() const {
    const int values = splats * (splat_stride() + Y_stride() + k_stride() + 1);
    return (values + 2 * chip_size<T>(3 * splats)) * sizeof(A);
  }
};

// Numbers i = (s K + k) D + d that a thread has in turn, taken apart without a division for each.
class Walk {
 public:
  int i = threadIdx.x, s, k, d;

  __device__ Walk(int K, int D)
      : s(i / D / K),
        k(i / D % K),
        d(i % D),
        K_(K),
        D_(D),
        step_s_(kThreads / D / K),
        step_k_(kThreads / D % K),
        step_d_(kThreads % D) {}

  __device__ void next() {
    i += kThreads;
    d += step_d_;
    const bool carry_d = d >= D_;
    if (carry_d) d -= D_;
    k += step_k_ + carry_d;
    const bool carry_k = k >= K_;
    if (carry_k) k -= K_;
    s += step_s_ + carry_k;
  }

 private:
  const int K_, D_, step_s_, step_k_, step_d_;
};

// The splats of a block, and what is on chip of them.
template <class T, class F>
class Tile {
 public:
  using A = accumulator<T>;

  const Splats<T, F>& all;
  int64_t r, first;  // row, and number of the first splat in it
  int count;         // splats
  int d0 = 0, channels = 0;
  A *coeffs, *Y, *g;  // [splats][harmonics][channels], [splats][harmonics], [splats][channels]

  __device__ Tile(const Splats<T, F>& all, int64_t block) : all(all) {
    const int64_t of_row = (all.N + all.splats - 1) / all.splats;
    r = block / of_row;
    first = block % of_row * all.splats;
    count = static_cast<int>(min(all.N - first, int64_t{all.splats}));
    coeffs = reinterpret_cast<A*>(shared_memory);
    dirs_ = coeffs, coeffs += 2 * chip_size<T>(3 * all.splats);
    Y = coeffs + all.splats * all.splat_stride();
    g = Y + all.splats * all.Y_stride();
    wanted_ = g + all.splats * all.k_stride();
  }

  __device__ void go_to_channels(int64_t from) {
    d0 = static_cast<int>(from);
    channels = static_cast<int>(min(all.D - from, int64_t{all.channels}));
  }
  // The first splat as a camera sees it, in [R, C, N].
  __device__ int64_t seen_from(int64_t c) const { return (r * all.C + c) * all.N + first; }
  __device__ bool is_seen(int64_t at) const { return !all.masks || all.masks[at]; }
  // Coefficient 0 of a splat's, in [R, N, K, D].
  __device__ int64_t coefficients_of(int s) const {
    return (r * all.N + first + s) * all.K * all.D + d0;
  }
  __device__ A& coeff(const Walk& w) const {
    return coeffs[w.s * all.splat_stride() + w.k * all.k_stride() + w.d];
  }

  // Of splats that no camera sees nothing is read.
  __device__ void load_coeffs() const {
    for (int s = threadIdx.x; s < count; s += kThreads) {
      bool wanted = !all.masks;
      for (int64_t c = 0; c < all.C && !wanted; ++c) wanted = is_seen(seen_from(c) + s);
      wanted_[s] = wanted;
    }
    __syncthreads();
    for (Walk w(all.harmonics(), channels); w.s < count; w.next()) {
      coeff(w) =
          wanted_[w.s] != 0 ? widen(all.coeffs[coefficients_of(w.s) + w.k * all.D + w.d]) : A(0);
    }
  }
  __device__ void load_gradients(const A* d_colors, int64_t at) const {
    for (Walk w(1, channels); w.s < count; w.next()) {
      const int64_t splat = at + w.s;
      g[w.s * all.k_stride() + w.d] = is_seen(splat) ? d_colors[splat * all.D + d0 + w.d] : A(0);
    }
  }

  // The directions of a camera; the block meets before and after it.
  __device__ const A* load_dirs(int64_t at) const {
    A* const chip = on_chip(dirs_, all.dirs + 3 * at);
    __syncthreads();
    load(all.dirs + 3 * at, chip, 3 * count);
    __syncthreads();
    return chip;
  }
  // Room for as many gradients of them.
  __device__ A* room_for_gradients(const T* d_dirs, int64_t at) const {
    return on_chip(dirs_ + chip_size<T>(3 * all.splats), d_dirs + 3 * at);
  }

 private:
  A *dirs_, *wanted_;
};

// A unit vector, 0 for a direction without length or a splat that is masked.
template <class A>
struct Unit {
  A x = 0, y = 0, z = 0, length = 1;
  bool somewhere = false;

  __device__ Unit(const A* dir, bool seen) {
    if (!seen) return;
    const A length2 = dir[0] * dir[0] + dir[1] * dir[1] + dir[2] * dir[2];
    if (length2 < (sizeof(A) == 8 ? A(DBL_MIN) : A(FLT_MIN))) return;
    somewhere = true;
    length = sqrt(length2);
    x = dir[0] / length, y = dir[1] / length, z = dir[2] / length;
  }
};

// The harmonics of all splats as a camera sees them.
template <class T, class F>
__device__ void write_harmonics(const Tile<T, F>& tile, int64_t at) {
  using A = accumulator<T>;
  const A* const dirs = tile.load_dirs(at);
  for (int s = threadIdx.x; s < tile.count; s += kThreads) {
    const Unit<A> u(dirs + 3 * s, tile.is_seen(at + s));
    A* const Y = tile.Y + s * tile.all.Y_stride();
    harmonics<A>(tile.all.degree, u.x, u.y, u.z, Y);
  }
}

template <class T, class F>
__global__ void __launch_bounds__(kThreads)
    spherical_harmonics_fwd_kernel(const Splats<T, F> splats, int64_t chunks,
                                   accumulator<T>* colors)  // [R, C, N, D]
{
  using A = accumulator<T>;
  Tile<T, F> tile(splats, blockIdx.x / chunks);
  tile.go_to_channels(blockIdx.x % chunks * kMostChannels);
  tile.load_coeffs();
  for (int64_t c = 0; c < splats.C; ++c) {
    const int64_t at = tile.seen_from(c);
    write_harmonics(tile, at);
    __syncthreads();
    for (Walk w(1, tile.channels); w.s < tile.count; w.next()) {
      A sum = 0;
      for (w.k = 0; w.k < splats.harmonics(); ++w.k) {
        sum += tile.Y[w.s * splats.Y_stride() + w.k] * tile.coeff(w);
      }
      w.k = 0;
      colors[(at + w.s) * splats.D + tile.d0 + w.d] = tile.is_seen(at + w.s) ? sum : A(0);
    }
  }
}

template <class T, class F>
__device__ void write_d_coeffs(Tile<T, F>& tile, const accumulator<T>* d_colors, F* d_coeffs) {
  using A = accumulator<T>;
  const auto& all = tile.all;
  for (int64_t d = 0; d < all.D; d += kMostChannels) {
    tile.go_to_channels(d);
    for (int64_t c = 0; c < all.C; ++c) {
      const int64_t at = tile.seen_from(c);
      write_harmonics(tile, at);
      tile.load_gradients(d_colors, at);
      __syncthreads();
      for (Walk w(all.harmonics(), tile.channels); w.s < tile.count; w.next()) {
        const A sum = (c ? tile.coeff(w) : A(0)) +
                      tile.Y[w.s * all.Y_stride() + w.k] * tile.g[w.s * all.k_stride() + w.d];
        if (c + 1 < all.C) {
          tile.coeff(w) = sum;
        } else {
          d_coeffs[tile.coefficients_of(w.s) + w.k * all.D + w.d] = narrow<F>(sum);
        }
      }
    }
    const int from = all.C ? all.harmonics() : 0, beyond = static_cast<int>(all.K) - from;
    if (beyond == 0) continue;
    for (Walk w(beyond, tile.channels); w.s < tile.count; w.next()) {
      d_coeffs[tile.coefficients_of(w.s) + (from + w.k) * all.D + w.d] = narrow<F>(0);
    }
  }
}

template <class T, class F>
__device__ void write_d_dirs(Tile<T, F>& tile, const accumulator<T>* d_colors, T* d_dirs) {
  using A = accumulator<T>;
  const auto& all = tile.all;
  for (int64_t c = 0; c < all.C; ++c) {
    const int64_t at = tile.seen_from(c);
    const A* const dirs = tile.load_dirs(at);
    for (Walk w(1, all.harmonics()); w.s < tile.count; w.next()) {
      tile.Y[w.s * all.Y_stride() + w.d] = 0;
    }
    for (int64_t d = 0; d < all.D; d += kMostChannels) {
      tile.go_to_channels(d);
      __syncthreads();
      if (c == 0 || all.D > kMostChannels) tile.load_coeffs();
      tile.load_gradients(d_colors, at);
      __syncthreads();
      for (Walk w(1, all.harmonics()); w.s < tile.count; w.next()) {
        const A* const coeff = tile.coeffs + w.s * all.splat_stride() + w.d * all.k_stride();
        A sum = 0;
        for (int j = 0; j < tile.channels; ++j) sum += coeff[j] * tile.g[w.s * all.k_stride() + j];
        tile.Y[w.s * all.Y_stride() + w.d] += sum;
      }
    }
    __syncthreads();
    A* const d_chip = tile.room_for_gradients(d_dirs, at);
    for (int s = threadIdx.x; s < tile.count; s += kThreads) {
      const bool seen = tile.is_seen(at + s);
      const Unit<A> u(dirs + 3 * s, seen);
      const A* const d_Y = tile.Y + s * all.Y_stride();
      A d_x = 0, d_y = 0, d_z = 0;
      add_gradient<A>(all.degree, u.x, u.y, u.z, d_Y, d_x, d_y, d_z);
      const A along = d_x * u.x + d_y * u.y + d_z * u.z;
      d_chip[3 * s] = u.somewhere ? (d_x - along * u.x) / u.length : A(0);
      d_chip[3 * s + 1] = u.somewhere ? (d_y - along * u.y) / u.length : A(0);
      d_chip[3 * s + 2] = u.somewhere ? (d_z - along * u.z) / u.length : A(0);
    }
    __syncthreads();
    store(d_dirs + 3 * at, d_chip, 3 * tile.count);
  }
}

template <class T, class F>
__global__ void __launch_bounds__(kThreads)
    spherical_harmonics_bwd_kernel(const Splats<T, F> splats,
                                   const accumulator<T>* d_colors,  // [R, C, N, D]
                                   T* d_dirs,                       // [R, C, N, 3] or null
                                   F* d_coeffs)                     // [R, N, K, D] or null
{
  Tile<T, F> tile(splats, blockIdx.x);
  if (d_coeffs) write_d_coeffs(tile, d_colors, d_coeffs);
  if (d_dirs) write_d_dirs(tile, d_colors, d_dirs);
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"
#include "../narrow.h"

namespace rayfuse {
namespace {

template <class T, class F>
Splats<T, F> splats(const Tensor& dirs, const Tensor& coeffs, const std::optional<Tensor>& masks,
                    int64_t degree) {
  const int64_t dims = dirs.dim();
  int64_t R = count_rays(dirs, 3), C = dirs.size(dims - 3), N = dirs.size(dims - 2);
  // rows of one camera lie end to end
  if (C == 1) N *= std::exchange(R, 1);
  return {data<T>(dirs),         data<F>(coeffs), data<bool>(masks), R, C, N, coeffs.size(dims - 2),
          coeffs.size(dims - 1), degree};
}

Tensor fwd(const Tensor& dirs, const Tensor& coeffs, const std::optional<Tensor>& masks,
           int64_t degree) {
  const Device device(dirs);
  std::vector<int64_t> sizes = leading_sizes(dirs, 1);
  sizes.push_back(coeffs.size(coeffs.dim() - 1));
  Tensor colors = empty(dirs, sizes, accumulator_dtype(dirs));
  dispatch_beside(dirs, coeffs, [&](auto type, auto coeff_type) {
    using T = decltype(type);
    using F = decltype(coeff_type);
    const auto all = splats<T, F>(dirs, coeffs, masks, degree);
    launch({all.blocks() * all.chunks(), kThreads, all.shared_bytes(), device.stream()},
           spherical_harmonics_fwd_kernel<T, F>, all, all.chunks(),
           mutable_data<accumulator<T>>(colors));
  });
  return colors;
}

std::tuple<Tensor, Tensor> bwd(const Tensor& d_colors, const Tensor& dirs, const Tensor& coeffs,
                               const std::optional<Tensor>& masks, int64_t degree, int64_t needs) {
  const Device device(dirs);
  Tensor d_dirs = empty_gradient(dirs, needs, 0), d_coeffs = empty_gradient(coeffs, needs, 1);
  dispatch_beside(dirs, coeffs, [&](auto type, auto coeff_type) {
    using T = decltype(type);
    using F = decltype(coeff_type);
    const auto all = splats<T, F>(dirs, coeffs, masks, degree);
    launch({all.blocks(), kThreads, all.shared_bytes(), device.stream()},
           spherical_harmonics_bwd_kernel<T, F>, all, data<accumulator<T>>(d_colors),
           mutable_data<T>(d_dirs), mutable_data<F>(d_coeffs));
  });
  return {d_dirs, d_coeffs};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("spherical_harmonics", TORCH_BOX(&fwd));
  m.impl("spherical_harmonics_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
