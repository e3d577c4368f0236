// Tile compositing: per pixel alpha_i = min(o_i e^-sigma_i, max_alpha) for the splats i of its
// tile's list, w_i = alpha_i T_i with T_{i+1} = T_i (1 - alpha_i); image = sum_i w_i c_i + T bg,
// alpha = 1 - T, depth = sum_i w_i z_i / alpha, median = z_i of the last i with T_i > 1/2.
// One thread owns a tile and goes through it by rows of 16 pixels: a row's list holds the splats
// that reach it, T stays in registers along the list, and channels are a matrix product of weights.
// Backward: a row's weights once more, kept in cache, then from the last splat to the first with
// u_i, what lies behind splat i: d_alpha_i = T_i (<c_i, g> - u_i), u_{i-1} = u_i + alpha_i
// (<c_i, g> - u_i). Sums of a splat over its tile meet in the order of tiles. docs/splats.md
#include "columns.h"
#include "wide_channels.h"

namespace rayfuse {
namespace {

// Between the first n pixels of a row, as they lie in memory, and its channels from `first` on.
template <class A>
void store_pixels(A* pixels, int64_t first, int64_t D, int n,  // [n, D]
                  const A* channels) {                         // [D, kRow]
  if (D == 3) {
    for (int i = 0; i < n; i += kLanes<A>) {
      const Columns<A, 3> columns{load(channels + i), load(channels + kRow + i),
                                  load(channels + 2 * kRow + i)};
      store_columns(pixels + 3 * i, columns, n - i);
    }
    return;
  }
  for (int i = 0; i < n; ++i) {
    for (int64_t d = first; d < D; ++d) pixels[i * D + d] = channels[d * kRow + i];
  }
}
template <class A>
void load_pixels(const A* pixels, int64_t first, int64_t D, int n, A* channels) {
  if (D == 3) {
    for (int i = 0; i < n; i += kLanes<A>) {
      const auto columns = load_columns<3>(pixels + 3 * i, n - i);
      for (int d = 0; d < 3; ++d) store(channels + d * kRow + i, columns.column[d]);
    }
    return;
  }
  for (int i = 0; i < n; ++i) {
    for (int64_t d = first; d < D; ++d) channels[d * kRow + i] = pixels[i * D + d];
  }
}

// Tiles first..last.
template <class T>
RAYFUSE_KERNEL void composite(int64_t first, int64_t last, const Scene<T>& scene,
                              const Splat<accumulator<T>>* splats,  // [P]
                              bool past_cache,
                              accumulator<T>* image,     // [I, H, W, D]
                              accumulator<T>* opacity,   // [I, H, W]
                              accumulator<T>* depth,     // [I, H, W]
                              accumulator<T>* median) {  // [I, H, W]
  using A = accumulator<T>;
  using Pixels = Row<A>;
  Tile<T> tile(scene, splats);
  const int64_t D = scene.D;
  WideChannels<T> wide_channels(tile);
  std::vector<A> sums(tile.C * kRow);
  for (int64_t t = first; t < last; ++t) {
    tile.go_to(t);
    for (int r = 0; r < tile.rows; ++r) {
      tile.template weigh<false>(r, scene.depths);
      tile.blend_all(sums.data());
      const int64_t row = tile.index(r);
      if (tile.wide) wide_channels.blend(row, image, past_cache);
      if (scene.background) {
        A passing[kRow];
        tile.transmittance.store_to(passing);
        for (int i = 0; i < tile.columns; ++i) {
          const A* const background = scene.background_at(tile.image, row + i);
          for (int64_t d = tile.wide; d < D; ++d) sums[d * kRow + i] += passing[i] * background[d];
        }
      }
      store_pixels(image + row * D, tile.wide, D, tile.columns, sums.data());
      tile.opacity.store_to(opacity + row, tile.columns);
      std::fill_n(depth + row, tile.columns, A(0));
      std::fill_n(median + row, tile.columns, A(0));
      if (!scene.depths) continue;
      tile.per_opacity(Pixels::load_from(&sums[D * kRow])).store_to(depth + row, tile.columns);
      for (int i = 0; i < tile.columns; ++i) {
        const int place = tile.median(i);
        if (place >= 0) median[row + i] = tile.color(place)[D];
      }
    }
  }
  if (past_cache) finish_stream();
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
    const int64_t D = scene.D, row = tile.index(r);
    channels.assign(tile.C * kRow, 0);
    behind = {};
    if (d.opacity) {
      behind = Pixels::load_from(d.opacity + row, tile.columns);
      for (auto& part : behind.part) part = -part;
    }
    if (d.image) {
      load_pixels(d.image + row * D, tile.wide, D, tile.columns, channels.data());
      if (scene.background) pass(tile, r, d.image + row * D, d_background);
    }
    if (scene.depths && d.depth) {
      distance_.resize(tile.C * kRow);
      tile.template blend<1>(D, distance_.data());
      const Pixels depth = tile.per_opacity(Pixels::load_from(&distance_[D * kRow]));
      const Pixels d_sum = tile.per_opacity(Pixels::load_from(d.depth + row, tile.columns));
      for (int p = 0; p < Pixels::kParts; ++p) behind.part[p] += d_sum.part[p] * depth.part[p];
      d_sum.store_to(&channels[D * kRow]);
    }
  }

 private:
  // What the background takes part in.
  void pass(const Tile<T>& tile, int r, const A* d_image, A* d_background) {
    const Scene<T>& scene = tile.scene;
    const int64_t D = scene.D, row = tile.index(r);
    A passing[kRow], through[kRow];
    tile.transmittance.store_to(passing);
    behind.store_to(through);
    for (int i = 0; i < tile.columns; ++i) {
      const A *const background = scene.background_at(tile.image, row + i),
                     *d_pixel = d_image + i * D;
      for (int64_t c = 0; c < D; ++c) through[i] += background[c] * d_pixel[c];
      if (!d_background) continue;
      A* const out = d_background + (scene.background_of_pixels ? (row + i) * D : 0);
      for (int64_t c = 0; c < D; ++c) {
        const A d_c = passing[i] * d_pixel[c];
        out[c] = scene.background_of_pixels ? d_c : out[c] + d_c;
      }
    }
    behind = Pixels::load_from(through);
  }

  std::vector<A> distance_;
};

// Of each splat of a tile: over its rows, lane by lane, the sums of h, dy h and dy^2 h, as dx is
// the same in all rows of a lane and can wait until they are done; and others that stand behind the
// moments. Of many channels those that fill registers lie along the lanes, over pixels and rows.
template <class T>
class SplatSums {
 public:
  using A = accumulator<T>;
  using Pixels = Row<A>;

  explicit SplatSums(const Tile<T>& tile)
      : wide_(tile.wide),
        moments_(tile.scene.moments()),
        width_(tile.scene.sums() - wide_),
        sums_(width_),
        added_up_(width_) {}

  void begin(int64_t n) {
    of_h_.assign(3 * n, Pixels{});
    others_.assign((width_ - kMoments) * n, vec<A>{});
    of_wide_.assign(wide_ * n, A(0));
  }
  // Of splat k: h, dy h, dy^2 h.
  Pixels* of_h(int64_t k) { return &of_h_[3 * k]; }
  vec<A>* others(int64_t k) { return others_.data() + (width_ - kMoments) * k; }
  A* of_wide() { return of_wide_.data(); }  // [n, wide]

  void add_up(int64_t k, const Pixels& dx, A* out) {  // [sums]
    const Pixels* const h = of_h(k);
    std::fill_n(sums_.begin(), kMoments, vec<A>{});
    for (int p = 0; p < Pixels::kParts; ++p) {
      const vec<A> x = dx.part[p];
      sums_[0] += h[0].part[p];
      sums_[1] += h[0].part[p] * x;
      sums_[2] += h[0].part[p] * x * x;
      sums_[3] += h[1].part[p];
      sums_[4] += h[1].part[p] * x;
      sums_[5] += h[2].part[p];
    }
    std::copy_n(others(k), width_ - kMoments, sums_.begin() + kMoments);
    // 16 bytes at a time, the last of which may overlap those before them
    A* const added_up = wide_ ? added_up_.data() : out;
    for (int64_t i = 0; i < width_; i += kRays<A>) {
      const int64_t from = std::min(i, width_ - kRays<A>);
      const auto rows = each_column<A>([&](int j) { return sums_[from + j]; });
      const auto sums = lane128<0>(sum_rows<A>(rows));
      std::memcpy(added_up + from, &sums, sizeof sums);
    }
    if (!wide_) return;
    A* const behind = std::copy_n(added_up, moments_, out);
    std::copy_n(added_up + moments_, width_ - moments_,
                std::copy_n(of_wide() + wide_ * k, wide_, behind));
  }

 private:
  const int64_t wide_;             // channels along the lanes
  const int64_t moments_, width_;  // without those
  std::vector<Pixels> of_h_;
  std::vector<vec<A>> others_, sums_;
  std::vector<A> of_wide_, added_up_;
};

// Adds a row that was weighed, from its last splat to the first. C is the number of channels if
// that is known here, so that their gradients stay in registers, else 0.
template <int C, class T>
void add_row(const Tile<T>& tile, int r, const RowGradients<T>& row,
             const WideChannels<T>& wide_channels, SplatSums<T>& sums) {
  using A = accumulator<T>;
  using Pixels = Row<A>;
  const Scene<T>& scene = tile.scene;
  const int64_t channels = C ? C : tile.C, wide = C ? 0 : tile.wide;
  const int64_t absolute = scene.moments() - kMoments;
  const A* const d_channels = row.channels.data();
  Pixels g[C + 1], behind = row.behind;
  for (int c = 0; c < C; ++c) g[c] = Pixels::load_from(d_channels + c * kRow);
  for (int i = tile.count() - 1; i >= 0; --i) {
    const Splat<A>& s = tile.splat(i);
    const A* const color = tile.color(i);
    const A dy = tile.dy(r, s);
    const Pixels w = tile.weight[i].in_registers(), alpha = tile.alpha[i].in_registers();
    Pixels* const of_h = sums.of_h(tile.place(i));
    vec<A>* const others = sums.others(tile.place(i));
    const auto d_channel = [&](int64_t c, int p) {
      return C ? g[c].part[p] : load(d_channels + c * kRow + p * kLanes<A>);
    };
    Pixels shade = {}, h;
    if (wide) shade = wide_channels.shade(i).in_registers();
    for (int64_t c = wide; c < channels; ++c) {
      vec<A>& d_sum = others[absolute + c - wide];
      vec<A> d_color = d_sum;
      for (int p = 0; p < Pixels::kParts; ++p) {
        shade.part[p] += color[c] * d_channel(c, p);
        d_color += w.part[p] * d_channel(c, p);
      }
      d_sum = d_color;
    }
    for (int p = 0; p < Pixels::kParts; ++p) {
      const vec<A> excess = shade.part[p] - behind.part[p];
      behind.part[p] += alpha.part[p] * excess;
      h.part[p] = alpha.part[p] < scene.max_alpha ? w.part[p] * excess : vec<A>{};
      of_h[0].part[p] += h.part[p];
      of_h[1].part[p] += dy * h.part[p];
      of_h[2].part[p] += dy * dy * h.part[p];
    }
    if (!scene.absolute) continue;
    for (int p = 0; p < Pixels::kParts; ++p) {
      const vec<A> dx = s.x - tile.pixel_x.part[p];
      others[0] += magnitude<A>(h.part[p] * (2 * s.a * dx + s.b * dy) / kLog2E<A>);
      others[1] += magnitude<A>(h.part[p] * (s.b * dx + 2 * s.c * dy) / kLog2E<A>);
    }
  }
}

// Tiles first..last.
template <class T>
RAYFUSE_KERNEL void gradients(int64_t first, int64_t last, const Scene<T>& scene,
                              const Splat<accumulator<T>>* splats,  // [P]
                              const Incoming<accumulator<T>>& d_outputs,
                              accumulator<T>* partial,         // [M, sums]
                              accumulator<T>* d_background) {  // [tiles, D], [I, H, W, D] or null
  using A = accumulator<T>;
  using Pixels = Row<A>;
  Tile<T> tile(scene, splats);
  RowGradients<T> row;
  SplatSums<T> sums(tile);
  WideChannels<T> wide_channels(tile);
  const int64_t width = scene.sums(), depth = width - tile.wide - 1 - kMoments;
  const A* const d_median = scene.depths ? d_outputs.median : nullptr;
  for (int64_t t = first; t < last; ++t) {
    tile.go_to(t);
    sums.begin(tile.n);
    A* const d_own =
        d_background ? d_background + (scene.background_of_pixels ? 0 : t * scene.D) : nullptr;
    if (d_own && !scene.background_of_pixels) std::fill(d_own, d_own + scene.D, A(0));
    for (int r = 0; r < tile.rows; ++r) {
      tile.template weigh<true>(r, d_median);
      row.gather(tile, r, d_outputs, d_own);
      for (int i = 0; d_median && i < tile.columns; ++i) {
        const int median = tile.median(i);
        if (median < 0) continue;
        sums.others(tile.place(median))[depth][0] += d_median[tile.index(r) + i];
      }
      if (tile.wide) wide_channels.add(tile.index(r), d_outputs.image, sums.of_wide());
      if (tile.C == 3) {
        add_row<3>(tile, r, row, wide_channels, sums);
      } else if (tile.C == 4) {
        add_row<4>(tile, r, row, wide_channels, sums);
      } else {
        add_row<0>(tile, r, row, wide_channels, sums);
      }
    }
    A* const out = partial + tile.begin * width;
    for (int64_t k = 0; k < tile.n; ++k) {
      const A x = tile.in_list(k).x;
      const auto dx = Pixels::each([&](int p) { return x - tile.pixel_x.part[p]; });
      sums.add_up(k, dx, out + k * width);
    }
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
      if (k + kAhead < scene.M) {
        const A* const later = partial + places[k + kAhead] * width;
        __builtin_prefetch(later);
        __builtin_prefetch(later + width - 1);
      }
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

#include "large_memory.h"
#include "tile_calls.h"

namespace rayfuse {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> fwd(
    const Tensor& means2d, const Tensor& conics, const Tensor& colors, const Tensor& opacities,
    const Tensor& tile_offsets, const Tensor& flatten_ids, const MaybeTensor& depths,
    const MaybeTensor& background, const MaybeTensor& masks, const MaybeTensor& absgrad,
    int64_t image_width, int64_t image_height, int64_t tile_size, double max_alpha,
    double min_alpha, double min_transmittance, double pixel_center, bool stop_at_min) {
  check_lists("composite_tiles", tile_offsets, flatten_ids, means2d.size(0));
  const TileCall call{means2d,           conics,       colors,     opacities, tile_offsets,
                      flatten_ids,       depths,       background, masks,     absgrad,
                      image_width,       image_height, tile_size,  max_alpha, min_alpha,
                      min_transmittance, pixel_center, stop_at_min};
  const TileOutputs out(call, large_empty);
  dispatch(colors, [&](auto type) {
    using A = accumulator<decltype(type)>;
    const auto scene = call.scene<decltype(type)>();
    const PreparedSplats splats(scene, means2d);
    A *image = mutable_data<A>(out.image), *alpha = mutable_data<A>(out.alpha),
      *depth = mutable_data<A>(out.depth), *median = mutable_data<A>(out.median);
    const bool past_cache = is_large(out.image) && scene.D % kLanes<A> == 0;
    for_tiles(scene, [&](int64_t first, int64_t last) {
      composite(first, last, scene, splats.data(), past_cache, image, alpha, depth, median);
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
  check_lists("composite_tiles", tile_offsets, flatten_ids, means2d.size(0));
  const TileCall call{means2d,           conics,       colors,     opacities, tile_offsets,
                      flatten_ids,       depths,       background, masks,     absgrad,
                      image_width,       image_height, tile_size,  max_alpha, min_alpha,
                      min_transmittance, pixel_center, stop_at_min};
  const TileGradients d(call, needs);
  dispatch(colors, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const auto scene = call.scene<T>(needs);
    const PreparedSplats splats(scene, means2d);
    const Incoming<A> d_outputs{data<A>(d_image), data<A>(d_alpha), data<A>(d_depth),
                                data<A>(d_median)};
    const auto d_inputs = d.outgoing<T>();
    const Tensor sums = empty(means2d, {scene.M, scene.sums()}, dtype_of(means2d));
    A* const partial = mutable_data<A>(sums);
    A* const d_background = mutable_data<A>(d.background);
    A* const of_tiles = mutable_data<A>(d.background_of_tiles);
    if (d_background) std::fill(d_background, d_background + d.background.numel(), A(0));
    for_tiles(scene, [&](int64_t first, int64_t last) {
      gradients(first, last, scene, splats.data(), d_outputs, partial,
                of_tiles ? of_tiles : d_background);
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
