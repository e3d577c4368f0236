// Gaussians in space as splats in images; the formulas stand in csrc/math/project_gaussians.h.
// One thread owns a piece of the Gaussians, kLanes of them at a time in columns, and shows them to
// all cameras: a Gaussian is read once, an output written once. The gradients of a camera add up in
// the lanes over a piece, and from piece to piece in order and in double.
#include "columns.h"
#include "explog.h"
#include "rays.h"
#include "square_root.h"

namespace rayfuse {

template <class A>
vec<A> root_of(vec<A> x) {
  return square_root(x);
}
// Of x >= 0.
template <class A>
vec<A> ceil_of(vec<A> x) {
  // from here on all values are whole
  constexpr A kWhole = A(int64_t{1} << kMantissaBits<A>);
  const vec<A> near = (x + kWhole) - kWhole, above = near < x ? near + 1 : near;
  return x < kWhole ? above : x;
}

}  // namespace rayfuse

#include "../math/project_gaussians.h"

#include <vector>

namespace rayfuse {
namespace {

// So few that sums over them lose little to rounding, and their outputs stay in cache.
constexpr int64_t kPiece = 1024;

template <class A, class T>
auto load_shape(const Gaussians<T>& in, int64_t g, int64_t n, std::false_type) {
  const auto q = load_columns<4>(in.quats + 4 * g, n);
  const auto s = load_columns<3>(in.scales + 3 * g, n);
  return Ellipsoid<A, vec<A>>(q.column, s.column);
}
template <class A, class T>
auto load_shape(const Gaussians<T>& in, int64_t g, int64_t n, std::true_type) {
  return Covariance<A, vec<A>>(load_columns<6>(in.covars + 6 * g, n).column);
}

// The n Gaussians from number g of all on.
template <class A, class covars>
struct Lanes {
  using Shape = decltype(load_shape<A>(Gaussians<A>(), 0, 0, covars()));
  using Splat = rayfuse::Splat<A, vec<A>, Shape>;

  template <class T>
  Lanes(const Gaussians<T>& in, int64_t g, int64_t n)
      : mean(load_columns<3>(in.means + 3 * g, n)),
        shape(load_shape<A>(in, g, n, covars())),
        opacity(in.opacities ? load(in.opacities + g, n) : vec<A>{}) {}

  template <class T>
  Splat before(const Gaussians<T>& in, const Camera<A>& camera) const {
    return Splat(in, camera, mean.column, shape, opacity);
  }

  Columns<A, 3> mean;
  Shape shape;
  vec<A> opacity;
};

template <class T>
std::vector<Camera<accumulator<T>>> cameras_of(const Gaussians<T>& in, int64_t b) {
  std::vector<Camera<accumulator<T>>> cameras;
  for (int64_t c = 0; c < in.C; ++c) cameras.emplace_back(in, b * in.C + c);
  return cameras;
}

// Gaussians begin..end of batch b.
template <class covars, class T>
RAYFUSE_KERNEL void project(int64_t b, int64_t begin, int64_t end, const Gaussians<T>& in,
                            const Projections<accumulator<T>>& out) {
  using A = accumulator<T>;
  const auto cameras = cameras_of(in, b);
  for (int64_t i = begin; i < end; i += kLanes<A>) {
    const int64_t n = std::min<int64_t>(end - i, kLanes<A>);
    const Lanes<A, covars> lanes(in, b * in.N + i, n);
    for (int64_t c = 0; c < in.C; ++c) {
      const auto splat = lanes.before(in, cameras[c]);
      const auto seen = [&](vec<A> x) { return splat.if_visible(x); };
      const int64_t at = (b * in.C + c) * in.N + i;
      const vec<A>*m = splat.mean2d, *p = splat.conic, *r = splat.radius;
      store_columns<2>(out.means2d + 2 * at, Columns<A, 2>{{seen(m[0]), seen(m[1])}}, n);
      store_columns<1>(out.depths + at, Columns<A, 1>{{seen(splat.depth)}}, n);
      store_columns<3>(out.conics + 3 * at, Columns<A, 3>{{seen(p[0]), seen(p[1]), seen(p[2])}}, n);
      store_columns<2>(out.radii + 2 * at, Columns<A, 2>{{seen(r[0]), seen(r[1])}}, n);
      store_columns<1>(out.compensations + at, Columns<A, 1>{{seen(splat.compensation)}}, n);
    }
  }
}

// The first n rows at number `at` of an output's gradient; 0 where there is none.
template <int width, class A>
Columns<A, width> load_gradient(const A* d, int64_t at, int64_t n) {
  return d ? load_columns<width>(d + width * at, n) : Columns<A, width>{};
}

// Gaussians begin..end of batch b.
template <class covars, class T>
RAYFUSE_KERNEL void gradients(int64_t b, int64_t begin, int64_t end, const Gaussians<T>& in,
                              const ProjectionGradients<accumulator<T>>& d,
                              const GaussianGradients<T>& out,
                              accumulator<T>* d_poses) {  // [C, kPose]
  using A = accumulator<T>;
  const auto cameras = cameras_of(in, b);
  std::vector<vec<A>> sums(in.C * kPose);
  for (int64_t i = begin; i < end; i += kLanes<A>) {
    const int64_t n = std::min<int64_t>(end - i, kLanes<A>), g = b * in.N + i;
    const Lanes<A, covars> lanes(in, g, n);
    Columns<A, 3> d_mean = {};
    vec<A> N[6] = {};
    typename Lanes<A, covars>::Splat::Mask met = {};
    for (int64_t c = 0; c < in.C; ++c) {
      const auto splat = lanes.before(in, cameras[c]);
      const int64_t at = (b * in.C + c) * in.N + i;
      vec<A> d_pose[kPose];
      splat.gradients(in, cameras[c], lanes.mean.column, load_gradient<2>(d.means2d, at, n).column,
                      load_gradient<1>(d.depths, at, n).column[0],
                      load_gradient<3>(d.conics, at, n).column,
                      load_gradient<1>(d.compensations, at, n).column[0], d_mean.column, N, d_pose);
      for (int k = 0; k < kPose; ++k) sums[c * kPose + k] += d_pose[k];
      met |= splat.visible;
    }
    const auto seen = [&](auto& columns) {
      for (vec<A>& x : columns.column) x = met ? x : vec<A>{};
    };
    if (out.means) store_columns<3>(out.means + 3 * g, d_mean, n);
    if constexpr (covars::value) {
      Columns<A, 6> d_covar;
      lanes.shape.gradients(N, d_covar.column);
      if (out.covars) store_columns<6>(out.covars + 6 * g, d_covar, n);
    } else {
      Columns<A, 4> d_quat;
      Columns<A, 3> d_scale;
      lanes.shape.gradients(N, d_quat.column, d_scale.column);
      seen(d_quat), seen(d_scale);
      if (out.quats) store_columns<4>(out.quats + 4 * g, d_quat, n);
      if (out.scales) store_columns<3>(out.scales + 3 * g, d_scale, n);
    }
  }
  for (int64_t k = 0; k < in.C * kPose; ++k) d_poses[k] = sum_lanes<A>(sums[k]);
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"
#include "../projection.h"

namespace rayfuse {
namespace {

template <class T>
int64_t pieces_of(const Gaussians<T>& in) {
  return (in.N + kPiece - 1) / kPiece;
}

// Calls f(piece, batch, first Gaussian, last + 1) for the pieces of all batches, numbered in order.
template <class T, class F>
void for_pieces(const Gaussians<T>& in, const F& f) {
  const int64_t pieces = pieces_of(in);
  const int64_t work = std::max<int64_t>(std::min(in.N, kPiece) * in.C, 1);
  torch::stable::parallel_for(0, in.B * pieces, std::max<int64_t>((1 << 12) / work, 1),
                              [&](int64_t first, int64_t last) {
                                for (int64_t i = first; i < last; ++i) {
                                  const int64_t begin = i % pieces * kPiece;
                                  f(i, i / pieces, begin, std::min(begin + kPiece, in.N));
                                }
                              });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fwd(
    const Tensor& means, const Tensor& viewmats, const Tensor& Ks, const MaybeTensor& quats,
    const MaybeTensor& scales, const MaybeTensor& covars, const MaybeTensor& opacities,
    int64_t image_width, int64_t image_height, double eps2d, double near_plane, double far_plane,
    double radius_clip, bool compensate, int64_t camera_model) {
  const ProjectionCall call{means,      viewmats,  Ks,          quats,        scales,
                            covars,     opacities, image_width, image_height, eps2d,
                            near_plane, far_plane, radius_clip, compensate,   camera_model};
  const ProjectionOutputs out(call);
  dispatch(means, [&](auto type) {
    using T = decltype(type);
    const auto in = call.gaussians<T>();
    const auto projections = out.projections<accumulator<T>>();
    as_constant(in.covars != nullptr, [&](auto given) {
      for_pieces(in, [&](int64_t, int64_t b, int64_t begin, int64_t end) {
        project<decltype(given)>(b, begin, end, in, projections);
      });
    });
  });
  return out.tensors();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
    const MaybeTensor& d_means2d, const MaybeTensor& d_depths, const MaybeTensor& d_conics,
    const MaybeTensor&, const MaybeTensor& d_compensations, const Tensor& means,
    const Tensor& viewmats, const Tensor& Ks, const MaybeTensor& quats, const MaybeTensor& scales,
    const MaybeTensor& covars, const MaybeTensor& opacities, int64_t image_width,
    int64_t image_height, double eps2d, double near_plane, double far_plane, double radius_clip,
    bool compensate, int64_t camera_model, int64_t needs) {
  const ProjectionCall call{means,      viewmats,  Ks,          quats,        scales,
                            covars,     opacities, image_width, image_height, eps2d,
                            near_plane, far_plane, radius_clip, compensate,   camera_model};
  const ProjectionResults results(call, needs);
  dispatch(means, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const auto in = call.gaussians<T>();
    const ProjectionGradients<A> d{data<A>(d_means2d), data<A>(d_depths), data<A>(d_conics),
                                   data<A>(d_compensations)};
    const auto out = results.gradients<T>();
    const int64_t pieces = pieces_of(in), width = in.C * kPose;
    std::vector<A> poses(in.B * pieces * width);
    as_constant(in.covars != nullptr, [&](auto given) {
      for_pieces(in, [&](int64_t i, int64_t b, int64_t begin, int64_t end) {
        gradients<decltype(given)>(b, begin, end, in, d, out, poses.data() + i * width);
      });
    });
    for (int64_t camera = 0; out.viewmats && camera < in.B * in.C; ++camera) {
      const int64_t b = camera / in.C, c = camera % in.C;
      T* const d_viewmat = out.viewmats + 16 * camera;
      for (int k = 0; k < 16; ++k) {
        double sum = 0;
        for (int64_t i = b * pieces; k < kPose && i < (b + 1) * pieces; ++i) {
          sum += poses[i * width + c * kPose + k];
        }
        d_viewmat[k] = narrow<T>(static_cast<A>(sum));
      }
    }
  });
  return results.tensors();
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("project_gaussians", TORCH_BOX(&fwd));
  m.impl("project_gaussians_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
