// A tile of an image, the splats of its list, and how much light each of them stops along a row.
#pragma once

#include "explog.h"
#include "rays.h"
#include "../math/composite_tiles.h"

#include <cmath>
#include <vector>

namespace rayfuse {

// The factors of 2^r for |r| <= 1/2: by Taylor's series, or for float with the degree 6 that is
// nearest to it, where the series would need one more.
template <class A>
constexpr auto kExp2Factors = [] {
  std::array<A, ExpLog<A>::kExpTerms + 2> out;
  double term = 1;
  for (size_t k = 0; k < out.size(); term *= 0x1.62e42fefa39efp-1 / ++k) out[k] = A(term);
  return out;
}();
template <>
constexpr std::array<float, 7> kExp2Factors<float> = {
    1, 0x1.62e43p-1, 0x1.ebfbep-3, 0x1.c6aeccp-5, 0x1.3b29d8p-7, 0x1.5f48c8p-10, 0x1.446c7ep-13};

// 2^x where that is a normal number, at two thirds of the cost of exp; nonsense elsewhere.
template <class A>
vec<A> exp2_of_moderate(vec<A> x) {
  const vec<A> rounded = x + kRounder<A>;
  const vec<A> power = polynomial<A>(x - (rounded - kRounder<A>), kExp2Factors<A>);
  return (vec<A>)(bits_of<A>(power) + (bits_of<A>(rounded) << kMantissaBits<A>));
}

template <class A>
constexpr A kLog2E = A(0x1.71547652b82fep+0);

template <class A>
vec<A> magnitude(vec<A> x) {
  return x < 0 ? -x : x;
}

// Pixels of a row that are in registers at once.
constexpr int kRow = 16;
// Splats from the one that is taken to the one whose values are sent for. They lie anywhere: the
// wait for them was a fifth of a forward on garden. 4 ahead it takes 3 to 7 % longer, 32 ahead the
// same.
constexpr int kAhead = 16;

template <class A>
struct Row {
  static constexpr int kParts = kRow / kLanes<A>;
  vec<A> part[kParts];

  // f(0), f(1), ... of the parts, unrolled.
  template <class F>
  static Row each(const F& f) {
    return [&]<int... p>(std::integer_sequence<int, p...>) {
      return Row{{f(p)...}};
    }(std::make_integer_sequence<int, kParts>());
  }
  // A copy that does not go through the stack, in pieces that loads have to wait for.
  Row in_registers() const {
    return each([&](int p) { return part[p]; });
  }
  void store_to(A* row) const {
    for (int p = 0; p < kParts; ++p) store(row + p * kLanes<A>, part[p]);
  }
  static Row load_from(const A* row) {
    return each([&](int p) { return load(row + p * kLanes<A>); });
  }
  // The first n of them; the others are 0.
  void store_to(A* row, int n) const {
    if (n == kRow) return store_to(row);
    A all[kRow];
    store_to(all);
    std::copy_n(all, n, row);
  }
  static Row load_from(const A* row, int n) {
    if (n == kRow) return load_from(row);
    A all[kRow] = {};
    std::copy_n(row, n, all);
    return load_from(all);
  }
};

// A splat with sigma in powers of 2: log2 alpha = log_opacity + dx (a dx + b dy) + c dy^2, at its
// best for dx = lean dy. One that no pixel sees has log_opacity -infinity.
template <class A>
struct alignas(8 * sizeof(A)) Splat {
  A x, y, a, b, c, lean, log_opacity;
};

// Splats first..last, as all their tiles take them.
template <class T>
RAYFUSE_KERNEL void prepare(int64_t first, int64_t last, const Scene<T>& scene,
                            Splat<accumulator<T>>* splats) {  // [P]
  using A = accumulator<T>;
  for (int64_t p = first; p < last; ++p) {
    const A *mean = scene.means2d + 2 * p, *conic = scene.conics + 3 * p;
    const A opacity = scene.opacities[p];
    // what is not finite, times 0, is NaN
    A nothing = 0 * (mean[0] + mean[1] + conic[0] + conic[1] + conic[2] + opacity);
    for (int64_t d = 0; d < scene.D; ++d) nothing += 0 * widen(scene.colors[p * scene.D + d]);
    if (scene.depths) nothing += 0 * scene.depths[p];
    if (nothing == 0 && opacity >= scene.min_alpha) {
      const A a = -kLog2E<A> / 2 * conic[0], b = -kLog2E<A> * conic[1];
      const A c = -kLog2E<A> / 2 * conic[2];
      splats[p] = {mean[0], mean[1], a, b, c, b / (-2 * a), std::log2(opacity)};
    } else {
      splats[p] = {0, 0, 0, 0, 0, 0, -std::numeric_limits<A>::infinity()};
    }
  }
}

// A tile, the splats of its list, and which of them reach which row.
template <class T>
class Tile {
 public:
  using A = accumulator<T>;
  using Pixels = Row<A>;

  const Scene<T>& scene;
  const int64_t C;     // channels
  const int64_t wide;  // of these, the first ones, where many fill registers: along the lanes
  // the list is `listed` long, of which a masked tile has none
  int64_t image = 0, x = 0, y = 0, begin = 0, listed = 0, n = 0;
  int rows = 0, columns = 0;
  // along the list of the row that was weighed
  std::vector<Pixels> weight, alpha;
  Pixels transmittance = {}, opacity = {}, pixel_x = {};

  Tile(const Scene<T>& scene, const Splat<A>* splats)
      : scene(scene),
        C(scene.channels()),
        wide(scene.D / kRow * kRow),
        splats_(splats),
        log_min_(std::log2(scene.min_alpha)) {}

  void go_to(int64_t t) {
    const int64_t per_image = scene.Y * scene.X, place = t % per_image;
    image = t / per_image;
    x = place % scene.X * scene.size;
    y = place / scene.X * scene.size;
    rows = static_cast<int>(std::min(scene.size, scene.H - y));
    columns = static_cast<int>(std::min(scene.size, scene.W - x));
    begin = scene.offsets[t];
    listed = scene.list_end(t) - begin;
    n = scene.masks && !scene.masks[t] ? 0 : listed;
    if (n > static_cast<int64_t>(list_.size())) {
      list_.resize(n);
      color_.resize(n * C);
      weight.resize(n);
      alpha.resize(n);
      row_lists_.resize(n * scene.size);
    }
    const A first = static_cast<A>(x) + scene.center;
    A centers[kRow];
    for (int i = 0; i < kRow; ++i) centers[i] = first + i;
    pixel_x = Pixels::load_from(centers);
    for (int r = 0; r < rows; ++r) reach_[r] = 0;
    for (int64_t k = 0; k < n; ++k) {
      if (begin + k + kAhead < scene.M) prefetch(scene.ids[begin + k + kAhead]);
      gather(k);
      enlist(static_cast<int>(k), first, first + (columns - 1));
    }
  }

  // How many of the splats of a row its pixels met before all of them ended.
  int count() const { return count_; }
  const Splat<A>& splat(int i) const { return list_[here_[i]]; }
  const Splat<A>& in_list(int64_t k) const { return list_[k]; }
  const A* color(int i) const { return color_.data() + here_[i] * C; }
  int place(int i) const { return here_[i]; }
  int64_t id(int i) const { return scene.ids[begin + here_[i]]; }
  // Of pixel i of the row, where in its list the median is; -1 if it met nothing.
  int median(int i) const { return halfway_[i / kLanes<A>][i % kLanes<A>]; }
  // A sum of weighted values as their mean, 0 where nothing was met.
  Pixels per_opacity(const Pixels& sum) const {
    return Pixels::each([&](int p) {
      const vec<A> met = opacity.part[p];
      return met > 0 ? sum.part[p] / met : vec<A>{};
    });
  }
  // Where a row begins in an image of one value.
  int64_t index(int r) const { return (image * scene.H + y + r) * scene.W + x; }
  A dy(int r, const Splat<A>& s) const { return s.y - (static_cast<A>(y + r) + scene.center); }

  // Fills weight, alpha where it is to be kept, transmittance, opacity: the sum of weights, as
  // 1 - transmittance would have lost digits where it is small, and if wanted the median.
  template <bool keep>
  void weigh(int r, bool median) {
    median ? weigh<keep, true>(r) : weigh<keep, false>(r);
  }

  // Sums of `width` channels from d on, weighted; and of all that are not along the lanes.
  template <int width>
  void blend(int64_t d, A* sums) const {  // [C, kRow]
    Pixels sum[width] = {};
    for (int i = 0; i < count_; ++i) {
      const A* const c = color(i) + d;
      for (int j = 0; j < width; ++j) {
        for (int p = 0; p < Pixels::kParts; ++p) sum[j].part[p] += weight[i].part[p] * c[j];
      }
    }
    for (int j = 0; j < width; ++j) sum[j].store_to(sums + (d + j) * kRow);
  }
  void blend_all(A* sums) const {
    int64_t d = wide;
    for (; d + 4 <= C; d += 4) blend<4>(d, sums);
    if (C - d == 1) blend<1>(d, sums);
    if (C - d == 2) blend<2>(d, sums);
    if (C - d == 3) blend<3>(d, sums);
  }

 private:
  // Transmittance before the first splat.
  Pixels begun(int r) const {
    if (!scene.begun) return Pixels::each([](int) { return broadcast(A(1)); });
    return Pixels::load_from(scene.begun + index(r), columns);
  }

  template <bool keep, bool to_half>
  void weigh(int r) {
    here_ = row_lists_.data() + r * n;
    // As no product raises it, a pixel that has ended stays so, and a splat waits for no comparison
    // of the one before it: for a product, and a maximum that spares subnormal numbers.
    Pixels passing = begun(r), left = passing, sum = {};
    lane_index<A> halfway[Pixels::kParts];
    for (auto& part : halfway) part = lane_index<A>{} - 1;
    const vec<A> ending = broadcast(scene.ending), most = broadcast(scene.max_alpha);
    int i = 0;
    for (bool goes_on = true; goes_on && i < reach_[r]; ++i) {
      const Splat<A>& s = splat(i);
      const A dy = this->dy(r, s), slope = s.b * dy, rest = s.c * dy * dy + s.log_opacity;
      uint32_t ended = kAllLanes<A>;
      for (int p = 0; p < Pixels::kParts; ++p) {
        const vec<A> dx = s.x - pixel_x.part[p];
        const vec<A> log_alpha = dx * (s.a * dx + slope) + rest;
        const vec<A> capped = smaller(exp2_of_moderate<A>(log_alpha), most);
        const vec<A> here =
            (log_alpha >= log_min_) & (log_alpha <= s.log_opacity) ? capped : vec<A>{};
        const vec<A> before = passing.part[p], after = before * (1 - here);
        const auto lasts = after > ending;
        passing.part[p] = larger(after, ending);
        left.part[p] = lasts ? after : left.part[p];
        const vec<A> own = lasts ? here * before : vec<A>{};
        weight[i].part[p] = own;
        sum.part[p] += own;
        if constexpr (keep) alpha[i].part[p] = lasts ? here : vec<A>{};
        if constexpr (to_half) {
          const auto early = (own > 0) & (before > A(0.5));
          halfway[p] = early ? lane_index<A>{} + i : halfway[p];
        }
        ended &= lanes_up_to(after, ending);
      }
      goes_on = ended != kAllLanes<A>;
    }
    count_ = i;
    if constexpr (to_half) std::copy_n(halfway, Pixels::kParts, halfway_);
    transmittance = left;
    opacity = sum;
  }

  // What gather will read of a splat. Were it called, g++ would leave it out as without effect.
  __attribute__((always_inline)) void prefetch(int64_t id) const {
    __builtin_prefetch(splats_ + id);
    constexpr int64_t kLine = 64 / sizeof(T);
    const T* const color = scene.colors + id * scene.D;
    for (int64_t d = 0; d < scene.D; d += kLine) __builtin_prefetch(color + d);
    if (scene.depths) __builtin_prefetch(scene.depths + id);
  }

  void gather(int64_t k) {
    const int64_t id = scene.ids[begin + k];
    list_[k] = splats_[id];
    A* const color = color_.data() + k * C;
    for (int64_t d = 0; d < scene.D; ++d) color[d] = widen(scene.colors[id * scene.D + d]);
    if (scene.depths) color[scene.D] = scene.depths[id];
  }

  // Adds splat k to the lists of the rows that it may reach: those where log2 alpha is large enough
  // at its best point between two pixel centers.
  void enlist(int k, A left, A right) {
    const Splat<A>& s = list_[k];
    if (s.log_opacity < log_min_) return;
    // what rounding may take from log2 alpha is less than this
    constexpr A kSlack = A(0.01), kSlackOfC = 64 * std::numeric_limits<A>::epsilon();
    A up[kLanes<A>];
    for (int i = 0; i < kLanes<A>; ++i) up[i] = i;
    uint32_t reached = 0;
    for (int r = 0; r < rows; r += kLanes<A>) {
      const vec<A> dy = s.y - (load(up) + (static_cast<A>(y + r) + scene.center));
      const vec<A> dx = clamp<A>(dy * s.lean, s.x - right, s.x - left), curve = s.c * dy * dy;
      const vec<A> best = dx * (s.a * dx + s.b * dy) + curve + s.log_opacity;
      const vec<A> bound = log_min_ - kSlack + kSlackOfC * curve;
      reached |= (s.a < 0 ? lanes_up_to(bound, best) : kAllLanes<A>) << r;
    }
    // without a branch that would be guessed wrong: what is not reached is overwritten
    for (int r = 0; r < rows; ++r) {
      row_lists_[r * n + reach_[r]] = k;
      reach_[r] += reached >> r & 1;
    }
  }

  const Splat<A>* const splats_;
  const A log_min_;
  std::vector<Splat<A>> list_;
  std::vector<A> color_;
  // the lists of all rows, and how long they are
  std::vector<int> row_lists_;
  int reach_[kRow];
  const int* here_ = nullptr;
  int count_ = 0;
  lane_index<A> halfway_[Pixels::kParts];
};

}  // namespace rayfuse
