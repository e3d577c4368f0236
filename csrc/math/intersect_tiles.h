// Which tiles a splat may be listed in, on the CPU and in CUDA: V is a vector of A, or A itself.
#pragma once

#include <cstdint>
#include <limits>

#include "../device.h"

namespace rayfuse {

template <class A>
struct Splats {
  const A* means2d;          // [P, 2]
  const A* radii;            // [P, 2]
  const A* depths;           // [P]
  const A* conics;           // [P, 3] or null
  const A* most;             // [P], the sigma up to which a splat is seen, or null
  const int64_t* image_ids;  // [P], or null: as many splats of each image
  int64_t P, images;
  int32_t of_each;  // splats of an image, where all have as many
  int32_t X, Y;     // tiles of an image
  A size, center;

  // Less than 2^31, as P is: the caller has checked it.
  RAYFUSE_EVERYWHERE int64_t tiles() const { return images * Y * X; }
  RAYFUSE_EVERYWHERE int64_t image_of(int64_t p) const {
    return image_ids ? image_ids[p] : static_cast<int32_t>(p) / of_each;
  }
  // Whether it has a place in the order, and an image, whatever its box.
  RAYFUSE_EVERYWHERE bool exists(int64_t p) const {
    const A depth = depths[p];
    const bool placed = depth - depth == 0;
    return placed && (!image_ids || (image_ids[p] >= 0 && image_ids[p] < images));
  }
};

// The tiles that a box reaches along x or y, of so many: from `low`, rounded down, to `high`,
// rounded up. `found` where the box exists.
template <class V, class A>
struct Reach {
  V low, high;
  decltype(V() < V()) found;

  RAYFUSE_EVERYWHERE Reach(V mean, V radius, A size, V count) {
    const V middle = mean / size, reach = radius / size, none{};
    low = middle - reach;
    high = middle + reach;
    found = (radius > 0) & (high - high == 0);
    low = low > 0 ? low : none;
    low = low < count ? low : count;
    high = high > 0 ? high : none;
    high = high < count ? high : count;
  }
};

// sigma = (a x^2 + c y^2) / 2 + b x y around a mean.
template <class A>
class Ellipse {
 public:
  A x, y, most;

  RAYFUSE_EVERYWHERE Ellipse(const Splats<A>& splats, int64_t p)
      : x(splats.means2d[2 * p]),
        y(splats.means2d[2 * p + 1]),
        most(splats.most[p]),
        a_(splats.conics[3 * p]),
        b_(splats.conics[3 * p + 1]),
        c_(splats.conics[3 * p + 2]),
        along_x_(-b_ / a_),
        along_y_(-b_ / c_) {}

  // The least sigma of squares, one corner of which is (left, top) from the mean, less roundings.
  // It is on one of the two sides that face the mean, on which sigma is a parabola.
  template <class V>
  RAYFUSE_EVERYWHERE V least_sigma(V left, V top, A side) const {
    const V none{}, right = left + side, bottom = top + side;
    const V facing_x = (left > 0 ? left : none) + (right < 0 ? right : none);
    const V facing_y = (top > 0 ? top : none) + (bottom < 0 ? bottom : none);
    const V on_x = sigma<V>(facing_x, clamp<V>(along_y_ * facing_x, top, bottom));
    const V on_y = sigma<V>(clamp<V>(along_x_ * facing_y, left, right), facing_y);
    return on_y < on_x ? on_y : on_x;
  }

 private:
  // Terms that cancel may each be this wrong.
  static constexpr A kRounding = 16 * std::numeric_limits<A>::epsilon();

  template <class V>
  RAYFUSE_EVERYWHERE V sigma(V x, V y) const {
    const V squares = A(0.5) * (a_ * x * x + c_ * y * y);
    return squares + b_ * x * y - kRounding * squares;
  }
  // Of what is no number, the least.
  template <class V>
  RAYFUSE_EVERYWHERE static V clamp(V x, V least, V most) {
    const V above = x > least ? x : least;
    return above < most ? above : most;
  }

  A a_, b_, c_, along_x_, along_y_;
};

}  // namespace rayfuse
