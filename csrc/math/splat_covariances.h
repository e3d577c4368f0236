// Covariances R diag(e)^2 R^T of splats, R the rotation by a quaternion q of any length, and their
// gradients; on the CPU, V being a register, and in CUDA. `turn` is 2 / |q|^2, or 0 for a
// quaternion that does not rotate. docs/splats.md
#pragma once

#include "../device.h"

namespace rayfuse {

// Row by row.
template <class V>
struct Matrix {
  V at[3][3];
};

// Where an entry of a symmetric matrix is in its upper triangle: xx, xy, xz, yy, yz, zz.
RAYFUSE_EVERYWHERE constexpr int in_triangle(int i, int j) {
  return i <= j ? i * (5 - i) / 2 + j : in_triangle(j, i);
}
// How many values a matrix has, all or those of its upper triangle.
RAYFUSE_EVERYWHERE constexpr int matrix_values(bool triu) { return triu ? 6 : 9; }

template <class V>
RAYFUSE_EVERYWHERE Matrix<V> rotation(const V* q, V turn) {
  const V w = q[0], x = q[1], y = q[2], z = q[3];
  return {{{1 - turn * (y * y + z * z), turn * (x * y - w * z), turn * (x * z + w * y)},
           {turn * (x * y + w * z), 1 - turn * (x * x + z * z), turn * (y * z - w * x)},
           {turn * (x * z - w * y), turn * (y * z + w * x), 1 - turn * (x * x + y * y)}}};
}

// Writes R diag(e)^2 R^T, all of it or its upper triangle.
template <class V>
RAYFUSE_EVERYWHERE void write_covariance(const Matrix<V>& R, const V* e, bool triu, V* out) {
  for (int i = 0; i < 3; ++i) {
    const V a0 = R.at[i][0] * e[0], a1 = R.at[i][1] * e[1], a2 = R.at[i][2] * e[2];
    for (int k = i; k < 3; ++k) {
      const V* const b = R.at[k];
      const V entry = a0 * (b[0] * e[0]) + a1 * (b[1] * e[1]) + a2 * (b[2] * e[2]);
      if (triu) {
        out[in_triangle(i, k)] = entry;
      } else {
        out[3 * i + k] = out[3 * k + i] = entry;
      }
    }
  }
}

// R^T G R, G being the gradient of what is written above plus its transpose: how the loss changes
// along the splat's own axes, twice.
template <class V>
RAYFUSE_EVERYWHERE Matrix<V> along_axes(const Matrix<V>& R, bool triu, const V* d_covariance) {
  Matrix<V> turned = {}, out = {};
  for (int i = 0; i < 3; ++i) {
    for (int k = 0; k < 3; ++k) {
      V g = triu ? d_covariance[in_triangle(i, k)]
                 : d_covariance[3 * i + k] + d_covariance[3 * k + i];
      // of a triangle the others stand for both entries of a pair
      if (triu && i == k) g += g;
      for (int j = 0; j < 3; ++j) turned.at[i][j] += g * R.at[k][j];
    }
  }
  for (int i = 0; i < 3; ++i) {
    for (int k = 0; k < 3; ++k) {
      for (int j = 0; j < 3; ++j) out.at[j][k] += R.at[i][j] * turned.at[i][k];
    }
  }
  return out;
}

// The gradient of q: `turn` q (0, torque) as quaternions, which has no part along q. The torque is
// what turning the splat about its own axes adds to the loss; none about one of a round section.
template <class V>
RAYFUSE_EVERYWHERE void write_d_quaternion(const Matrix<V>& along, const V* e, const V* q, V turn,
                                           V* d_q) {
  const V w = q[0], x = q[1], y = q[2], z = q[3];
  const V a = along.at[1][2] * ((e[1] - e[2]) * (e[1] + e[2]));
  const V b = along.at[0][2] * ((e[2] - e[0]) * (e[2] + e[0]));
  const V c = along.at[0][1] * ((e[0] - e[1]) * (e[0] + e[1]));
  d_q[0] = -turn * (x * a + y * b + z * c);
  d_q[1] = turn * (w * a + y * c - z * b);
  d_q[2] = turn * (w * b + z * a - x * c);
  d_q[3] = turn * (w * c + x * b - y * a);
}

}  // namespace rayfuse
