// Feature rendering of packed rays: render_features.h.
#include "render_features.h"

namespace rayfuse {
namespace {

PackedRays rays_of(const Tensor& offsets, const Tensor& w) {
  return {"packed_render_features", offsets, w.numel()};
}

Tensor fwd(const Tensor& w, const Tensor& f, const Tensor& offsets) {
  const PackedRays rays = rays_of(offsets, w);
  return render(rays, {rays.R}, w, f);
}

std::tuple<Tensor, Tensor> bwd(const Tensor& d_features, const Tensor& w, const Tensor& f,
                               const Tensor& offsets, int64_t needs) {
  return gradients(rays_of(offsets, w), d_features, w, f, needs);
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_render_features", TORCH_BOX(&fwd));
  m.impl("packed_render_features_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
