// The step from tensors to Gaussians before cameras, on the CPU and in CUDA, included after the
// kernels of a file.
#pragma once

#include "common.h"
#include "math/project_gaussians.h"

namespace rayfuse {

using MaybeTensor = std::optional<Tensor>;

// The tensors and scalars of a call.
struct ProjectionCall {
  const Tensor &means, &viewmats, &Ks;
  const MaybeTensor &quats, &scales, &covars, &opacities;
  int64_t width, height;
  double eps2d, near_plane, far_plane, radius_clip;
  bool compensate;
  int64_t camera_model;

  template <class T>
  Gaussians<T> gaussians() const {
    using A = accumulator<T>;
    Gaussians<T> in = {};
    in.means = data<T>(means);
    in.viewmats = data<T>(viewmats);
    in.Ks = data<T>(Ks);
    in.quats = data<T>(quats);
    in.scales = data<T>(scales);
    in.covars = data<T>(covars);
    in.opacities = data<T>(opacities);
    in.B = count_rays(means, 2);
    in.N = means.size(means.dim() - 2);
    in.C = viewmats.size(viewmats.dim() - 3);
    in.width = static_cast<A>(width);
    in.height = static_cast<A>(height);
    in.eps2d = static_cast<A>(eps2d);
    in.near_plane = static_cast<A>(near_plane);
    in.far_plane = static_cast<A>(far_plane);
    in.radius_clip = static_cast<A>(radius_clip);
    in.compensate = compensate;
    in.ortho = camera_model == 1;
    return in;
  }
};

// The outputs, uninitialised.
struct ProjectionOutputs {
  Tensor means2d, depths, conics, radii, compensations;

  explicit ProjectionOutputs(const ProjectionCall& call)
      : means2d(of_pairs(call, {2})),
        depths(of_pairs(call, {})),
        conics(of_pairs(call, {3})),
        radii(of_pairs(call, {2})),
        compensations(of_pairs(call, {})) {}

  template <class A>
  Projections<A> projections() const {
    return {mutable_data<A>(means2d), mutable_data<A>(depths), mutable_data<A>(conics),
            mutable_data<A>(radii), mutable_data<A>(compensations)};
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tensors() const {
    return {means2d, depths, conics, radii, compensations};
  }

 private:
  static Tensor of_pairs(const ProjectionCall& call, const std::vector<int64_t>& trailing) {
    std::vector<int64_t> sizes = leading_sizes(call.means, 2);
    sizes.push_back(call.viewmats.size(call.viewmats.dim() - 3));
    sizes.push_back(call.means.size(call.means.dim() - 2));
    sizes.insert(sizes.end(), trailing.begin(), trailing.end());
    return empty(call.means, sizes, accumulator_dtype(call.means));
  }
};

// The gradients of the inputs, uninitialised.
struct ProjectionResults {
  Tensor means, viewmats, quats, scales, covars;

  ProjectionResults(const ProjectionCall& call, int64_t needs)
      : means(empty_gradient(call.means, needs, 0)),
        viewmats(empty_gradient(call.viewmats, needs, 1)),
        quats(empty_gradient(call.quats, call.means, needs, 2)),
        scales(empty_gradient(call.scales, call.means, needs, 3)),
        covars(empty_gradient(call.covars, call.means, needs, 4)) {}

  template <class T>
  GaussianGradients<T> gradients() const {
    return {mutable_data<T>(means), mutable_data<T>(viewmats), mutable_data<T>(quats),
            mutable_data<T>(scales), mutable_data<T>(covars)};
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tensors() const {
    return {means, viewmats, quats, scales, covars};
  }
};

}  // namespace rayfuse
