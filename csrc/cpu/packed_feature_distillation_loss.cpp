// Feature distillation of packed rays: feature_distillation_loss.h.
#include "feature_distillation_loss.h"

namespace rayfuse {
namespace {

PackedRays rays_of(const Tensor& offsets, const Tensor& w) {
  return {"packed_feature_distillation_loss", offsets, w.numel()};
}

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& w, const Tensor& f, const Tensor& target,
                                       const Tensor& offsets) {
  const PackedRays rays = rays_of(offsets, w);
  return losses(rays, {rays.R}, w, f, target);
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& error,
                                       const Tensor& product, const Tensor& w, const Tensor& f,
                                       const Tensor& target, const Tensor& offsets, int64_t needs) {
  return gradients(rays_of(offsets, w), d_loss, error, product, w, f, target, needs);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fwd_bwd(double d_loss, const Tensor& w, const Tensor& f,
                                                   const Tensor& target, const Tensor& offsets,
                                                   int64_t needs) {
  const PackedRays rays = rays_of(offsets, w);
  return losses_and_gradients(rays, {rays.R}, d_loss, w, f, target, needs);
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_feature_distillation_loss", TORCH_BOX(&fwd));
  m.impl("packed_feature_distillation_loss_bwd", TORCH_BOX(&bwd));
  m.impl("packed_feature_distillation_loss_fwd_bwd", TORCH_BOX(&fwd_bwd));
}

}  // namespace rayfuse
