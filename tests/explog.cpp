// exp, expm1, log and erf of csrc/cpu/explog.h against the C library's in higher precision. Prints
// for each function and type the largest error, in units of the last place of the right answer; an
// infinity, a NaN or the sign of a zero that differs counts as infinitely wrong.
#include "../csrc/cpu/explog.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>

using namespace rayfuse;

template <class A, class Wide>
double error(A got, Wide right) {
  const A nearest = static_cast<A>(right);
  if (std::isnan(nearest)) return std::isnan(got) ? 0 : INFINITY;
  if (got == nearest) return std::signbit(got) == std::signbit(nearest) ? 0 : INFINITY;
  // one step from an overflow is an error of one place
  const A most = std::numeric_limits<A>::max();
  if (std::isinf(got) && std::abs(right) >= Wide(std::nextafter(most, A(0)))) return 1;
  if (std::isinf(got) || std::isinf(nearest) || std::isnan(got)) return INFINITY;
  const A size = std::abs(nearest);
  const Wide place = size == most ? Wide(most) - std::nextafter(most, A(0))
                                  : Wide(std::nextafter(size, most)) - Wide(size);
  return static_cast<double>(std::abs(Wide(got) - right) / place);
}

template <class A, class F, class Wide>
void check(const char* name, const F& f, Wide (*right)(Wide), uint64_t step) {
  using Bits = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  const uint64_t last = std::numeric_limits<Bits>::max();
  double worst = 0;
  A at = 0;
  const auto try_all = [&](const vec<A>& x) {
    const vec<A> got = f(x);
    for (int i = 0; i < kLanes<A>; ++i) {
      const double here = error<A, Wide>(got[i], right(Wide(x[i])));
      if (here > worst) worst = here, at = x[i];
    }
  };
  const auto from_bits = [](uint64_t bits) {
    const Bits cut = static_cast<Bits>(bits);
    A x;
    std::memcpy(&x, &cut, sizeof x);
    return x;
  };
  vec<A> x = {};
  int lane = 0;
  const auto add = [&](A value) {
    x[lane] = value;
    if (++lane == kLanes<A>) try_all(x), lane = 0;
  };
  // every so many bit patterns, from the lowest to the highest
  for (uint64_t i = 0; i <= last / step; ++i) add(from_bits(i * step));
  // near all powers of two, on both sides and with both signs; 0, infinity and NaN are among them
  constexpr int mantissa = kMantissaBits<A>;
  for (uint64_t power = 0; power >> (sizeof(A) * 8 - mantissa) == 0; ++power) {
    for (int i = -8; i <= 8; ++i) add(from_bits((power << mantissa) + i));
  }
  // where functions overflow, underflow and change their reduction: near all multiples of ln 2 / 2
  for (int n = -2200; n <= 2200; ++n) {
    A y = A(n * 0.34657359027997264);
    for (int i = 0; i < 16; ++i, y = std::nextafter(y, A(1e30))) add(y);
  }
  while (lane) add(A(1));
  std::printf("%s %.3f %a\n", name, worst, double(at));
}

// exp, as far as exp_of_nonpositive promises it.
template <class Wide, class A>
Wide exp_of_nonpositive_in(Wide x) {
  return x < -Decay<A>::kMost ? 0 : x > 0 ? Wide(NAN) : std::exp(x);
}
template <class A>
vec<A> exp_of_nonpositive_or_nan(vec<A> x) {
  return x > 0 ? NAN - vec<A>{} : exp_of_nonpositive<A>(x);
}

int main(int, char** argv) {
  const uint64_t step = std::strtoull(argv[1], nullptr, 10);
  check<float, vec<float> (*)(vec<float>), double>("exp_float", exp_of<float>, std::exp, step);
  check<float, vec<float> (*)(vec<float>), double>("expm1_float", expm1_of<float>, std::expm1,
                                                   step);
  check<float, vec<float> (*)(vec<float>), double>("log_float", log_of<float>, std::log, step);
  check<float, vec<float> (*)(vec<float>), double>("erf_float", erf_of<float>, std::erf, step);
  check<float, vec<float> (*)(vec<float>), double>("exp_of_nonpositive_float",
                                                   exp_of_nonpositive_or_nan<float>,
                                                   exp_of_nonpositive_in<double, float>, step);
  const uint64_t wide_step = step << 32 | 0x12345;
  check<double, vec<double> (*)(vec<double>), long double>("exp_double", exp_of<double>, std::exp,
                                                           wide_step);
  check<double, vec<double> (*)(vec<double>), long double>("expm1_double", expm1_of<double>,
                                                           std::expm1, wide_step);
  check<double, vec<double> (*)(vec<double>), long double>("log_double", log_of<double>, std::log,
                                                           wide_step);
  check<double, vec<double> (*)(vec<double>), long double>("erf_double", erf_of<double>, std::erf,
                                                           wide_step);
  check<double, vec<double> (*)(vec<double>), long double>(
      "exp_of_nonpositive_double", exp_of_nonpositive_or_nan<double>,
      exp_of_nonpositive_in<long double, double>, wide_step);
}
