// What interlevel_loss and packed_interlevel_loss share.
#pragma once

namespace rayfuse {

// What of a sample is not covered, and its ratio to the weight; exactly 0 where all is.
template <class A>
struct Uncovered {
  A r = 0, u = 0;

  __device__ Uncovered(A w, A w_outer, A eps) {
    const A rest = w - w_outer;
    if (!(rest <= 0)) r = rest, u = rest / (w + eps);
  }
};

}  // namespace rayfuse
