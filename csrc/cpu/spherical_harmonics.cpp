// Colours of splats: color_d = sum_k Y_k(u) coeff_kd with u = dir / |dir|, of C cameras that share
// the coefficients. One thread owns kLanes splats at a time, a splat a lane: their coefficients are
// transposed once, for all cameras. Backward, with g the gradient of a colour, in the order of
// cameras: d_coeff_kd = sum_c Y_k g_d, d_dir = (d_u - <d_u, u> u) / |dir| with
// d_u = sum_k <coeff_k, g> grad Y_k. docs/splats.md
#include "prefetch.h"
#include "rows.h"
#include "square_root.h"
#include "triples.h"
#include "../math/spherical_harmonics.h"

#include <limits>
#include <vector>

namespace rayfuse {
namespace {

template <class T, class F>
struct Splats {
  using A = accumulator<T>;

  const T* dirs;      // [R, C, N, 3]
  const F* coeffs;    // [R, N, K, D]
  const bool* masks;  // [R, C, N] or null
  int64_t R, C, N, K, D, degree;

  int64_t harmonics() const { return count_harmonics(degree); }
  // Those of a splat that count.
  int64_t coefficients() const { return harmonics() * D; }
  int64_t blocks_of_row() const { return (N + kLanes<A> - 1) / kLanes<A>; }
  int64_t blocks() const { return R * blocks_of_row(); }
};

// What splats behind these read and write, by 16 bytes of a row at a time, which would wait for
// memory. Into the second level: into the first one gradients took up to 1.7 times as long.
template <class F>
void prefetch_later(const F* p, int64_t values) {
  prefetch<false, 2>(p, values);
}

// Splats n .. n + count of row r.
template <class A>
struct Place {
  int64_t r, n;
  int count;

  template <class T, class F>
  Place(const Splats<T, F>& splats, int64_t block)
      : r(block / splats.blocks_of_row()),
        n(block % splats.blocks_of_row() * kLanes<A>),
        count(static_cast<int>(std::min<int64_t>(kLanes<A>, splats.N - n))) {}
};

// They as a camera sees them; those that are masked have a direction of length 0.
template <class A>
class View {
 public:
  const int64_t at;  // the first of them in [R, C, N]
  bool any = true;
  vec<A> x, y, z, length, Y[count_harmonics(kMostDegree)];

  template <class T, class F>
  View(const Splats<T, F>& splats, const Place<A>& place, int64_t c)
      : at((place.r * splats.C + c) * splats.N + place.n), degree_(splats.degree) {
    if (splats.masks) {
      A lanes[kLanes<A>] = {};
      for (int i = 0; i < place.count; ++i) lanes[i] = splats.masks[at + i];
      seen_ = load(lanes);
      any = lanes_up_to(seen_, vec<A>{}) != kAllLanes<A>;
      if (!any) return;
    }
    prefetch_later(splats.dirs + 3 * (at + kLanes<A>), 3 * kLanes<A>);
    const Triples<A> dirs = by_component(load_triples(splats.dirs + 3 * at, place.count));
    x = selected(dirs.part[0]), y = selected(dirs.part[1]), z = selected(dirs.part[2]);
    const vec<A> length2 = x * x + y * y + z * z;
    nowhere_ = length2 < std::numeric_limits<A>::min() ? broadcast(A(1)) : vec<A>{};
    length = nowhere_ != 0 ? broadcast(A(1)) : square_root(length2);
    x = unless_nowhere(x / length), y = unless_nowhere(y / length), z = unless_nowhere(z / length);
    harmonics<A>(degree_, x, y, z, Y);
  }

  vec<A> selected(vec<A> value) const { return seen_ != 0 ? value : vec<A>{}; }

  Triples<A> d_dirs(const vec<A>* d_Y) const {
    vec<A> d_x = {}, d_y = {}, d_z = {};
    add_gradient<A>(degree_, x, y, z, d_Y, d_x, d_y, d_z);
    const vec<A> along = d_x * x + d_y * y + d_z * z;
    const auto across = [&](vec<A> d, vec<A> u) {
      return selected(unless_nowhere((d - along * u) / length));
    };
    return by_vector<A>(across(d_x, x), across(d_y, y), across(d_z, z));
  }

 private:
  vec<A> unless_nowhere(vec<A> value) const { return nowhere_ != 0 ? vec<A>{} : value; }

  const int64_t degree_;
  vec<A> seen_ = broadcast(A(1)), nowhere_;
};

// Calls f(first channel, how many) until it has all: three at a time, which have one sum each.
template <class F>
void for_channels(int64_t D, const F& f) {
  int64_t d = 0;
  for (; d + 3 <= D; d += 3) f(d, std::integral_constant<int, 3>());
  for (; d < D; ++d) f(d, std::integral_constant<int, 1>());
}

// Those of the splats at a place.
template <class T, class F, class A>
void load_coefficients(const Splats<T, F>& splats, const Place<A>& place, vec<A>* coeffs) {
  const int64_t stride = splats.K * splats.D, block = kLanes<A> * stride;
  const F* const rows = splats.coeffs + (place.r * splats.N + place.n) * stride;
  prefetch_later(rows + 2 * block, block);
  Rows<const F>{rows, stride, place.count}.load_to(coeffs, splats.coefficients());
}

// Rows of D values that lie end to end, to a register for each of D, and back.
template <class A>
void load_channels(const A* rows, int64_t D, int count, vec<A>* channels) {
  if (D != 3) return Rows<const A>{rows, D, count}.load_to(channels, D);
  const Triples<A> x = by_component(load_triples(rows, count));
  for (int d = 0; d < 3; ++d) channels[d] = x.part[d];
}
template <class A>
void store_channels(A* rows, int64_t D, int count, const vec<A>* channels) {
  if (D != 3) return Rows<A>{rows, D, count}.store_from(channels, D);
  store_triples(rows, by_vector<A>(channels[0], channels[1], channels[2]), count);
}

// Blocks begin..end of kLanes splats.
template <class T, class F, class A>
RAYFUSE_KERNEL void colors(int64_t begin, int64_t end, const Splats<T, F>& splats,
                           A* colors) {  // [R, C, N, D]
  const int64_t D = splats.D, harmonics = splats.harmonics();
  std::vector<vec<A>> coeffs(splats.coefficients()), color(D);
  for (int64_t block = begin; block < end; ++block) {
    const Place<A> place(splats, block);
    bool loaded = false;
    for (int64_t c = 0; c < splats.C; ++c) {
      const View<A> view(splats, place, c);
      if (!view.any) {
        std::fill_n(colors + view.at * D, place.count * D, A(0));
        continue;
      }
      if (!std::exchange(loaded, true)) load_coefficients(splats, place, coeffs.data());
      for_channels(D, [&](int64_t d, auto width) {
        vec<A> sum[width] = {};
        for (int64_t k = 0; k < harmonics; ++k) {
          for (int j = 0; j < width; ++j) sum[j] += view.Y[k] * coeffs[k * D + d + j];
        }
        for (int j = 0; j < width; ++j) color[d + j] = view.selected(sum[j]);
      });
      store_channels(colors + view.at * D, D, place.count, color.data());
    }
  }
}

// Blocks begin..end of kLanes splats.
template <class T, class F, class A>
RAYFUSE_KERNEL void gradients(int64_t begin, int64_t end, const Splats<T, F>& splats,
                              const A* d_colors,  // [R, C, N, D]
                              T* d_dirs,          // [R, C, N, 3] or null
                              F* d_coeffs) {      // [R, N, K, D] or null
  const int64_t D = splats.D, harmonics = splats.harmonics(), stride = splats.K * D;
  std::vector<vec<A>> coeffs(splats.coefficients()), d_coeff(splats.coefficients()), g(D);
  for (int64_t block = begin; block < end; ++block) {
    const Place<A> place(splats, block);
    const int64_t first = place.r * splats.N + place.n;
    if (d_coeffs) prefetch_later(d_coeffs + (first + kLanes<A>)*stride, kLanes<A> * stride);
    std::fill(d_coeff.begin(), d_coeff.end(), vec<A>{});
    bool loaded = false;
    for (int64_t c = 0; c < splats.C; ++c) {
      const View<A> view(splats, place, c);
      if (!view.any) {
        if (d_dirs) std::fill_n(d_dirs + 3 * view.at, 3 * place.count, narrow<T>(0));
        continue;
      }
      load_channels(d_colors + view.at * D, D, place.count, g.data());
      for (vec<A>& d_color : g) d_color = view.selected(d_color);
      if (d_coeffs) {
        for_channels(D, [&](int64_t d, auto width) {
          for (int64_t k = 0; k < harmonics; ++k) {
            for (int j = 0; j < width; ++j) d_coeff[k * D + d + j] += view.Y[k] * g[d + j];
          }
        });
      }
      if (!d_dirs) continue;
      if (!std::exchange(loaded, true)) load_coefficients(splats, place, coeffs.data());
      vec<A> d_Y[count_harmonics(kMostDegree)];
      std::fill_n(d_Y, harmonics, vec<A>{});
      for_channels(D, [&](int64_t d, auto width) {
        for (int64_t k = 0; k < harmonics; ++k) {
          for (int j = 0; j < width; ++j) d_Y[k] += coeffs[k * D + d + j] * g[d + j];
        }
      });
      store_triples(d_dirs + 3 * view.at, view.d_dirs(d_Y), place.count);
    }
    if (!d_coeffs) continue;
    const Rows<F> rows{d_coeffs + first * stride, stride, place.count};
    rows.store_from(d_coeff.data(), splats.coefficients());
    for (int i = 0; i < place.count; ++i) {
      std::fill(rows[i] + splats.coefficients(), rows[i] + stride, narrow<F>(0));
    }
  }
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

// Calls f(first block, last block + 1) on torch's threads.
template <class T, class F, class Work>
void for_blocks(const Splats<T, F>& splats, const Work& f) {
  const int64_t values = (splats.coefficients() + splats.C * splats.D) * kLanes<accumulator<T>>;
  const int64_t grain = std::max<int64_t>((1 << 14) / std::max<int64_t>(values, 1), 1);
  torch::stable::parallel_for(0, splats.blocks(), grain, f);
}

Tensor fwd(const Tensor& dirs, const Tensor& coeffs, const std::optional<Tensor>& masks,
           int64_t degree) {
  std::vector<int64_t> sizes = leading_sizes(dirs, 1);
  sizes.push_back(coeffs.size(coeffs.dim() - 1));
  Tensor out = empty(dirs, sizes, accumulator_dtype(dirs));
  dispatch_beside(dirs, coeffs, [&](auto type, auto coeff_type) {
    using T = decltype(type);
    const auto all = splats<T, decltype(coeff_type)>(dirs, coeffs, masks, degree);
    const auto to = mutable_data<accumulator<T>>(out);
    for_blocks(all, [&](int64_t begin, int64_t end) { colors(begin, end, all, to); });
  });
  return out;
}

std::tuple<Tensor, Tensor> bwd(const Tensor& d_colors, const Tensor& dirs, const Tensor& coeffs,
                               const std::optional<Tensor>& masks, int64_t degree, int64_t needs) {
  Tensor d_dirs = empty_gradient(dirs, needs, 0), d_coeffs = empty_gradient(coeffs, needs, 1);
  dispatch_beside(dirs, coeffs, [&](auto type, auto coeff_type) {
    using T = decltype(type);
    using F = decltype(coeff_type);
    const auto all = splats<T, F>(dirs, coeffs, masks, degree);
    const auto* const g = data<accumulator<T>>(d_colors);
    T* const to_dirs = mutable_data<T>(d_dirs);
    F* const to_coeffs = mutable_data<F>(d_coeffs);
    for_blocks(all, [&](int64_t begin, int64_t end) {
      gradients(begin, end, all, g, to_dirs, to_coeffs);
    });
  });
  return {d_dirs, d_coeffs};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("spherical_harmonics", TORCH_BOX(&fwd));
  m.impl("spherical_harmonics_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
