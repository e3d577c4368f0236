// Tile compositing: per pixel alpha_i = min(o_i e^-sigma_i, max_alpha) for the splats i of its
// tile's list, w_i = alpha_i T_i with T_{i+1} = T_i (1 - alpha_i); image = sum_i w_i c_i + T bg,
// alpha = 1 - T, depth = sum_i w_i z_i / alpha, median = z_i of the last i with T_i > 1/2.
// One thread owns a tile and goes through it by rows of 16 pixels: a row's list holds the splats
// that reach it, T stays in registers along the list, and channels are a matrix product of weights.
// Backward: a row's weights once more, kept in cache, then from the last splat to the first with
// u_i, what lies behind splat i: d_alpha_i = T_i (<c_i, g> - u_i), u_{i-1} = u_i + alpha_i
// (<c_i, g> - u_i). Sums of a splat over its tile meet in the order of tiles. docs/splats.md
#include "tile.h"

namespace rayfuse {
namespace {

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
