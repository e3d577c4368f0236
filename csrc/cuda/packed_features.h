// How kernels go over packed rays with features: a warp owns a ray, a block a long one.
#pragma once

#include "ray_features.h"

namespace rayfuse {

struct PackedShape {
  int64_t R, P;
  int64_t short_ray;
  int rays;  // of a block

  PackedShape(int64_t R, int64_t P, const FeatureShape& features)
      : R(R), P(P), short_ray(features.short_ray()), rays(P > R * short_ray ? 1 : kPackedRays) {}

  // One block at least, for samples of no ray.
  Grid grid(cudaStream_t stream) const {
    return {std::max<int64_t>((R + rays - 1) / rays, 1), kBlock, 0, stream};
  }
};

template <class Work>
__device__ void do_packed_rays(const PackedShape& shape, const int64_t* offsets, const Work& work) {
  for_each_packed_ray(
      offsets, shape.R, shape.P,
      [&](const auto& team, const PackedRay& ray) { work.of_ray(team, ray); }, shape.rays,
      shape.short_ray);
}

// The gradients of samples that belong to no ray are 0.
template <class T>
__device__ void clear_stray_features(const PackedShape& shape, const int64_t* offsets, int C,
                                     const MutableValues& d_w, T* d_f) {
  for_each_stray_sample(offsets, shape.R, shape.P, [&](int64_t k) {
    if (d_w.data) set_value(d_w, k, accumulator<T>(0));
    for (int c = 0; d_f && c < C; ++c) d_f[k * C + c] = narrow<T>(0);
  });
}

}  // namespace rayfuse
