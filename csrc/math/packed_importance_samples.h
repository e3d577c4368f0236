// Samples of a histogram, on the CPU and in CUDA. Sample i of n is where the cdf is u_i = floor +
// (i + bias) (ceiling - floor) / n: in a bin with edges l and r at e_l + (u_i - cdf_l) (e_r - e_l)
// / (cdf_r - cdf_l). All is rounded as PyTorch rounds it, lest a sample come to lie in another bin
// of a steep cdf. The includer has defined multiply(a, b), which is not fused with a sum.
#pragma once

#include <cstdint>

#include "../accumulator.h"
#include "../device.h"

namespace rayfuse {

// Of one ray's samples, what the cdf is there.
template <class A>
struct EvenSteps {
  A floor, step, bias;

  RAYFUSE_EVERYWHERE EvenSteps(A floor, A ceiling, A bias, int64_t n)
      : floor(floor), step((ceiling - floor) / static_cast<A>(n)), bias(bias) {}

  // V is a vector of many or a number of type A.
  template <class V>
  RAYFUSE_DEVICE V at(V i) const {
    return multiply(i + bias, step) + floor;
  }
};

// One of its edges.
template <class A>
struct Corner {
  A edge, cdf;
};

// Where between two of them the cdf is u: in the middle if it rises by less than 1e-10. No rounding
// leads beyond the right one, so that samples are in order.
template <class A>
RAYFUSE_DEVICE A position(A u, const Corner<A>& left, const Corner<A>& right) {
  const A rise = right.cdf - left.cdf, width = right.edge - left.edge;
  if (rise < A(1e-10)) return (left.edge + right.edge) * A(0.5);
  const A t = multiply(u - left.cdf, width / rise) + left.edge;
  return t > right.edge ? right.edge : t;
}

// Between two samples their intervals meet.
template <class A>
RAYFUSE_DEVICE A middle(A t, A next) {
  return (t + next) * A(0.5);
}

// Where the interval of the first or last of samples ends: as far from it as the one to the other
// side, but not beyond an edge of the ray. NaN stays NaN, as in torch.maximum.
template <bool is_first, class A>
RAYFUSE_DEVICE A outer_end(A t, A neighbour, A limit) {
  const A end = t - (neighbour - t) * A(0.5);
  const bool within = is_first ? end >= limit : end <= limit;
  return within || end != end ? end : limit;
}

}  // namespace rayfuse
