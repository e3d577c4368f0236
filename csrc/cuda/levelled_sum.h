// A sum of many terms.
#pragma once

#include "rays.h"

namespace rayfuse {

// So many terms add up in one level, and what the levels hold in a second one, with what that
// rounds off: a million terms lose no more than a few hundred do.
constexpr int kInLevel = 64;

template <class A>
class LevelledSum {
 public:
  __device__ void add(A x) {
    if (terms_++ == kInLevel) {
      close();
      terms_ = 1;
    }
    near_ += x;
  }
  // Adds x y, for callers that close each level themselves.
  __device__ void add_product(A x, A y) { near_ = fma(x, y, near_); }
  __device__ void close() {
    const A term = near_ - lost_, sum = far_ + term;
    lost_ = (sum - far_) - term;
    far_ = sum;
    near_ = 0;
  }
  __device__ A total() const { return far_ + near_; }

 private:
  A near_ = 0, far_ = 0, lost_ = 0;
  int terms_ = 0;
};

}  // namespace rayfuse
