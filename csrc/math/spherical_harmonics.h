// Real spherical harmonics Y_k of a unit vector (x, y, z) and their gradient, on the CPU, V being a
// register of A, and in CUDA, V being A. With (x + i y)^m = c + i s, that of l and m, number
// l^2 + l + m, is a polynomial in z times c, or times s for -m. docs/splats.md
#pragma once

#include <cstdint>

#include "../device.h"

namespace rayfuse {

constexpr int kMostDegree = 4;

RAYFUSE_EVERYWHERE constexpr int count_harmonics(int degree) { return (degree + 1) * (degree + 1); }

// The factors of z^(l-m), z^(l-m-2), ... of the polynomial of l and m: that derivative of
// Legendre's polynomial, normalised, with the sign of Condon and Shortley.
template <int l, int m>
constexpr double kLegendre[3] = {};
template <>
constexpr double kLegendre<0, 0>[3] = {0.28209479177387814};
template <>
constexpr double kLegendre<1, 0>[3] = {0.4886025119029199};
template <>
constexpr double kLegendre<1, 1>[3] = {-0.4886025119029199};
template <>
constexpr double kLegendre<2, 0>[3] = {0.9461746957575601, -0.31539156525252005};
template <>
constexpr double kLegendre<2, 1>[3] = {-1.0925484305920792};
template <>
constexpr double kLegendre<2, 2>[3] = {0.5462742152960396};
template <>
constexpr double kLegendre<3, 0>[3] = {1.865881662950577, -1.1195289977703462};
template <>
constexpr double kLegendre<3, 1>[3] = {-2.285228997322329, 0.4570457994644658};
template <>
constexpr double kLegendre<3, 2>[3] = {1.445305721320277};
template <>
constexpr double kLegendre<3, 3>[3] = {-0.5900435899266435};
template <>
constexpr double kLegendre<4, 0>[3] = {3.702494142032151, -3.1735664074561293, 0.31735664074561293};
template <>
constexpr double kLegendre<4, 1>[3] = {-4.683325804901024, 2.0071396306718676};
template <>
constexpr double kLegendre<4, 2>[3] = {3.3116114351514603, -0.47308734787878004};
template <>
constexpr double kLegendre<4, 3>[3] = {-1.7701307697799304};
template <>
constexpr double kLegendre<4, 4>[3] = {0.6258357354491761};

// Factor i of a polynomial, and of its derivative.
template <class A, int l, int m, int i>
constexpr A kFactor = A(kLegendre<l, m>[i]);
template <class A, int l, int m, int i>
constexpr A kSlope = A((l - m - 2 * i) * kLegendre<l, m>[i]);

template <class A, int l, int m, class V>
RAYFUSE_EVERYWHERE V legendre(V z) {
  V value = V{} + kFactor<A, l, m, 0>;
  if constexpr (l - m >= 2) value = value * (z * z) + kFactor<A, l, m, 1>;
  if constexpr (l - m >= 4) value = value * (z * z) + kFactor<A, l, m, 2>;
  return (l - m) % 2 ? value * z : value;
}
template <class A, int l, int m, class V>
RAYFUSE_EVERYWHERE V legendre_slope(V z) {
  if constexpr (l == m) return V{};
  V value = V{} + kSlope<A, l, m, 0>;
  // the last factor of an even polynomial is constant
  if constexpr (l - m >= 3) value = value * (z * z) + kSlope<A, l, m, 1>;
  return (l - m) % 2 ? value : value * z;
}

template <class A, int degree, int m, int l, class V>
RAYFUSE_EVERYWHERE void harmonics_from(V z, V c, V s, V* Y) {
  if constexpr (l <= degree) {
    const V polynomial = legendre<A, l, m>(z);
    if constexpr (m > 0) Y[l * l + l - m] = polynomial * s;
    Y[l * l + l + m] = polynomial * c;
    harmonics_from<A, degree, m, l + 1>(z, c, s, Y);
  }
}

template <class A, int degree, int m = 0, class V>
RAYFUSE_EVERYWHERE void harmonics_up_to(V x, V y, V z, V* Y, V c = V{} + A(1), V s = V{}) {
  if constexpr (m <= degree) {
    harmonics_from<A, degree, m, m>(z, c, s, Y);
    harmonics_up_to<A, degree, m + 1>(x, y, z, Y, x * c - y * s, x * s + y * c);
  }
}

// Writes all Y_k up to a degree.
template <class A, int least = 0, class V>
RAYFUSE_EVERYWHERE void harmonics(int64_t degree, V x, V y, V z, V* Y) {
  if (degree == least) {
    harmonics_up_to<A, least>(x, y, z, Y);
  } else if constexpr (least < kMostDegree) {
    harmonics<A, least + 1>(degree, x, y, z, Y);
  }
}

template <class A, int degree, int m, int l, class V>
RAYFUSE_EVERYWHERE void gradient_from(V z, V c, V s, const V* d_Y, V& d_z, V& d_c, V& d_s) {
  if constexpr (l <= degree) {
    const V polynomial = legendre<A, l, m>(z), slope = legendre_slope<A, l, m>(z);
    const V up = d_Y[l * l + l + m];
    d_z += slope * (c * up);
    d_c += polynomial * up;
    if constexpr (m > 0) {
      const V down = d_Y[l * l + l - m];
      d_z += slope * (s * down);
      d_s += polynomial * down;
    }
    gradient_from<A, degree, m, l + 1>(z, c, s, d_Y, d_z, d_c, d_s);
  }
}

// (c, s) change with x as m times those of m - 1.
template <class A, int degree, int m = 0, class V>
RAYFUSE_EVERYWHERE void gradient_up_to(V x, V y, V z, const V* d_Y, V& d_x, V& d_y, V& d_z,
                                       V c_before = V{}, V s_before = V{}, V c = V{} + A(1),
                                       V s = V{}) {
  if constexpr (m <= degree) {
    V d_c = {}, d_s = {};
    gradient_from<A, degree, m, m>(z, c, s, d_Y, d_z, d_c, d_s);
    d_x += A(m) * (c_before * d_c + s_before * d_s);
    d_y += A(m) * (c_before * d_s - s_before * d_c);
    gradient_up_to<A, degree, m + 1>(x, y, z, d_Y, d_x, d_y, d_z, c, s, x * c - y * s,
                                     x * s + y * c);
  }
}

// Adds sum_k d_Y_k times the gradient of Y_k to (d_x, d_y, d_z).
template <class A, int least = 0, class V>
RAYFUSE_EVERYWHERE void add_gradient(int64_t degree, V x, V y, V z, const V* d_Y, V& d_x, V& d_y,
                                     V& d_z) {
  if (degree == least) {
    gradient_up_to<A, least>(x, y, z, d_Y, d_x, d_y, d_z);
  } else if constexpr (least < kMostDegree) {
    add_gradient<A, least + 1>(degree, x, y, z, d_Y, d_x, d_y, d_z);
  }
}

}  // namespace rayfuse
