// What one would write first: a pixel at a time, one thread, gsplat's formulas, with the test that
// spares exp where alpha would be too small. RGB; gradients of image and alpha.
#include <cmath>
#include <cstdint>

namespace {

constexpr float kMaxAlpha = 0.999f, kMinAlpha = 1.f / 255, kEnding = 1e-4f, kFarthest = 5.55f;

struct Tiles {
  const float *means2d, *conics, *colors, *opacities;
  const int64_t *offsets, *ids;
  int64_t W, H, X, tiles, M;

  template <class F>
  void each_pixel(const F& f) const {
    for (int64_t y = 0; y < H; ++y) {
      for (int64_t x = 0; x < W; ++x) {
        const int64_t t = y / 16 * X + x / 16;
        f(y * W + x, x + 0.5f, y + 0.5f, offsets[t], t + 1 < tiles ? offsets[t + 1] : M);
      }
    }
  }
  float sigma(int64_t g, float dx, float dy) const {
    const float* q = conics + 3 * g;
    return 0.5f * (q[0] * dx * dx + q[2] * dy * dy) + q[1] * dx * dy;
  }
};

}  // namespace

extern "C" void forward(const Tiles* s, float* image, float* alpha, float* passing, int64_t* last) {
  s->each_pixel([&](int64_t pixel, float x, float y, int64_t begin, int64_t end) {
    float T = 1, sum[3] = {};
    int64_t stop = begin;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t g = s->ids[k];
      const float sigma = s->sigma(g, s->means2d[2 * g] - x, s->means2d[2 * g + 1] - y);
      if (sigma < 0 || sigma > kFarthest) continue;
      const float own = std::fmin(s->opacities[g] * std::exp(-sigma), kMaxAlpha);
      if (own < kMinAlpha) continue;
      const float after = T * (1 - own);
      if (after <= kEnding) break;
      for (int c = 0; c < 3; ++c) sum[c] += own * T * s->colors[3 * g + c];
      T = after;
      stop = k + 1;
    }
    for (int c = 0; c < 3; ++c) image[3 * pixel + c] = sum[c];
    alpha[pixel] = 1 - T;
    passing[pixel] = T;
    last[pixel] = stop;
  });
}

extern "C" void backward(const Tiles* s, const float* passing, const int64_t* last,
                         const float* d_image, const float* d_alpha, float* d_means2d,
                         float* d_conics, float* d_colors, float* d_opacities) {
  s->each_pixel([&](int64_t pixel, float x, float y, int64_t begin, int64_t) {
    float T = passing[pixel], behind = 0;
    const float* d = d_image + 3 * pixel;
    const float d_passing = -d_alpha[pixel] * T;
    for (int64_t k = last[pixel]; k-- > begin;) {
      const int64_t g = s->ids[k];
      const float dx = s->means2d[2 * g] - x, dy = s->means2d[2 * g + 1] - y;
      const float sigma = s->sigma(g, dx, dy);
      if (sigma < 0 || sigma > kFarthest) continue;
      const float bell = std::exp(-sigma), most = s->opacities[g] * bell;
      const float own = std::fmin(most, kMaxAlpha);
      if (own < kMinAlpha) continue;
      const float again = 1 / (1 - own);
      T *= again;
      float shade = 0;
      for (int c = 0; c < 3; ++c) {
        d_colors[3 * g + c] += own * T * d[c];
        shade += s->colors[3 * g + c] * d[c];
      }
      const float d_own = shade * T - (behind + d_passing) * again;
      behind += own * T * shade;
      if (most > kMaxAlpha) continue;
      const float d_sigma = -most * d_own, *q = s->conics + 3 * g;
      d_opacities[g] += bell * d_own;
      d_conics[3 * g] += 0.5f * d_sigma * dx * dx;
      d_conics[3 * g + 1] += d_sigma * dx * dy;
      d_conics[3 * g + 2] += 0.5f * d_sigma * dy * dy;
      d_means2d[2 * g] += d_sigma * (q[0] * dx + q[1] * dy);
      d_means2d[2 * g + 1] += d_sigma * (q[1] * dx + q[2] * dy);
    }
  });
}
