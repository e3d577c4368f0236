// Losses of Ref-NeRF on normals of dense rays: normal_losses.h.
#include "normal_losses.h"

namespace rayfuse {
namespace {

DenseRays rays_of(const Tensor& w) { return {count_rays(w, 1), w.size(-1)}; }

std::tuple<Tensor, Tensor> fwd(const Tensor& w, const Tensor& n,
                               const std::optional<Tensor>& n_pred, const std::optional<Tensor>& d,
                               int64_t nan) {
  return losses(rays_of(w), leading_sizes(w, 1), {w, n, n_pred, d, nan});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(const std::optional<Tensor>& d_orientation_loss,
                                               const std::optional<Tensor>& d_predicted_normal_loss,
                                               const Tensor& w, const Tensor& n,
                                               const std::optional<Tensor>& n_pred,
                                               const std::optional<Tensor>& d, int64_t nan,
                                               int64_t needs) {
  return gradients(rays_of(w), d_orientation_loss, d_predicted_normal_loss, {w, n, n_pred, d, nan},
                   needs);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fwd_bwd(
    double d_orientation_loss, double d_predicted_normal_loss, const Tensor& w, const Tensor& n,
    const std::optional<Tensor>& n_pred, const std::optional<Tensor>& d, int64_t nan,
    int64_t needs) {
  return losses_and_gradients(rays_of(w), leading_sizes(w, 1), d_orientation_loss,
                              d_predicted_normal_loss, {w, n, n_pred, d, nan}, needs);
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("normal_losses", TORCH_BOX(&fwd));
  m.impl("normal_losses_bwd", TORCH_BOX(&bwd));
  m.impl("normal_losses_fwd_bwd", TORCH_BOX(&fwd_bwd));
}

}  // namespace rayfuse
