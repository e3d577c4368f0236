// Compositing of packed rays: features = sum_i w_i f_i + (1 - sum_i w_i) background, depth and
// accumulation, with w given or from densities. One thread owns a ray, its samples along the lanes.
// Forward: one pass over memory. Backward: one, with all heads in the gradient of a weight:
// g_i = d_features . (f_i - background) + d_accumulation + d_depth (s_i - depth) / sum_i w_i,
// d_f_i = w_i d_features; for densities then the way back of ray_weights. What it needs of a ray is
// kept in cache. docs/compositing.md
#include "compositing.h"
#include "packed.h"

#include <vector>

namespace rayfuse {
namespace {

// Everything about the call that is not a tensor.
struct Options {
  int64_t C;
  Depth depth;
  bool density, last_sample;

  bool needs_intervals() const { return density || is_mean(depth); }
};

// The samples of one ray.
template <class T>
struct Samples {
  using A = accumulator<T>;

  int64_t n;
  const T *t_starts, *t_ends, *w;  // [n]

  A mid(int64_t k) const { return A(0.5) * (widen(t_starts[k]) + widen(t_ends[k])); }
  // Of a mean depth.
  std::pair<A, A> bounds(Depth depth) const {
    if (depth == Depth::kLogMean) return {widen(t_starts[0]), widen(t_ends[n - 1])};
    return {mid(0), mid(n - 1)};
  }
};

// What the pass from the left leaves for the way back.
template <class A>
struct Kept {
  vec<A> w, mid, density, width, passed;
};

// The pass from the left. Weights go to a row of whole registers unless it is null.
template <bool long_rays, class T>
__attribute__((noinline)) RAYFUSE_KERNEL RayValues<accumulator<T>> weigh(
    const Options& options, const Samples<T>& ray, accumulator<T>* w_row,
    Kept<accumulator<T>>* kept) {
  using A = accumulator<T>;
  // denser samples stop all light as well, and infinite sums would cancel to NaN
  constexpr A kMost = 2 * Decay<A>::kMost;
  LeftScan<A, long_rays> depth;
  LevelledSum<A, long_rays> accumulation, moment;
  for (int64_t k = 0; k < ray.n; k += kLanes<A>) {
    Kept<A> here = {};
    here.w = load_at(ray.w, k, ray.n);
    if (options.needs_intervals()) {
      const vec<A> start = load_at(ray.t_starts, k, ray.n), end = load_at(ray.t_ends, k, ray.n);
      here.mid = A(0.5) * (start + end);
      here.width = end - start;
    }
    if (options.density) {
      here.density = here.w;
      // a wall without width is nothing
      const auto nothing = (here.density > std::numeric_limits<A>::max()) & (here.width == 0);
      vec<A> x = nothing ? vec<A>{} : here.density * here.width;
      x = x > kMost ? broadcast(kMost) : x;
      const Decay<A> before(depth.add(x).before), own(x);
      here.w = before.passing * own.stopped;
      here.passed = before.passing * own.passing;
    }
    if (w_row) store(w_row + k, here.w);
    accumulation.add(here.w);
    if (is_mean(options.depth)) moment.add(here.w * place<A>(options.depth, here.mid));
    if (kept) kept[k / kLanes<A>] = here;
  }
  return {broadcast(sum_lanes<A>(accumulation.total())), broadcast(sum_lanes<A>(moment.total()))};
}

template <class F>
__attribute__((noinline)) RAYFUSE_KERNEL void add_ray_features(const accumulator<F>* w, const F* f,
                                                               int64_t n, int64_t C,
                                                               accumulator<F>* sums) {
  add_features(w, f, n, C, sums);
}
template <class F>
__attribute__((noinline)) RAYFUSE_KERNEL void ray_feature_gradients(
    const accumulator<F>* w, const F* f, int64_t n, int64_t C, const accumulator<F>* d_features,
    accumulator<F>* products, F* d_f) {
  feature_gradients(w, f, n, C, d_features, products, d_f);
}

// The gradients of the samples, null where they are not wanted.
template <class T>
struct SampleGradients {
  T *t_starts, *t_ends, *w;  // [P]
};

// The pass from the right: the gradients of weights are their products with the features, if any,
// and what comes through the depth.
template <bool long_rays, class T>
__attribute__((noinline)) RAYFUSE_KERNEL void back_to_samples(
    const Options& options, const RaySamples& ray,
    const DepthGradient<accumulator<T>>& through_depth, accumulator<T> d_depth,
    const Kept<accumulator<T>>* kept, const accumulator<T>* products, const SampleGradients<T>& d) {
  using A = accumulator<T>;
  constexpr int N = kLanes<A>;
  const int64_t n = ray.n;
  RightScan<A, long_rays> behind;
  for (int64_t k = (n - 1) / N * N; k >= 0; k -= N) {
    const Kept<A>& here = kept[k / N];
    vec<A> g = broadcast(through_depth.common), d_mid = {}, d_width = {};
    if (products) g += load(products + k);
    if (is_mean(options.depth)) {
      // subtracted first: 1 / sum w may be large
      g += through_depth.scale * (place<A>(options.depth, here.mid) - through_depth.mean);
      d_mid = d_midpoint<A>(options.depth, here.mid, through_depth.scale * here.w);
    }
    if (options.density) {
      const vec<A> d_x = g * here.passed - behind.add(g * here.w).before;
      g = d_x * here.width;
      // a wall stays one, however thick it is
      d_width = here.density > std::numeric_limits<A>::max() ? vec<A>{} : d_x * here.density;
    }
    const int64_t sample = through_depth.sample - k, last = n - 1 - k;
    if (0 <= sample && sample < N) d_mid[sample] += d_depth;
    vec<A> d_start = A(0.5) * d_mid - d_width, d_end = A(0.5) * d_mid + d_width;
    if (through_depth.edge == 0 && k == 0) d_start[0] += d_depth;
    if (through_depth.edge == n && last < N) d_end[last] += d_depth;
    if (d.w) ray.store(d.w, k, g);
    if (d.t_starts) ray.store(d.t_starts, k, d_start);
    if (d.t_ends) ray.store(d.t_ends, k, d_end);
  }
}

// What a thread works on, in whole registers, as long as its longest ray.
template <class A>
class Rows {
 public:
  std::vector<A> w, products;
  std::vector<Kept<A>> kept;

  void grow(int64_t n) {
    const size_t registers = (n + kLanes<A> - 1) / kLanes<A>;
    if (kept.size() >= registers) return;
    kept.resize(registers);
    w.resize(registers * kLanes<A>), products.resize(registers * kLanes<A>);
  }
};

// The weights of a ray, and sums over them.
template <class T>
struct Weights {
  using A = accumulator<T>;

  const A* w;
  RayValues<A> sums;

  Weights(const Options& options, const Samples<T>& ray, A* row, Kept<A>* kept) : w(row) {
    if constexpr (std::is_same_v<T, A>) {
      if (!options.density) w = ray.w, row = nullptr;
    }
    sums = is_long<A>(ray.n) ? weigh<true>(options, ray, row, kept)
                             : weigh<false>(options, ray, row, kept);
  }
};

template <class T, class F>
struct Inputs {
  const T *t_starts, *t_ends, *w;  // [P]
  const int64_t* offsets;          // [R+1]
  const F* f;                      // [P, C] or null
  const T* background;             // [R, C] or null

  Samples<T> samples(int64_t r) const {
    const int64_t k = offsets[r];
    return {offsets[r + 1] - k, t_starts + k, t_ends + k, w + k};
  }
  // What stands behind the samples of ray r, or null.
  const accumulator<T>* behind(const Options& options, int64_t r, accumulator<T>* room) const {
    const bool has_last = options.last_sample && f && offsets[r] < offsets[r + 1];
    return behind_samples(background ? background + r * options.C : nullptr,
                          has_last ? f + (offsets[r + 1] - 1) * options.C : nullptr, options.C,
                          room);
  }
};

// Rays first..last.
template <class T, class F>
void composite(int64_t first, int64_t last, const Options& options, const Inputs<T, F>& in,
               accumulator<T>* features,        // [R, C]
               accumulator<T>* depth,           // [R]
               accumulator<T>* accumulation) {  // [R]
  using A = accumulator<T>;
  const int64_t C = options.C;
  Rows<A> rows;
  std::vector<A> behind(C);
  for (int64_t r = first; r < last; ++r) {
    const Samples<T> ray = in.samples(r);
    rows.grow(ray.n);
    const Weights<T> weights(options, ray, rows.w.data(), nullptr);
    A* const features_r = features + r * C;
    if (in.f) {
      add_ray_features(weights.w, in.f + in.offsets[r] * C, ray.n, C, features_r);
    } else {
      std::fill(features_r, features_r + C, A(0));
    }
    accumulation[r] = weights.sums.accumulation[0];
    depth[r] = 0;
    if (ray.n && is_mean(options.depth)) {
      const auto [least, most] = ray.bounds(options.depth);
      const A value = RayDepths<A>(options.depth, weights.sums).value[0];
      depth[r] = value < least ? least : value > most ? most : value;
    } else if (ray.n && options.depth == Depth::kMedian) {
      depth[r] = ray.mid(median(weights.w, ray.n));
    }
    const A* const light_from = in.behind(options, r, behind.data());
    if (light_from) blend(1 - accumulation[r], light_from, C, features_r);
  }
}

template <class T, class F>
struct Gradients {
  SampleGradients<T> samples;
  F* f;           // [P, C] or null
  T* background;  // [R, C] or null
};

// Rays first..last.
template <class T, class F>
void gradients(int64_t first, int64_t last, const Options& options,
               const accumulator<T>* d_features,      // [R, C] or null
               const accumulator<T>* d_depth,         // [R] or null
               const accumulator<T>* d_accumulation,  // [R] or null
               const Inputs<T, F>& in, const Gradients<T, F>& d) {
  using A = accumulator<T>;
  const int64_t C = options.C;
  Rows<A> rows;
  const std::vector<A> no_gradient(C);
  std::vector<A> behind(C);
  for (int64_t r = first; r < last; ++r) {
    const Samples<T> ray = in.samples(r);
    const int64_t begin = in.offsets[r];
    rows.grow(ray.n);
    const Weights<T> weights(options, ray, rows.w.data(), rows.kept.data());
    const A light = 1 - weights.sums.accumulation[0];
    const A* const d_features_r = d_features ? d_features + r * C : no_gradient.data();
    for (int64_t c = 0; d.background && c < C; ++c) {
      d.background[r * C + c] = narrow<T>(light * d_features_r[c]);
    }
    if (ray.n == 0) continue;

    if (in.f) {
      F* const d_f = d.f ? d.f + begin * C : nullptr;
      ray_feature_gradients(weights.w, in.f + begin * C, ray.n, C, d_features_r,
                            rows.products.data(), d_f);
      for (int64_t c = 0; d_f && options.last_sample && c < C; ++c) {
        d_f[(ray.n - 1) * C + c] = narrow<F>((weights.w[ray.n - 1] + light) * d_features_r[c]);
      }
    }
    DepthGradient<A> through_depth;
    if (d_depth && is_mean(options.depth)) {
      const RayDepths<A> depths(options.depth, weights.sums);
      through_depth =
          DepthGradient<A>(options.depth, depths, 0, ray.bounds(options.depth), ray.n, d_depth[r]);
    } else if (d_depth && options.depth == Depth::kMedian) {
      through_depth = DepthGradient<A>(median(weights.w, ray.n));
    }
    if (d_accumulation) through_depth.common += d_accumulation[r];
    const A* const light_from = in.behind(options, r, behind.data());
    if (light_from) through_depth.common -= dot(d_features_r, light_from, C);
    const auto way_back = is_long<A>(ray.n) ? back_to_samples<true, T> : back_to_samples<false, T>;
    way_back(options, RaySamples::of(in.offsets, r, last), through_depth,
             d_depth ? d_depth[r] : A(0), rows.kept.data(), in.f ? rows.products.data() : nullptr,
             d.samples);
  }
}

}  // namespace
}  // namespace rayfuse

#include "compositing_registration.h"
#include "large_memory.h"

namespace rayfuse {
namespace {

Options options_of(const MaybeTensor& f, const MaybeTensor& background, int64_t depth, bool density,
                   bool last_sample) {
  const int64_t C = f ? f->size(-1) : background ? background->size(-1) : 0;
  return {C, static_cast<Depth>(depth), density, last_sample};
}

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& t_starts, const Tensor& t_ends,
                                       const Tensor& w, const Tensor& offsets, MaybeTensor f,
                                       MaybeTensor background, int64_t depth_kind, bool density,
                                       bool last_sample) {
  const PackedRays rays("packed_composite_rays", offsets, w.numel());
  const Options options = options_of(f, background, depth_kind, density, last_sample);
  Tensor features = empty(w, {rays.R, options.C}, accumulator_dtype(w));
  Tensor depth = empty(w, {rays.R}, accumulator_dtype(w));
  Tensor accumulation = empty(w, {rays.R}, accumulator_dtype(w));
  dispatch_pair(w, f, [&](auto type, auto f_type) {
    using T = decltype(type);
    using F = decltype(f_type);
    using A = accumulator<T>;
    const Inputs<T, F> in{data<T>(t_starts), data<T>(t_ends), data<T>(w),
                          rays.offsets,      data<F>(f),      data<T>(background)};
    A *features_ptr = mutable_data<A>(features), *depth_ptr = mutable_data<A>(depth);
    A* accumulation_ptr = mutable_data<A>(accumulation);
    rays.for_each_piece([=](int64_t first, int64_t last) {
      composite(first, last, options, in, features_ptr, depth_ptr, accumulation_ptr);
    });
  });
  return {features, depth, accumulation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
    MaybeTensor d_features, MaybeTensor d_depth, MaybeTensor d_accumulation, const Tensor& t_starts,
    const Tensor& t_ends, const Tensor& w, const Tensor& offsets, MaybeTensor f,
    MaybeTensor background, int64_t depth, bool density, bool last_sample, int64_t needs) {
  const PackedRays rays("packed_composite_rays", offsets, w.numel());
  const Options options = options_of(f, background, depth, density, last_sample);
  Tensor d_t_starts = large_gradient(t_starts, needs, 0);
  Tensor d_t_ends = large_gradient(t_ends, needs, 1), d_w = large_gradient(w, needs, 2);
  Tensor d_f = large_gradient(f, w, needs, 3),
         d_background = large_gradient(background, w, needs, 4);
  dispatch_pair(w, f, [&](auto type, auto f_type) {
    using T = decltype(type);
    using F = decltype(f_type);
    using A = accumulator<T>;
    const Inputs<T, F> in{data<T>(t_starts), data<T>(t_ends), data<T>(w),
                          rays.offsets,      data<F>(f),      data<T>(background)};
    const SampleGradients<T> d_samples{mutable_data<T>(d_t_starts), mutable_data<T>(d_t_ends),
                                       mutable_data<T>(d_w)};
    const Gradients<T, F> d{d_samples, mutable_data<F>(d_f), mutable_data<T>(d_background)};
    const A *d_features_ptr = data<A>(d_features), *d_depth_ptr = data<A>(d_depth);
    const A* d_accumulation_ptr = data<A>(d_accumulation);
    rays.for_each_piece([=](int64_t first, int64_t last) {
      gradients(first, last, options, d_features_ptr, d_depth_ptr, d_accumulation_ptr, in, d);
    });
  });
  return {d_t_starts, d_t_ends, d_w, d_f, d_background};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_composite_rays", TORCH_BOX(&fwd));
  m.impl("packed_composite_rays_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
