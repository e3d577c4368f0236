// Feature rendering of dense rays: render_features.h.
#include "render_features.h"

namespace rayfuse {
namespace {

DenseRays rays_of(const Tensor& w) { return {count_rays(w, 1), w.size(-1)}; }

Tensor fwd(const Tensor& w, const Tensor& f) {
  return render(rays_of(w), leading_sizes(w, 1), w, f);
}

std::tuple<Tensor, Tensor> bwd(const Tensor& d_features, const Tensor& w, const Tensor& f,
                               int64_t needs) {
  return gradients(rays_of(w), d_features, w, f, needs);
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("render_features", TORCH_BOX(&fwd));
  m.impl("render_features_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
