// Losses of Ref-NeRF on normals of packed rays: normal_losses.h.
#include "normal_losses.h"

namespace rayfuse {
namespace {

PackedRays rays_of(const Tensor& offsets, const Tensor& w) {
  return {"packed_normal_losses", offsets, w.numel()};
}

std::tuple<Tensor, Tensor> fwd(const Tensor& w, const Tensor& n, const Tensor& offsets,
                               const std::optional<Tensor>& n_pred, const std::optional<Tensor>& d,
                               int64_t nan) {
  const PackedRays rays = rays_of(offsets, w);
  return losses(rays, {rays.R}, {w, n, n_pred, d, nan});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(const std::optional<Tensor>& d_orientation_loss,
                                               const std::optional<Tensor>& d_predicted_normal_loss,
                                               const Tensor& w, const Tensor& n,
                                               const Tensor& offsets,
                                               const std::optional<Tensor>& n_pred,
                                               const std::optional<Tensor>& d, int64_t nan,
                                               int64_t needs) {
  return gradients(rays_of(offsets, w), d_orientation_loss, d_predicted_normal_loss,
                   {w, n, n_pred, d, nan}, needs);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fwd_bwd(
    double d_orientation_loss, double d_predicted_normal_loss, const Tensor& w, const Tensor& n,
    const Tensor& offsets, const std::optional<Tensor>& n_pred, const std::optional<Tensor>& d,
    int64_t nan, int64_t needs) {
  const PackedRays rays = rays_of(offsets, w);
  return losses_and_gradients(rays, {rays.R}, d_orientation_loss, d_predicted_normal_loss,
                              {w, n, n_pred, d, nan}, needs);
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_normal_losses", TORCH_BOX(&fwd));
  m.impl("packed_normal_losses_bwd", TORCH_BOX(&bwd));
  m.impl("packed_normal_losses_fwd_bwd", TORCH_BOX(&fwd_bwd));
}

}  // namespace rayfuse
