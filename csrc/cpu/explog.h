// exp, expm1, log and erf of a vector, by arithmetic alone: no table, no branch, within 1.5 ulp;
// +-inf, NaN, overflow and subnormals as the C library has them.
// exp x = 2^n e^r with n the integer next to x / ln 2, r = x - n ln 2, and e^r by Taylor's series.
// log x = e ln 2 + log(1 + f) with x = 2^e (1 + f) and 1 + f within a factor sqrt 2 of 1, where
// log(1 + f) = 2 artanh s = f - f^2 / 2 + s (f^2 / 2 + R), s = f / (2 + f) and
// R = 2 (s^2 / 3 + s^4 / 5 + ...).
#pragma once

#include <array>
#include <cmath>
#include <limits>

#include "simd.h"

namespace rayfuse {

template <class A>
struct ExpLog;
template <>
struct ExpLog<float> {
  typedef uint32_t words __attribute__((vector_size(kVectorBytes)));
  // the high part of ln 2 has so few digits that whole multiples of it are exact
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kSqrtHalf = 0x1.6a09e6p-1f;
  // beyond these exp and expm1 have reached their limits
  static constexpr float kExpMin = -104, kExpm1Min = -18, kExpMax = 89;
  static constexpr int kExpTerms = 6, kLogTerms = 4;
};
template <>
struct ExpLog<double> {
  typedef uint64_t words __attribute__((vector_size(kVectorBytes)));
  static constexpr double kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;
  static constexpr double kSqrtHalf = 0x1.6a09e667f3bcdp-1;
  static constexpr double kExpMin = -746, kExpm1Min = -38, kExpMax = 710;
  static constexpr int kExpTerms = 12, kLogTerms = 10;
};

template <class A>
constexpr int kMantissaBits = std::numeric_limits<A>::digits - 1;
// A sum with it is rounded to an integer, which stands in its lowest bits.
template <class A>
constexpr A kRounder = A(3 * (int64_t{1} << (kMantissaBits<A> - 1)));

template <class A>
typename ExpLog<A>::words bits_of(vec<A> x) {
  return (typename ExpLog<A>::words)x;
}
template <class A>
typename ExpLog<A>::words bits_of(A x) {
  return bits_of<A>(x - vec<A>{});
}

template <class A>
vec<A> to_integer(vec<A> x) {
  const vec<A> rounded = x + kRounder<A>;
  return rounded - kRounder<A>;
}
// 2^n where that is a normal number.
template <class A>
vec<A> power_of_two(vec<A> n) {
  const auto exponent = bits_of<A>(n + kRounder<A>) << kMantissaBits<A>;
  return (vec<A>)(exponent + bits_of(A(1)));
}

template <class A, size_t terms>
vec<A> polynomial(vec<A> x, const std::array<A, terms>& factors) {
  vec<A> sum = factors[terms - 1] - vec<A>{};
  for (int k = terms - 2; k >= 0; --k) sum = sum * x + factors[k];
  return sum;
}

// x = n ln 2 + r
template <class A>
struct ExpParts {
  explicit ExpParts(vec<A> x)
      : rounded(x * A(0x1.71547652b82fep+0) + kRounder<A>),
        n(rounded - kRounder<A>),
        r(x - n * ExpLog<A>::kLn2High - n * ExpLog<A>::kLn2Low) {}

  // e^r - 1 - r
  vec<A> rest() const {
    static constexpr auto kInverseFactorials = [] {
      std::array<A, ExpLog<A>::kExpTerms> out;
      double factorial = 1;
      for (size_t k = 0; k < out.size(); ++k) out[k] = A(1 / (factorial *= k + 2));
      return out;
    }();
    return r * r * polynomial<A>(r, kInverseFactorials);
  }

  // 2^n where that is a normal number.
  vec<A> power() const { return (vec<A>)((bits_of<A>(rounded) << kMantissaBits<A>)+bits_of(A(1))); }

  vec<A> rounded, n, r;
};

template <class A>
vec<A> clamp(vec<A> x, A least, A most) {
  x = x < least ? least : x;
  return x > most ? most : x;
}

template <class A>
vec<A> exp_of(vec<A> x) {
  const ExpParts<A> parts(clamp<A>(x, ExpLog<A>::kExpMin, ExpLog<A>::kExpMax));
  // in two steps, the second of which may overflow, or round to a subnormal
  const vec<A> half = to_integer<A>(A(0.5) * parts.n);
  return (1 + (parts.r + parts.rest())) * power_of_two<A>(half) * power_of_two<A>(parts.n - half);
}

template <class A>
vec<A> expm1_of(vec<A> x) {
  const ExpParts<A> parts(clamp<A>(x, ExpLog<A>::kExpm1Min, ExpLog<A>::kExpMax));
  // half of everything, as 2^n may be too large
  const vec<A> scale = power_of_two<A>(parts.n - 1);
  const vec<A> half = (scale - A(0.5)) + scale * parts.r + scale * parts.rest();
  return x * x < std::numeric_limits<A>::min() ? x : 2 * half;
}

// e^-x and 1 - e^-x for x >= 0, at hardly more than the price of one; e^-x is 0 where it would be
// subnormal.
template <class A>
struct Decay {
  static constexpr A kMost = -std::numeric_limits<A>::min_exponent * A(0.69);

  explicit Decay(vec<A> x) {
    const ExpParts<A> parts(-(x > kMost ? kMost - vec<A>{} : x));
    const vec<A> scale = parts.power(), tail = scale * (parts.r + parts.rest());
    passing = x > kMost ? vec<A>{} : scale + tail;
    stopped = (1 - scale) - tail;
  }

  vec<A> passing, stopped;
};

// exp of x <= 0, at two thirds of the cost: 0 where it would come near the subnormal numbers.
template <class A>
vec<A> exp_of_nonpositive(vec<A> x) {
  return Decay<A>(-x).passing;
}

template <class A>
vec<A> log_of(vec<A> x) {
  using Limits = std::numeric_limits<A>;
  static constexpr auto kFactors = [] {
    std::array<A, ExpLog<A>::kLogTerms> out;
    for (size_t k = 0; k < out.size(); ++k) out[k] = A(2.0 / (2 * k + 3));
    return out;
  }();
  constexpr int kLift = kMantissaBits<A> + 2, kBias = Limits::max_exponent - 1;
  const auto subnormal = x < Limits::min();
  const auto bits = bits_of<A>(subnormal ? x * A(int64_t{1} << kLift) : x);
  const auto exponent =
      (bits + (bits_of(A(1)) - bits_of(ExpLog<A>::kSqrtHalf))) >> kMantissaBits<A>;
  const vec<A> f = (vec<A>)(bits - (exponent << kMantissaBits<A>)+bits_of(A(1))) - 1;
  const vec<A> biased = (vec<A>)(exponent + bits_of(kRounder<A>));
  const vec<A> e = (biased - (kRounder<A> + kBias)) - (subnormal ? A(kLift) - vec<A>{} : vec<A>{});
  const vec<A> s = f / (2 + f), z = s * s, half = A(0.5) * f * f;
  const vec<A> bent = s * (half + z * polynomial<A>(z, kFactors)) + e * ExpLog<A>::kLn2Low;
  const vec<A> log = e * ExpLog<A>::kLn2High - ((half - bent) - f);
  const vec<A> outside = x == 0 ? -Limits::infinity() - vec<A>{} : Limits::quiet_NaN() - vec<A>{};
  return x > 0 ? (x < Limits::infinity() ? log : x) : outside;
}

// Up to 7/8 erf x = x + x P(x^2), beyond it 1 - exp(-x Q(x)), which from 4 on is 1. P and Q have
// the least greatest error, 0.9e-8 and 0.3e-8 of erf: least squares in Chebyshev polynomials,
// weighted anew by their errors (Lawson) against double precision. Of doubles, which are for tests,
// lane by lane from the C library.
template <class A>
vec<A> erf_of(vec<A> x) {
  if constexpr (std::is_same_v<A, double>) {
    for (int i = 0; i < kLanes<A>; ++i) x[i] = std::erf(x[i]);
    return x;
  } else {
    static constexpr std::array<A, 6> kNear = {0x1.06eba6p-3f,  -0x1.81270cp-2f, 0x1.ce211ep-4f,
                                               -0x1.b6f38ap-6f, 0x1.49c9f8p-8f,  -0x1.453a98p-11f};
    static constexpr std::array<A, 6> kFar = {0x1.20e6dap+0f,  0x1.457952p-1f, 0x1.af4becp-4f,
                                              -0x1.7764c2p-6f, 0x1.a649bcp-9f, -0x1.c27acap-13f};
    const vec<A> magnitude = clamp<A>(x < 0 ? -x : x, 0, 4);
    const vec<A> rest = exp_of_nonpositive<A>(-magnitude * polynomial<A>(magnitude, kFar));
    const vec<A> far = x < 0 ? rest - 1 : 1 - rest;
    return magnitude < A(0.875) ? x + x * polynomial<A>(x * x, kNear) : far;
  }
}

}  // namespace rayfuse
