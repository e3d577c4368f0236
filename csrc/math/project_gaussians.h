// A Gaussian before a camera, on the CPU and in CUDA: V is a vector of many or a number of type A.
// With p = R m + t and J = [jx 0 jxz; 0 jy jyz], V = J R Sigma R^T J^T; conics are the inverse of
// V + eps2d I. X is J R in the frame of a shape, and W = J R Sigma. Backward: G, the gradient of V
// as a symmetric matrix, is -P d_P P of the conic P and what the compensation adds; shapes get
// theirs from N = X^T G X, and d_(J R) = 2 G W gives those of J, hence of p, and of R.
// docs/splats.md. The includer has defined root_of<A>, log_of<A> and ceil_of<A> of V.
#pragma once

#include <cstdint>

#include "../accumulator.h"
#include "../device.h"

namespace rayfuse {

template <class T>
struct Gaussians {
  using A = accumulator<T>;

  const T* means;      // [B, N, 3]
  const T* viewmats;   // [B, C, 4, 4]
  const T* Ks;         // [B, C, 3, 3]
  const T* quats;      // [B, N, 4] or null
  const T* scales;     // [B, N, 3] or null
  const T* covars;     // [B, N, 6] or null
  const T* opacities;  // [B, N] or null
  int64_t B, N, C;
  A width, height, eps2d, near_plane, far_plane, radius_clip;
  bool compensate, ortho;
};

template <class A>
struct Projections {
  A* means2d;        // [B, C, N, 2]
  A* depths;         // [B, C, N]
  A* conics;         // [B, C, N, 3]
  A* radii;          // [B, C, N, 2]
  A* compensations;  // [B, C, N]
};

// Gradients of the outputs, null where there are none.
template <class A>
struct ProjectionGradients {
  const A* means2d;        // [B, C, N, 2]
  const A* depths;         // [B, C, N]
  const A* conics;         // [B, C, N, 3]
  const A* compensations;  // [B, C, N]
};

// Gradients of the inputs, null where they are not wanted.
template <class T>
struct GaussianGradients {
  T* means;     // [B, N, 3]
  T* viewmats;  // [B, C, 4, 4]
  T* quats;     // [B, N, 4]
  T* scales;    // [B, N, 3]
  T* covars;    // [B, N, 6]
};

// Values of a row [R | t] of a camera's gradient, three of them.
constexpr int kPose = 12;

template <class V>
RAYFUSE_DEVICE V dot(const V* u, const V* v) {
  return u[0] * v[0] + u[1] * v[1] + u[2] * v[2];
}

template <class A>
struct Camera {
  A R[3][3], t[3], fx, fy, cx, cy;
  // where x / z and y / z stay in the Jacobian
  A least_x, most_x, least_y, most_y;

  // Number i of all.
  template <class T>
  RAYFUSE_DEVICE Camera(const Gaussians<T>& in, int64_t i) {
    const T *pose = in.viewmats + 16 * i, *K = in.Ks + 9 * i;
    for (int r = 0; r < 3; ++r) {
      for (int c = 0; c < 3; ++c) R[r][c] = widen(pose[4 * r + c]);
      t[r] = widen(pose[4 * r + 3]);
    }
    fx = widen(K[0]), fy = widen(K[4]), cx = widen(K[2]), cy = widen(K[5]);
    const A margin_x = A(0.15) * in.width / fx, margin_y = A(0.15) * in.height / fy;
    least_x = -cx / fx - margin_x, most_x = (in.width - cx) / fx + margin_x;
    least_y = -cy / fy - margin_y, most_y = (in.height - cy) / fy + margin_y;
  }
};

// Of V before eps2d: its values and its determinant.
template <class V>
struct Footprint {
  V a, b, c, det;
};

// A covariance R diag(s)^2 R^T with R the rotation of a quaternion of any length.
template <class A, class V>
struct Ellipsoid {
  V R[3][3], q[4], s[3], two_per_square;

  RAYFUSE_DEVICE Ellipsoid(const V (&quat)[4], const V (&scale)[3]) {
    for (int i = 0; i < 4; ++i) q[i] = quat[i];
    for (int i = 0; i < 3; ++i) s[i] = scale[i];
    const V w = q[0], x = q[1], y = q[2], z = q[3];
    const V square = w * w + dot(q + 1, q + 1);
    // NaN where the square is not finite, which would pass for no rotation
    const V f = two_per_square = (2 + 0 * square) / square;
    R[0][0] = 1 - f * (y * y + z * z), R[0][1] = f * (x * y - w * z), R[0][2] = f * (x * z + w * y);
    R[1][0] = f * (x * y + w * z), R[1][1] = 1 - f * (x * x + z * z), R[1][2] = f * (y * z - w * x);
    R[2][0] = f * (x * z - w * y), R[2][1] = f * (y * z + w * x), R[2][2] = 1 - f * (x * x + y * y);
  }

  // Also gives X, T in the frame of the axes, and W = T Sigma.
  RAYFUSE_DEVICE Footprint<V> project(const V (&T)[2][3], V (&X)[2][3], V (&W)[2][3]) const {
    V U[2][3];
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 3; ++j) {
        X[i][j] = T[i][0] * R[0][j] + T[i][1] * R[1][j] + T[i][2] * R[2][j];
        U[i][j] = X[i][j] * s[j];
      }
      for (int k = 0; k < 3; ++k) {
        W[i][k] = R[k][0] * s[0] * U[i][0] + R[k][1] * s[1] * U[i][1] + R[k][2] * s[2] * U[i][2];
      }
    }
    // a c - b^2, without its cancellation where a splat is thin
    const V cross[3] = {U[0][1] * U[1][2] - U[0][2] * U[1][1],
                        U[0][2] * U[1][0] - U[0][0] * U[1][2],
                        U[0][0] * U[1][1] - U[0][1] * U[1][0]};
    return {dot(U[0], U[0]), dot(U[0], U[1]), dot(U[1], U[1]), dot(cross, cross)};
  }

  // From N, the sum of X^T G X: xx, xy, xz, yy, yz, zz. A turn by a small r in the frame of the
  // axes changes Sigma there by what has the factors s_i^2 - s_j^2, and the quaternion by
  // q (0, r / 2).
  RAYFUSE_DEVICE void gradients(const V (&N)[6], V (&d_quat)[4], V (&d_scale)[3]) const {
    d_scale[0] = 2 * s[0] * N[0], d_scale[1] = 2 * s[1] * N[3], d_scale[2] = 2 * s[2] * N[5];
    const V f = 2 * two_per_square;
    const V r_x = f * N[4] * (s[1] - s[2]) * (s[1] + s[2]);
    const V r_y = f * N[2] * (s[2] - s[0]) * (s[2] + s[0]);
    const V r_z = f * N[1] * (s[0] - s[1]) * (s[0] + s[1]);
    const V w = q[0], x = q[1], y = q[2], z = q[3];
    d_quat[0] = -(x * r_x + y * r_y + z * r_z);
    d_quat[1] = w * r_x + y * r_z - z * r_y;
    d_quat[2] = w * r_y + z * r_x - x * r_z;
    d_quat[3] = w * r_z + x * r_y - y * r_x;
  }
};

// A covariance that is given: xx, xy, xz, yy, yz, zz.
template <class A, class V>
struct Covariance {
  V sigma[6];

  RAYFUSE_DEVICE explicit Covariance(const V (&covar)[6]) {
    for (int i = 0; i < 6; ++i) sigma[i] = covar[i];
  }

  RAYFUSE_DEVICE Footprint<V> project(const V (&T)[2][3], V (&X)[2][3], V (&W)[2][3]) const {
    for (int i = 0; i < 2; ++i) {
      const V x = X[i][0] = T[i][0], y = X[i][1] = T[i][1], z = X[i][2] = T[i][2];
      W[i][0] = sigma[0] * x + sigma[1] * y + sigma[2] * z;
      W[i][1] = sigma[1] * x + sigma[3] * y + sigma[4] * z;
      W[i][2] = sigma[2] * x + sigma[4] * y + sigma[5] * z;
    }
    const V a = dot(T[0], W[0]), b = dot(T[0], W[1]), c = dot(T[1], W[1]);
    return {a, b, c, a * c - b * b};
  }

  RAYFUSE_DEVICE void gradients(const V (&N)[6], V (&d_covar)[6]) const {
    const A times[6] = {1, 2, 2, 1, 2, 1};
    for (int i = 0; i < 6; ++i) d_covar[i] = times[i] * N[i];
  }
};

// A Gaussian before a camera.
template <class A, class V, class Shape>
class Splat {
 public:
  using Mask = decltype(V{} < V{});

  V mean2d[2], depth, conic[3], radius[2], compensation;
  // culled otherwise; the values above are then anything
  Mask visible;

  // The opacity counts if in.opacities.
  template <class T>
  RAYFUSE_DEVICE Splat(const Gaussians<T>& in, const Camera<A>& camera, const V (&mean)[3],
                       const Shape& shape, V opacity) {
    for (int i = 0; i < 3; ++i) {
      p_[i] = camera.R[i][0] * mean[0] + camera.R[i][1] * mean[1] + camera.R[i][2] * mean[2] +
              camera.t[i];
    }
    depth = p_[2];
    const V nothing = {};
    if (in.ortho) {
      jx_ = camera.fx + nothing, jy_ = camera.fy + nothing, jxz_ = nothing, jyz_ = nothing;
    } else {
      nearness_ = 1 / depth;
      x_ = p_[0] / depth, y_ = p_[1] / depth;
      clamped_x_ = x_ < camera.least_x ? camera.least_x + nothing : x_;
      clamped_x_ = x_ > camera.most_x ? camera.most_x + nothing : clamped_x_;
      clamped_y_ = y_ < camera.least_y ? camera.least_y + nothing : y_;
      clamped_y_ = y_ > camera.most_y ? camera.most_y + nothing : clamped_y_;
      jx_ = camera.fx / depth, jy_ = camera.fy / depth;
      jxz_ = -jx_ * clamped_x_, jyz_ = -jy_ * clamped_y_;
    }
    mean2d[0] = jx_ * p_[0] + camera.cx, mean2d[1] = jy_ * p_[1] + camera.cy;
    V JR[2][3];
    for (int k = 0; k < 3; ++k) {
      JR[0][k] = jx_ * camera.R[0][k] + jxz_ * camera.R[2][k];
      JR[1][k] = jy_ * camera.R[1][k] + jyz_ * camera.R[2][k];
    }
    const Footprint<V> print = shape.project(JR, X_, W_);
    const V a = print.a + in.eps2d, c = print.c + in.eps2d;
    const V added = in.eps2d * (print.a + c), det = print.det + added;
    inverse_det_ = 1 / det;
    conic[0] = c / det, conic[1] = -print.b / det, conic[2] = a / det;
    lost_ = added * inverse_det_;
    compensation = print.det > 0 ? root_of<A>(print.det * inverse_det_) : nothing;

    V extent = A(3.33) + nothing;
    visible = (depth >= in.near_plane) & (depth <= in.far_plane) & (det > 0);
    if (in.opacities) {
      constexpr A kLeast = A(1) / 255;
      if (in.compensate) opacity *= compensation;
      const V own = root_of<A>(2 * log_of<A>(opacity / kLeast));
      extent = own < extent ? own : extent;
      visible = visible & (opacity >= kLeast) & (0 * opacity == 0);
    }
    radius[0] = ceil_of<A>(extent * root_of<A>(a)), radius[1] = ceil_of<A>(extent * root_of<A>(c));
    visible = visible & ((radius[0] > in.radius_clip) | (radius[1] > in.radius_clip)) &
              (mean2d[0] + radius[0] > 0) & (mean2d[0] - radius[0] < in.width) &
              (mean2d[1] + radius[1] > 0) & (mean2d[1] - radius[1] < in.height);
    // what is not finite, times 0, is NaN
    const V all = mean2d[0] + mean2d[1] + conic[0] + conic[1] + conic[2] + radius[0] + radius[1];
    visible = visible & (0 * all == 0);
  }

  RAYFUSE_DEVICE V if_visible(V x) const { return visible ? x : V{}; }

  // Adds to the gradients of the mean and to the N of the shape, and gives those of rows [R | t].
  template <class T>
  RAYFUSE_DEVICE void gradients(const Gaussians<T>& in, const Camera<A>& camera, const V (&mean)[3],
                                const V (&d_mean2d)[2], V d_depth, const V (&d_conic)[3],
                                V d_compensation, V (&d_mean)[3], V (&N)[6],
                                V (&d_pose)[kPose]) const {
    const V a = conic[0], b = conic[1], c = conic[2], half = A(0.5) * d_conic[1];
    const V aa = d_conic[0] * a + half * b, ab = d_conic[0] * b + half * c;
    const V ba = half * a + d_conic[2] * b, bb = half * b + d_conic[2] * c;
    const V d_ratio = compensation > 0 ? A(0.5) * d_compensation / compensation : V{};
    const V kept = d_ratio * lost_, off = d_ratio * (in.eps2d * inverse_det_);
    const V G00 = kept * a - off - (a * aa + b * ba), G01 = kept * b - (a * ab + b * bb),
            G11 = kept * c - off - (b * ab + c * bb);

    V d_T[2][3], Q[2][3];
    for (int k = 0; k < 3; ++k) {
      d_T[0][k] = 2 * (G00 * W_[0][k] + G01 * W_[1][k]);
      d_T[1][k] = 2 * (G01 * W_[0][k] + G11 * W_[1][k]);
      Q[0][k] = G00 * X_[0][k] + G01 * X_[1][k];
      Q[1][k] = G01 * X_[0][k] + G11 * X_[1][k];
    }
    const auto between = [&](int i, int j) {
      return if_visible(X_[0][i] * Q[0][j] + X_[1][i] * Q[1][j]);
    };
    N[0] += between(0, 0), N[1] += between(0, 1), N[2] += between(0, 2);
    N[3] += between(1, 1), N[4] += between(1, 2), N[5] += between(2, 2);

    V d_p[3] = {jx_ * d_mean2d[0], jy_ * d_mean2d[1], d_depth};
    if (!in.ortho) {
      const auto along = [&](const V* d, const A* r) {
        return d[0] * r[0] + d[1] * r[1] + d[2] * r[2];
      };
      const V d_jx = along(d_T[0], camera.R[0]), d_jy = along(d_T[1], camera.R[1]);
      // of x / z and y / z in the Jacobian, where they are constant if they are clamped
      const V d_slope_x = -jx_ * along(d_T[0], camera.R[2]);
      const V d_slope_y = -jy_ * along(d_T[1], camera.R[2]);
      const V d_x = camera.fx * d_mean2d[0] + (clamped_x_ == x_ ? d_slope_x : V{});
      const V d_y = camera.fy * d_mean2d[1] + (clamped_y_ == y_ ? d_slope_y : V{});
      d_p[0] = d_x * nearness_, d_p[1] = d_y * nearness_;
      d_p[2] -= nearness_ * (x_ * d_x + y_ * d_y + clamped_x_ * d_slope_x + clamped_y_ * d_slope_y +
                             jx_ * d_jx + jy_ * d_jy);
    }
    for (int i = 0; i < 3; ++i) d_p[i] = if_visible(d_p[i]);
    for (int k = 0; k < 3; ++k) {
      d_mean[k] +=
          if_visible(camera.R[0][k] * d_p[0] + camera.R[1][k] * d_p[1] + camera.R[2][k] * d_p[2]);
      d_pose[k] = if_visible(d_p[0] * mean[k] + jx_ * d_T[0][k]);
      d_pose[4 + k] = if_visible(d_p[1] * mean[k] + jy_ * d_T[1][k]);
      d_pose[8 + k] = if_visible(d_p[2] * mean[k] + jxz_ * d_T[0][k] + jyz_ * d_T[1][k]);
      d_pose[4 * k + 3] = d_p[k];
    }
  }

 private:
  V p_[3], X_[2][3], W_[2][3];
  // the Jacobian, 1 / z, x / z and y / z
  V jx_, jy_, jxz_, jyz_, nearness_, x_, y_, clamped_x_, clamped_y_;
  // 1 / det, and 1 - compensation^2
  V inverse_det_, lost_;
};

}  // namespace rayfuse
