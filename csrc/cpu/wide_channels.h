// Channels of splats that fill registers: along the lanes, as they lie in memory. A few neighbours
// of a row are taken at once, for which a splat's channels are loaded once, and splats that none of
// them sees are passed over: of 64 splats a tile, half as many products are left as a row has.
#pragma once

#include "tile.h"

namespace rayfuse {

template <class T>
class WideChannels {
 public:
  using A = accumulator<T>;
  using Pixels = Row<A>;

  explicit WideChannels(const Tile<T>& tile) : tile_(tile) {}

  // Writes the sums over splats, weighted, of a row that was weighed; `past_cache` where registers
  // are aligned.
  void blend(int64_t row, A* image, bool past_cache) {  // [I, H, W, D]
    tile_.transmittance.store_to(passing_);
    for_each_piece([&](auto registers, int pixel, int64_t d) {
      blend<registers>(pixel, row + pixel, d, image, past_cache);
    });
  }

  // Adds a row's gradients, weighted, to those of its splats, and finds its shades.
  void add(int64_t row,
           const A* d_image,  // [I, H, W, D] or null
           A* d_colors) {     // [listed, wide]
    shades_.assign(tile_.count(), Pixels{});
    if (!d_image) return;
    for_each_piece([&](auto registers, int pixel, int64_t d) {
      add<registers>(pixel, d, d_image + (row + pixel) * tile_.scene.D + d, d_colors + d);
    });
  }
  // <c, g> of splat i and each pixel that sees it.
  const Pixels& shade(int i) const { return shades_[i]; }

 private:
  static constexpr int kNeighbours = 4;
  // of channels, whose sums, times the neighbours, leave room for others
  static constexpr int kRegisters = kVectorBytes == 64 ? 4 : 2;

  template <class F>
  void for_each_piece(const F& f) {
    const int n = tile_.count();
    seen_.resize(n);
    met_.resize(n + 1);  // one is written beyond the last
    for (int i = 0; i < n; ++i) {
      uint32_t passed_over = 0;
      for (int p = 0; p < Pixels::kParts; ++p) {
        passed_over |= lanes_up_to(tile_.weight[i].part[p], vec<A>{}) << p * kLanes<A>;
      }
      seen_[i] = ~passed_over & ((1u << tile_.columns) - 1);
    }
    for (int pixel = 0; pixel < tile_.columns; pixel += kNeighbours) {
      met_count_ = 0;
      for (int i = 0; i < n; ++i) {
        met_[met_count_] = i;
        met_count_ += (seen_[i] >> pixel & ((1u << kNeighbours) - 1)) != 0;
      }
      int64_t d = 0;
      for (; d + kRegisters * kLanes<A> <= tile_.wide; d += kRegisters * kLanes<A>) {
        f(std::integral_constant<int, kRegisters>(), pixel, d);
      }
      for (; d < tile_.wide; d += kLanes<A>) f(std::integral_constant<int, 1>(), pixel, d);
    }
  }

  const A* weights(int i, int pixel) const {
    return reinterpret_cast<const A*>(&tile_.weight[i]) + pixel;
  }

  // n registers of channels, from d on.
  template <int n>
  void blend(int pixel, int64_t index, int64_t d, A* image, bool past_cache) const {
    vec<A> sum[kNeighbours][n] = {};
    for (int k = 0; k < met_count_; ++k) {
      const A* const color = tile_.color(met_[k]) + d;
      const A* const weight = weights(met_[k], pixel);
      vec<A> channels[n];
      for (int j = 0; j < n; ++j) channels[j] = load(color + j * kLanes<A>);
      for (int p = 0; p < kNeighbours; ++p) {
        for (int j = 0; j < n; ++j) sum[p][j] += weight[p] * channels[j];
      }
    }
    const Scene<T>& scene = tile_.scene;
    // unrolled, or the sums would go through memory
#pragma GCC unroll 4
    for (int p = 0; p < kNeighbours; ++p) {
      if (pixel + p >= tile_.columns) break;
      const A* const background =
          scene.background ? scene.background_at(tile_.image, index + p) + d : nullptr;
      A* const out = image + (index + p) * scene.D + d;
      for (int j = 0; j < n; ++j) {
        vec<A> x = sum[p][j];
        if (background) x += passing_[pixel + p] * load(background + j * kLanes<A>);
        past_cache ? stream(out + j * kLanes<A>, x) : store(out + j * kLanes<A>, x);
      }
    }
  }

  template <int n>
  void add(int pixel, int64_t d, const A* d_pixels, A* d_colors) {
    vec<A> g[kNeighbours][n];
    for (int p = 0; p < kNeighbours; ++p) {
      const A* const d_pixel = d_pixels + p * tile_.scene.D;
      for (int j = 0; j < n; ++j) {
        g[p][j] = pixel + p < tile_.columns ? load(d_pixel + j * kLanes<A>) : vec<A>{};
      }
    }
    for (int k = 0; k < met_count_; ++k) {
      const int i = met_[k];
      const A* const color = tile_.color(i) + d;
      const A* const weight = weights(i, pixel);
      A* const d_color = d_colors + tile_.place(i) * tile_.wide;
      vec<A> shade[kNeighbours] = {};
      for (int j = 0; j < n; ++j) {
        const vec<A> channels = load(color + j * kLanes<A>);
        vec<A> sum = load(d_color + j * kLanes<A>);
        for (int p = 0; p < kNeighbours; ++p) {
          shade[p] += channels * g[p][j];
          sum += weight[p] * g[p][j];
        }
        store(d_color + j * kLanes<A>, sum);
      }
      A* const shades = reinterpret_cast<A*>(&shades_[i]) + pixel;
      for (int p = 0; p < kNeighbours; p += kRays<A>) {
        const auto rows = each_column<A>([&](int r) { return shade[p + r]; });
        auto sums = lane128<0>(sum_rows<A>(rows)), before = sums;
        std::memcpy(&before, shades + p, sizeof before);
        sums += before;
        std::memcpy(shades + p, &sums, sizeof sums);
      }
    }
  }

  const Tile<T>& tile_;
  std::vector<uint32_t> seen_;  // the pixels that see each splat of the row
  std::vector<int> met_;        // the splats that some neighbours see
  int met_count_ = 0;
  std::vector<Pixels> shades_;
  A passing_[kRow];
};

}  // namespace rayfuse
