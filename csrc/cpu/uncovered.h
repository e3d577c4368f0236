// What the interlevel losses ask of a weight and its bound.
#pragma once

#include "simd.h"

namespace rayfuse {

// What of x is not covered, and its ratio to a weight; exactly 0 where all is.
template <class A>
struct Uncovered {
  vec<A> r, u;

  Uncovered(vec<A> x, vec<A> bound, vec<A> weight, A eps) {
    const vec<A> zero = {}, rest = x - bound;
    r = rest <= zero ? zero : rest;
    u = rest <= zero ? zero : rest / (weight + eps);
  }
};

}  // namespace rayfuse
