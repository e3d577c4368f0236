// The step from tensors to a Scene, on the CPU and in CUDA, included after the kernels of a file.
#pragma once

#include "common.h"
#include "math/composite_tiles.h"

#include <cmath>

namespace rayfuse {

using MaybeTensor = std::optional<Tensor>;

// The tensors and scalars of a call.
struct TileCall {
  const Tensor &means2d, &conics, &colors, &opacities, &tile_offsets, &flatten_ids;
  const MaybeTensor &depths, &background, &masks, &absgrad;
  int64_t W, H, size;
  double max_alpha, min_alpha, min_transmittance, center;
  bool stop_at_min;

  int64_t images() const { return tile_offsets.size(0); }

  // Of a forward, or of a backward that needs these gradients.
  template <class T>
  Scene<T> scene(int64_t needs = 0) const {
    using A = accumulator<T>;
    Scene<T> scene = {};
    scene.means2d = data<A>(means2d);
    scene.conics = data<A>(conics);
    scene.colors = data<T>(colors);
    scene.opacities = data<A>(opacities);
    scene.offsets = data<int64_t>(tile_offsets);
    scene.ids = data<int64_t>(flatten_ids);
    scene.depths = data<A>(depths);
    scene.background = data<A>(background);
    scene.masks = data<int64_t>(masks);
    scene.P = means2d.size(0);
    scene.D = colors.size(1);
    scene.I = images();
    scene.Y = tile_offsets.size(1);
    scene.X = tile_offsets.size(2);
    scene.M = scene.tiles() ? flatten_ids.size(0) : 0;
    scene.H = H;
    scene.W = W;
    scene.size = size;
    scene.absolute = absgrad && needs >> 6 & 1;
    scene.background_of_pixels = background && background->size(0) != scene.I;
    scene.max_alpha = static_cast<A>(max_alpha);
    scene.min_alpha = static_cast<A>(min_alpha);
    scene.center = static_cast<A>(center);
    scene.ending = static_cast<A>(min_transmittance);
    if (!stop_at_min) scene.ending = std::nextafter(scene.ending, A(-1));
    return scene;
  }
};

// The outputs, uninitialised.
struct TileOutputs {
  Tensor image, alpha, depth, median;

  // `make` allocates the image.
  explicit TileOutputs(const TileCall& call, decltype(empty)* make = empty)
      : image(of_pixels(call, {call.colors.size(1)}, make)),
        alpha(of_pixels(call, {})),
        depth(of_pixels(call, {})),
        median(of_pixels(call, {})) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor> tensors() const {
    return {image, alpha, depth, median};
  }

 private:
  static Tensor of_pixels(const TileCall& call, const std::vector<int64_t>& trailing,
                          decltype(empty)* make = empty) {
    std::vector<int64_t> sizes{call.images(), call.H, call.W};
    sizes.insert(sizes.end(), trailing.begin(), trailing.end());
    return make(call.means2d, sizes, dtype_of(call.means2d));
  }
};

// The gradients of the inputs, uninitialised; and scratch for that of the background.
struct TileGradients {
  Tensor means2d, conics, colors, opacities, depths, background, absgrad, background_of_tiles;

  TileGradients(const TileCall& call, int64_t needs)
      : means2d(empty_gradient(call.means2d, needs, 0)),
        conics(empty_gradient(call.conics, needs, 1)),
        colors(empty_gradient(call.colors, needs, 2)),
        opacities(empty_gradient(call.opacities, needs, 3)),
        depths(empty_gradient(call.depths, call.means2d, needs, 4)),
        background(empty_gradient(call.background, call.means2d, needs, 5)),
        absgrad(empty_gradient(call.absgrad, call.means2d, needs, 6)),
        background_of_tiles(
            empty(call.means2d,
                  {sums_background(call) ? call.tile_offsets.numel() : 0, call.colors.size(1)},
                  dtype_of(call.means2d))) {}

  bool sums_background(const TileCall& call) const {
    return background.numel() > 0 && call.background->size(0) == call.images();
  }
  template <class T>
  Outgoing<T> outgoing() const {
    using A = accumulator<T>;
    return {mutable_data<A>(means2d),   mutable_data<A>(conics), mutable_data<T>(colors),
            mutable_data<A>(opacities), mutable_data<A>(depths), mutable_data<A>(absgrad)};
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tensors() const {
    return {means2d, conics, colors, opacities, depths, background, absgrad};
  }
};

}  // namespace rayfuse
