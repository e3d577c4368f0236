// The step from tensors to Splats, on the CPU and in CUDA, included after the kernels of a file.
#pragma once

#include "common.h"
#include "math/intersect_tiles.h"

namespace rayfuse {

using MaybeTensor = std::optional<Tensor>;

// The tensors and scalars of a call.
struct SplatsCall {
  const Tensor &means2d, &radii, &depths;
  const MaybeTensor &conics, &most, &image_ids;
  int64_t images, size, X, Y;
  double center;

  template <class A>
  Splats<A> splats() const {
    Splats<A> splats = {};
    splats.means2d = data<A>(means2d);
    splats.radii = data<A>(radii);
    splats.depths = data<A>(depths);
    splats.conics = data<A>(conics);
    splats.most = data<A>(most);
    splats.image_ids = data<int64_t>(image_ids);
    splats.P = depths.numel();
    splats.images = images;
    splats.of_each = static_cast<int32_t>(splats.P / std::max<int64_t>(images, 1));
    splats.X = static_cast<int32_t>(X);
    splats.Y = static_cast<int32_t>(Y);
    splats.size = static_cast<A>(size);
    splats.center = static_cast<A>(center);
    return splats;
  }
  // How many tiles a splat has, uninitialised.
  Tensor per_splat() const { return empty(means2d, {depths.numel()}, aoti_torch_dtype_int32()); }
  // Where lists begin, likewise.
  Tensor offsets() const { return empty(means2d, {images, Y, X}, aoti_torch_dtype_int64()); }
  Tensor ids(int64_t M) const { return empty(means2d, {M}, aoti_torch_dtype_int64()); }
};

}  // namespace rayfuse
