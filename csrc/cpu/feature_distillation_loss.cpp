// Feature distillation of dense rays: feature_distillation_loss.h.
#include "feature_distillation_loss.h"

namespace rayfuse {
namespace {

DenseRays rays_of(const Tensor& w) { return {count_rays(w, 1), w.size(-1)}; }

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& w, const Tensor& f, const Tensor& target) {
  return losses(rays_of(w), leading_sizes(w, 1), w, f, target);
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& error,
                                       const Tensor& product, const Tensor& w, const Tensor& f,
                                       const Tensor& target, int64_t needs) {
  return gradients(rays_of(w), d_loss, error, product, w, f, target, needs);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fwd_bwd(double d_loss, const Tensor& w, const Tensor& f,
                                                   const Tensor& target, int64_t needs) {
  return losses_and_gradients(rays_of(w), leading_sizes(w, 1), d_loss, w, f, target, needs);
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("feature_distillation_loss", TORCH_BOX(&fwd));
  m.impl("feature_distillation_loss_bwd", TORCH_BOX(&bwd));
  m.impl("feature_distillation_loss_fwd_bwd", TORCH_BOX(&fwd_bwd));
}

}  // namespace rayfuse
