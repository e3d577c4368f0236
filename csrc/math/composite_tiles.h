// What the kernels of tile compositing take, on the CPU and in CUDA.
#pragma once

#include <cstdint>

#include "../accumulator.h"
#include "../device.h"

namespace rayfuse {

// Sums over the pixels of a tile, of a splat: with h = alpha d_alpha of a pixel, h, h dx, h dx^2,
// h dy, h dx dy, h dy^2; then, where they are wanted, |h (a dx + b dy)|, |h (b dx + c dy)|.
constexpr int kMoments = 6;

template <class T>
struct Scene {
  using A = accumulator<T>;

  const A* means2d;        // [P, 2]
  const A* conics;         // [P, 3]
  const T* colors;         // [P, D]
  const A* opacities;      // [P]
  const int64_t* offsets;  // [I, Y, X]
  const int64_t* ids;      // [M]
  const A* depths;         // [P] or null
  const A* background;     // [I, D], [I, H, W, D] or null
  const int64_t* masks;    // [I, Y, X] or null
  const A* begun;          // [I, H, W] transmittance before the lists; or null for 1
  int64_t P, D, I, Y, X, M, H, W, size;
  bool background_of_pixels;
  // whether the backward wants the sums of |d_means2d|
  bool absolute;
  // the last is the largest transmittance that ends a pixel
  A max_alpha, min_alpha, center, ending;

  RAYFUSE_EVERYWHERE int64_t tiles() const { return I * Y * X; }
  // With the depth.
  RAYFUSE_EVERYWHERE int64_t channels() const { return D + (depths != nullptr); }
  // Sums that the backward has of a splat: moments, and channels behind them.
  RAYFUSE_EVERYWHERE int64_t moments() const { return kMoments + (absolute ? 2 : 0); }
  RAYFUSE_EVERYWHERE int64_t sums() const { return moments() + channels(); }
  RAYFUSE_EVERYWHERE int64_t list_end(int64_t t) const {
    return t + 1 < tiles() ? offsets[t + 1] : M;
  }
  RAYFUSE_EVERYWHERE const A* background_at(int64_t image, int64_t pixel) const {
    return background ? background + (background_of_pixels ? pixel : image) * D : nullptr;
  }
};

// Gradients of the outputs, null where there are none.
template <class A>
struct Incoming {
  const A* image;    // [I, H, W, D]
  const A* opacity;  // [I, H, W]
  const A* depth;    // [I, H, W]
  const A* median;   // [I, H, W]
};

// The gradients of the splats, null where they are not wanted.
template <class T>
struct Outgoing {
  using A = accumulator<T>;

  A* means2d;    // [P, 2]
  A* conics;     // [P, 3]
  T* colors;     // [P, D]
  A* opacities;  // [P]
  A* depths;     // [P]
  A* absolute;   // [P, 2]

  // Those of splat p from its first kMoments; of one that no tile has they are 0, and its conic may
  // be anything.
  RAYFUSE_EVERYWHERE void write(const Scene<T>& scene, int64_t p, bool met, A h, A h_x, A h_xx,
                                A h_y, A h_xy, A h_yy) const {
    const A* const conic = scene.conics + 3 * p;
    met = met && 0 * (conic[0] + conic[1] + conic[2]) == 0;
    const A a = met ? conic[0] : A(0), b = met ? conic[1] : A(0), c = met ? conic[2] : A(0);
    if (means2d) {
      means2d[2 * p] = -(a * h_x + b * h_y);
      means2d[2 * p + 1] = -(b * h_x + c * h_y);
    }
    if (conics) {
      conics[3 * p] = A(-0.5) * h_xx;
      conics[3 * p + 1] = -h_xy;
      conics[3 * p + 2] = A(-0.5) * h_yy;
    }
    if (opacities) opacities[p] = h != 0 ? h / scene.opacities[p] : A(0);
  }
};

}  // namespace rayfuse
