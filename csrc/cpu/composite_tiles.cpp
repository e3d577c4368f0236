// Tile compositing: per pixel alpha_i = min(o_i e^-sigma_i, max_alpha) for the splats i of its
// tile's list, w_i = alpha_i T_i with T_{i+1} = T_i (1 - alpha_i); image = sum_i w_i c_i + T bg,
// alpha = 1 - T, depth = sum_i w_i z_i / alpha, median = z_i of the last i with T_i > 1/2.
// One thread owns a tile and goes through it by rows of 16 pixels: a row's list holds the splats
// that reach it, T stays in registers along the list, and channels are a matrix product of weights.
// Backward: a row's weights once more, kept in cache, then from the last splat to the first with
// u_i, what lies behind splat i: d_alpha_i = T_i (<c_i, g> - u_i), u_{i-1} = u_i + alpha_i
// (<c_i, g> - u_i). Sums of a splat over its tile meet in the order of tiles. docs/splats.md
#include "explog.h"
#include "rays.h"
#include "../math/composite_tiles.h"

#include <cmath>
#include <vector>

namespace rayfuse {
namespace {

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
  vec<A> sum() const {
    vec<A> total = part[0];
    for (int p = 1; p < kParts; ++p) total += part[p];
    return total;
  }
  void store_to(A* row) const {
    for (int p = 0; p < kParts; ++p) store(row + p * kLanes<A>, part[p]);
  }
  static Row load_from(const A* row) {
    return each([&](int p) { return load(row + p * kLanes<A>); });
  }
};

// A splat with sigma in powers of 2: log2 alpha = log_opacity + dx (a dx + b dy) + c dy^2.
template <class A>
struct Splat {
  A x, y, a, b, c, log_opacity;
};

// A tile, the splats of its list, and which of them reach which row.
template <class T>
class Tile {
 public:
  using A = accumulator<T>;
  using Pixels = Row<A>;

  const Scene<T>& scene;
  const int64_t C;  // channels
  // the list is `listed` long, of which a masked tile has none
  int64_t image = 0, x = 0, y = 0, begin = 0, listed = 0, n = 0;
  int rows = 0, columns = 0;
  // along the list of the row that was weighed
  std::vector<Pixels> weight, alpha;
  Pixels transmittance = {}, opacity = {}, pixel_x = {};

  explicit Tile(const Scene<T>& scene)
      : scene(scene), C(scene.channels()), log_min_(std::log2(scene.min_alpha)) {}

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
    if (n > static_cast<int64_t>(splats_.size())) {
      splats_.resize(n);
      color_.resize(n * C);
      weight.resize(n);
      alpha.resize(n);
      list_.resize(n * scene.size);
    }
    const A first = static_cast<A>(x) + scene.center;
    A centers[kRow];
    for (int i = 0; i < kRow; ++i) centers[i] = first + i;
    pixel_x = Pixels::load_from(centers);
    for (int r = 0; r < rows; ++r) reach_[r] = 0;
    for (int64_t k = 0; k < n; ++k) {
      gather(k);
      enlist(static_cast<int>(k), first, first + (columns - 1));
    }
  }

  // How many of the splats of a row its pixels met before all of them ended.
  int count() const { return count_; }
  const Splat<A>& splat(int i) const { return splats_[here_[i]]; }
  const A* color(int i) const { return &color_[here_[i] * C]; }
  int place(int i) const { return here_[i]; }
  // Of pixel i of the row, where in its list the median is; -1 if it met nothing.
  int median(int i) const { return halfway_[i / kLanes<A>][i % kLanes<A>]; }
  // Where a row begins in an image of one value.
  int64_t index(int r) const { return (image * scene.H + y + r) * scene.W + x; }
  A dy(int r, const Splat<A>& s) const { return s.y - (static_cast<A>(y + r) + scene.center); }

  // Fills weight, alpha where it is to be kept, transmittance, opacity: the sum of weights, as
  // 1 - transmittance would have lost digits where it is small, and if wanted the median.
  template <bool keep>
  void weigh(int r, bool median) {
    median ? weigh<keep, true>(r) : weigh<keep, false>(r);
  }

  // Sums of `width` channels from d on, weighted.
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
    int64_t d = 0;
    for (; d + 4 <= C; d += 4) blend<4>(d, sums);
    if (C - d == 1) blend<1>(d, sums);
    if (C - d == 2) blend<2>(d, sums);
    if (C - d == 3) blend<3>(d, sums);
  }

 private:
  template <bool keep, bool to_half>
  void weigh(int r) {
    here_ = &list_[r * n];
    // negative in pixels that have ended
    Pixels passing = Pixels::each([](int) { return broadcast(A(1)); });
    opacity = {};
    lane_index<A> halfway[Pixels::kParts];
    for (auto& part : halfway) part = lane_index<A>{} - 1;
    count_ = reach_[r];
    for (int i = 0; i < count_; ++i) {
      const Splat<A> s = splat(i);
      const A dy = this->dy(r, s), slope = s.b * dy, rest = s.c * dy * dy + s.log_opacity;
      uint32_t ended = kAllLanes<A>;
      for (int p = 0; p < Pixels::kParts; ++p) {
        const vec<A> dx = s.x - pixel_x.part[p];
        const vec<A> log_alpha = dx * (s.a * dx + slope) + rest;
        const vec<A> most = exp2_of_moderate<A>(log_alpha);
        const vec<A> capped = most < scene.max_alpha ? most : broadcast(scene.max_alpha);
        const vec<A> here =
            (log_alpha >= log_min_) & (log_alpha <= s.log_opacity) ? capped : vec<A>{};
        const vec<A> before = passing.part[p], after = before * (1 - here);
        const auto goes_on = after > scene.ending;
        passing.part[p] = goes_on ? after : before > 0 ? -before : before;
        const vec<A> own = goes_on ? here * before : vec<A>{};
        weight[i].part[p] = own;
        opacity.part[p] += own;
        if constexpr (keep) alpha[i].part[p] = goes_on ? here : vec<A>{};
        if constexpr (to_half) {
          const auto early = (own > 0) & (before > A(0.5));
          halfway[p] = early ? lane_index<A>{} + i : halfway[p];
        }
        ended &= lanes_up_to(passing.part[p], vec<A>{});
      }
      if (ended == kAllLanes<A>) count_ = i + 1;
    }
    if constexpr (to_half) std::copy_n(halfway, Pixels::kParts, halfway_);
    transmittance = Pixels::each([&](int p) { return magnitude<A>(passing.part[p]); });
  }

  void gather(int64_t k) {
    const int64_t id = scene.ids[begin + k];
    const A *mean = scene.means2d + 2 * id, *conic = scene.conics + 3 * id;
    const A opacity = scene.opacities[id];
    A* const color = &color_[k * C];
    // what is not finite, times 0, is NaN
    A nothing = 0 * (mean[0] + mean[1] + conic[0] + conic[1] + conic[2] + opacity);
    for (int64_t d = 0; d < scene.D; ++d) {
      color[d] = widen(scene.colors[id * scene.D + d]);
      nothing += 0 * color[d];
    }
    if (scene.depths) {
      color[scene.D] = scene.depths[id];
      nothing += 0 * color[scene.D];
    }
    const bool seen = nothing == 0 && opacity >= scene.min_alpha;
    splats_[k] = {mean[0],
                  mean[1],
                  -kLog2E<A> / 2 * conic[0],
                  -kLog2E<A> * conic[1],
                  -kLog2E<A> / 2 * conic[2],
                  seen ? std::log2(opacity) : -std::numeric_limits<A>::infinity()};
  }

  // Adds splat k to the lists of the rows that it may reach: those where log2 alpha is large enough
  // at its best point between two pixel centers.
  void enlist(int k, A left, A right) {
    const Splat<A> s = splats_[k];
    if (s.log_opacity < log_min_) return;
    // what rounding may take from log2 alpha is less than this
    constexpr A kSlack = A(0.01), kSlackOfC = 64 * std::numeric_limits<A>::epsilon();
    A up[kLanes<A>];
    for (int i = 0; i < kLanes<A>; ++i) up[i] = i;
    for (int r = 0; r < rows; r += kLanes<A>) {
      const vec<A> dy = s.y - (load(up) + (static_cast<A>(y + r) + scene.center));
      const vec<A> vertex = dy * (s.b / (-2 * s.a));
      const vec<A> dx = clamp<A>(vertex, s.x - right, s.x - left), curve = s.c * dy * dy;
      const vec<A> best = dx * (s.a * dx + s.b * dy) + curve + s.log_opacity;
      const vec<A> bound = log_min_ - kSlack + kSlackOfC * curve;
      uint32_t reached = s.a < 0 ? lanes_up_to(bound, best) : kAllLanes<A>;
      if (rows - r < kLanes<A>) reached &= (1u << (rows - r)) - 1;
      for (; reached; reached &= reached - 1) {
        const int row = r + __builtin_ctz(reached);
        list_[row * n + reach_[row]++] = k;
      }
    }
  }

  const A log_min_;
  std::vector<Splat<A>> splats_;
  std::vector<A> color_;
  // the lists of all rows, and how long they are
  std::vector<int> list_;
  int reach_[kRow];
  const int* here_ = nullptr;
  int count_ = 0;
  lane_index<A> halfway_[Pixels::kParts];
};

// Tiles first..last.
template <class T>
RAYFUSE_KERNEL void composite(int64_t first, int64_t last, const Scene<T>& scene,
                              accumulator<T>* image,     // [I, H, W, D]
                              accumulator<T>* opacity,   // [I, H, W]
                              accumulator<T>* depth,     // [I, H, W]
                              accumulator<T>* median) {  // [I, H, W]
  using A = accumulator<T>;
  Tile<T> tile(scene);
  const int64_t D = scene.D;
  std::vector<A> sums(tile.C * kRow);
  A passing[kRow], met[kRow];
  for (int64_t t = first; t < last; ++t) {
    tile.go_to(t);
    for (int r = 0; r < tile.rows; ++r) {
      tile.template weigh<false>(r, scene.depths);
      tile.blend_all(sums.data());
      tile.transmittance.store_to(passing);
      tile.opacity.store_to(met);
      const int64_t row = tile.index(r);
      for (int i = 0; i < tile.columns; ++i) {
        const A* const background = scene.background_at(tile.image, row + i);
        for (int64_t d = 0; d < D; ++d) {
          const A behind = background ? passing[i] * background[d] : A(0);
          image[(row + i) * D + d] = sums[d * kRow + i] + behind;
        }
        opacity[row + i] = met[i];
        const bool far = scene.depths && met[i] > 0;
        depth[row + i] = far ? sums[D * kRow + i] / met[i] : A(0);
        median[row + i] = far ? tile.color(tile.median(i))[D] : A(0);
      }
    }
  }
}

// A row's gradients, as they are needed along its list.
template <class T>
struct RowGradients {
  using A = accumulator<T>;
  using Pixels = Row<A>;

  std::vector<A> channels;  // [C, kRow]
  Pixels behind = {};       // u of the last splat

  // Also adds to, or writes, the gradient of the background, where it is wanted.
  void gather(const Tile<T>& tile, int r, const Incoming<A>& d, A* d_background) {
    const Scene<T>& scene = tile.scene;
    const int64_t D = scene.D;
    channels.assign(tile.C * kRow, 0);
    A passing[kRow], met[kRow], behinds[kRow] = {};
    tile.transmittance.store_to(passing);
    tile.opacity.store_to(met);
    std::vector<A>& distance = distance_;
    if (scene.depths && d.depth) {
      distance.resize(tile.C * kRow);
      tile.template blend<1>(D, distance.data());
    }
    const int64_t row = tile.index(r);
    for (int i = 0; i < tile.columns; ++i) {
      const A* const background = scene.background_at(tile.image, row + i);
      A through = d.opacity ? -d.opacity[row + i] : A(0);
      if (d.image) {
        const A* const d_image = d.image + (row + i) * D;
        for (int64_t c = 0; c < D; ++c) {
          channels[c * kRow + i] = d_image[c];
          if (background) through += background[c] * d_image[c];
        }
        if (d_background) {
          A* const out = d_background + (scene.background_of_pixels ? (row + i) * D : 0);
          for (int64_t c = 0; c < D; ++c) {
            const A d_c = passing[i] * d_image[c];
            out[c] = scene.background_of_pixels ? d_c : out[c] + d_c;
          }
        }
      }
      if (scene.depths && d.depth && met[i] > 0) {
        const A d_sum = d.depth[row + i] / met[i];
        channels[D * kRow + i] = d_sum;
        through += d_sum * (distance[D * kRow + i] / met[i]);
      }
      behinds[i] = through;
    }
    behind = Pixels::load_from(behinds);
  }

 private:
  std::vector<A> distance_;
};

// Tiles first..last.
template <class T>
RAYFUSE_KERNEL void gradients(int64_t first, int64_t last, const Scene<T>& scene,
                              const Incoming<accumulator<T>>& d_outputs,
                              accumulator<T>* partial,         // [M, sums]
                              accumulator<T>* d_background) {  // [tiles, D], [I, H, W, D] or null
  using A = accumulator<T>;
  using Pixels = Row<A>;
  Tile<T> tile(scene);
  RowGradients<T> row;
  const int64_t C = tile.C, moments = scene.moments(), width = scene.sums();
  const A* const d_median = scene.depths ? d_outputs.median : nullptr;
  std::vector<vec<A>> sums;
  for (int64_t t = first; t < last; ++t) {
    tile.go_to(t);
    sums.assign(tile.n * width, vec<A>{});
    A* const d_own =
        d_background ? d_background + (scene.background_of_pixels ? 0 : t * scene.D) : nullptr;
    if (d_own && !scene.background_of_pixels) std::fill(d_own, d_own + scene.D, A(0));
    for (int r = 0; r < tile.rows; ++r) {
      tile.template weigh<true>(r, d_median);
      row.gather(tile, r, d_outputs, d_own);
      for (int i = 0; d_median && i < tile.columns; ++i) {
        const int median = tile.median(i);
        if (median < 0) continue;
        sums[tile.place(median) * width + moments + scene.D][0] += d_median[tile.index(r) + i];
      }
      const A* const g = row.channels.data();
      Pixels behind = row.behind;
      for (int i = tile.count() - 1; i >= 0; --i) {
        const Splat<A>& s = tile.splat(i);
        const A* const color = tile.color(i);
        const A dy = tile.dy(r, s);
        const Pixels w = tile.weight[i];
        vec<A>* const sum = &sums[tile.place(i) * width];
        Pixels shade = {};
        for (int64_t c = 0; c < C; ++c) {
          vec<A> d_color = sum[moments + c];
          for (int p = 0; p < Pixels::kParts; ++p) {
            const vec<A> g_c = load(g + c * kRow + p * kLanes<A>);
            shade.part[p] += color[c] * g_c;
            d_color += w.part[p] * g_c;
          }
          sum[moments + c] = d_color;
        }
        vec<A> h = {}, h_x = {}, h_xx = {};
        Pixels each;
        for (int p = 0; p < Pixels::kParts; ++p) {
          const vec<A> alpha = tile.alpha[i].part[p], excess = shade.part[p] - behind.part[p];
          behind.part[p] += alpha * excess;
          const vec<A> own = alpha < scene.max_alpha ? w.part[p] * excess : vec<A>{};
          const vec<A> dx = s.x - tile.pixel_x.part[p];
          each.part[p] = own;
          h += own;
          h_x += own * dx;
          h_xx += own * dx * dx;
        }
        sum[0] += h;
        sum[1] += h_x;
        sum[2] += h_xx;
        sum[3] += dy * h;
        sum[4] += dy * h_x;
        sum[5] += dy * dy * h;
        if (!scene.absolute) continue;
        for (int p = 0; p < Pixels::kParts; ++p) {
          const vec<A> dx = s.x - tile.pixel_x.part[p];
          sum[kMoments] += magnitude<A>(each.part[p] * (2 * s.a * dx + s.b * dy) / kLog2E<A>);
          sum[kMoments + 1] += magnitude<A>(each.part[p] * (s.b * dx + 2 * s.c * dy) / kLog2E<A>);
        }
      }
    }
    A* const out = partial + tile.begin * width;
    for (int64_t i = 0; i < tile.n * width; ++i) out[i] = sum_lanes<A>(sums[i]);
    std::fill(out + tile.n * width, out + tile.listed * width, A(0));
  }
}

// Splats first..last, from the sums of the tiles that have them: places[starts[p]..starts[p+1]].
template <class T>
RAYFUSE_KERNEL void add_up(int64_t first, int64_t last, const Scene<T>& scene,
                           const int64_t* starts, const int64_t* places,
                           const accumulator<T>* partial,  // [M, sums]
                           const Outgoing<T>& out) {
  using A = accumulator<T>;
  const int64_t D = scene.D, moments = scene.moments(), width = scene.sums();
  std::vector<A> sum(width);
  for (int64_t p = first; p < last; ++p) {
    std::fill(sum.begin(), sum.end(), A(0));
    for (int64_t k = starts[p]; k < starts[p + 1]; ++k) {
      const A* const part = partial + places[k] * width;
      for (int64_t i = 0; i < width; ++i) sum[i] += part[i];
    }
    out.write(scene, p, starts[p] < starts[p + 1], sum[0], sum[1], sum[2], sum[3], sum[4], sum[5]);
    if (out.colors) {
      for (int64_t d = 0; d < D; ++d) out.colors[p * D + d] = narrow<T>(sum[moments + d]);
    }
    if (out.depths) out.depths[p] = sum[moments + D];
    if (out.absolute) std::copy_n(&sum[kMoments], 2, out.absolute + 2 * p);
  }
}

// Of the background of images, tile by tile.
template <class T>
void add_up_tiles(const Scene<T>& scene, const accumulator<T>* of_tiles,  // [tiles, D]
                  accumulator<T>* d_background) {                         // [I, D]
  const int64_t D = scene.D, per_image = scene.Y * scene.X;
  for (int64_t t = 0; t < scene.tiles(); ++t) {
    accumulator<T>* const sum = d_background + t / per_image * D;
    for (int64_t d = 0; d < D; ++d) sum[d] += of_tiles[t * D + d];
  }
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"
#include "../tiles.h"

namespace rayfuse {
namespace {

// Here a look at all values costs no synchronisation, and wrong ones would lead out of bounds.
void check_lists(const Tensor& tile_offsets, const Tensor& flatten_ids, int64_t P) {
  const auto* const offsets = data<int64_t>(tile_offsets);
  const auto* const ids = data<int64_t>(flatten_ids);
  const int64_t tiles = tile_offsets.numel(), M = flatten_ids.numel();
  const auto fail = [](const char* rule, int64_t got) {
    throw std::runtime_error(std::string("composite_tiles: ") + rule + ", got " +
                             std::to_string(got));
  };
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t least = t ? offsets[t - 1] : 0, most = t ? M : 0;
    if (offsets[t] < least || offsets[t] > most) {
      fail("tile_offsets must rise from 0 to the length of flatten_ids", offsets[t]);
    }
  }
  for (int64_t m = 0; m < M; ++m) {
    if (ids[m] < 0 || ids[m] >= P) fail("flatten_ids must be indices of splats", ids[m]);
  }
}

// Calls f(first tile, last tile + 1) on torch's threads, for about as much work each.
template <class T, class F>
void for_tiles(const Scene<T>& scene, const F& f) {
  // a tile costs as much as this many splats before it has any
  constexpr int64_t kTileWork = 8;
  const int64_t tiles = scene.tiles();
  const auto first_from = [&](int64_t work) {
    int64_t begin = 0, end = tiles;
    while (begin < end) {
      const int64_t t = begin + (end - begin) / 2;
      if (scene.offsets[t] + t * kTileWork < work) {
        begin = t + 1;
      } else {
        end = t;
      }
    }
    return begin;
  };
  torch::stable::parallel_for(
      0, scene.M + tiles * kTileWork, 1 << 8,
      [&](int64_t begin, int64_t end) { f(first_from(begin), first_from(end)); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fwd(
    const Tensor& means2d, const Tensor& conics, const Tensor& colors, const Tensor& opacities,
    const Tensor& tile_offsets, const Tensor& flatten_ids, const MaybeTensor& depths,
    const MaybeTensor& background, const MaybeTensor& masks, const MaybeTensor& absgrad,
    int64_t image_width, int64_t image_height, int64_t tile_size, double max_alpha,
    double min_alpha, double min_transmittance, double pixel_center, bool stop_at_min) {
  check_lists(tile_offsets, flatten_ids, means2d.size(0));
  const TileCall call{means2d,           conics,       colors,     opacities, tile_offsets,
                      flatten_ids,       depths,       background, masks,     absgrad,
                      image_width,       image_height, tile_size,  max_alpha, min_alpha,
                      min_transmittance, pixel_center, stop_at_min};
  const TileOutputs out(call);
  dispatch(colors, [&](auto type) {
    using A = accumulator<decltype(type)>;
    const auto scene = call.scene<decltype(type)>();
    A *image = mutable_data<A>(out.image), *alpha = mutable_data<A>(out.alpha),
      *depth = mutable_data<A>(out.depth), *median = mutable_data<A>(out.median);
    for_tiles(scene, [&](int64_t first, int64_t last) {
      composite(first, last, scene, image, alpha, depth, median);
    });
  });
  return out.tensors();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
    const MaybeTensor& d_image, const MaybeTensor& d_alpha, const MaybeTensor& d_depth,
    const MaybeTensor& d_median, const Tensor& means2d, const Tensor& conics, const Tensor& colors,
    const Tensor& opacities, const Tensor& tile_offsets, const Tensor& flatten_ids,
    const MaybeTensor& depths, const MaybeTensor& background, const MaybeTensor& masks,
    const MaybeTensor& absgrad, int64_t image_width, int64_t image_height, int64_t tile_size,
    double max_alpha, double min_alpha, double min_transmittance, double pixel_center,
    bool stop_at_min, int64_t needs) {
  check_lists(tile_offsets, flatten_ids, means2d.size(0));
  const TileCall call{means2d,           conics,       colors,     opacities, tile_offsets,
                      flatten_ids,       depths,       background, masks,     absgrad,
                      image_width,       image_height, tile_size,  max_alpha, min_alpha,
                      min_transmittance, pixel_center, stop_at_min};
  const TileGradients d(call, needs);
  dispatch(colors, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const auto scene = call.scene<T>(needs);
    const Incoming<A> d_outputs{data<A>(d_image), data<A>(d_alpha), data<A>(d_depth),
                                data<A>(d_median)};
    const auto d_inputs = d.outgoing<T>();
    const Tensor sums = empty(means2d, {scene.M, scene.sums()}, dtype_of(means2d));
    A* const partial = mutable_data<A>(sums);
    A* const d_background = mutable_data<A>(d.background);
    A* const of_tiles = mutable_data<A>(d.background_of_tiles);
    if (d_background) std::fill(d_background, d_background + d.background.numel(), A(0));
    for_tiles(scene, [&](int64_t first, int64_t last) {
      gradients(first, last, scene, d_outputs, partial, of_tiles ? of_tiles : d_background);
    });
    if (of_tiles) add_up_tiles(scene, of_tiles, d_background);
    // where each splat stands in the lists, in order
    const int64_t P = scene.P, M = scene.M;
    std::vector<int64_t> starts(P + 2), places(M);
    for (int64_t m = 0; m < M; ++m) ++starts[scene.ids[m] + 2];
    for (int64_t p = 0; p < P; ++p) starts[p + 2] += starts[p + 1];
    for (int64_t m = 0; m < M; ++m) places[starts[scene.ids[m] + 1]++] = m;
    torch::stable::parallel_for(0, P, 1 << 8, [&](int64_t first, int64_t last) {
      add_up(first, last, scene, starts.data(), places.data(), partial, d_inputs);
    });
  });
  return d.tensors();
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("composite_tiles", TORCH_BOX(&fwd));
  m.impl("composite_tiles_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
