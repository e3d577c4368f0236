// Compositing: features = sum_i w_i f_i + (1 - sum_i w_i) background, depth and accumulation, with
// w given or from densities. One thread owns a few rays; of these only the weights' scans go along
// several rays at once, everything else along one at a time, from rows of weights in cache.
// Forward: one pass over memory. Backward: one, with all heads in the gradient of a weight:
// g_i = d_features . (f_i - background) + d_accumulation + d_depth (s_i - depth) / sum_i w_i,
// d_f_i = w_i d_features; for densities then the way back of ray_weights. docs/compositing.md
#include "compositing.h"
#include "transmittance.h"

#include <array>
#include <vector>

namespace rayfuse {
namespace {

// The rays of a block: rows of weights [S], features [S, C] end to end.
template <class F>
__attribute__((noinline)) RAYFUSE_KERNEL void add_block_features(
    const Rays<const accumulator<F>>& w, const F* f, int64_t S, int64_t C, accumulator<F>* sums) {
  for (int i = 0; i < w.count; ++i) add_features(w[i], f + i * S * C, S, C, sums + i * C);
}
template <class F>
__attribute__((noinline)) RAYFUSE_KERNEL void block_feature_gradients(
    const Rays<const accumulator<F>>& w, const F* f, int64_t S, int64_t C,
    const accumulator<F>* d_features, const Rays<accumulator<F>>& products, F* d_f,
    bool past_cache) {
  for (int i = 0; i < w.count; ++i) {
    const int64_t at = i * S * C;
    feature_gradients(w[i], f + at, S, C, d_features + i * C, products[i], d_f ? d_f + at : nullptr,
                      past_cache);
  }
}

// ---- weights and depth of a block of rays

// Everything about the call that is not a tensor.
struct Options {
  int64_t S, C;
  Depth depth;
  bool density, last_sample;

  bool has_mean() const { return S && is_mean(depth); }
};

template <class A>
Block<A> places(Depth depth, const Block<A>& mid) {
  return each_column<A>([&](int j) { return place<A>(depth, mid.column[j]); });
}

// What the pass from the left leaves for the way back.
template <class A>
struct Kept {
  KeptLight<A> light;  // of weights that are given, only these
  Block<A> mid;
};

// What is read after the pass from the left: the features of its rays, edges and weights of the
// next ones. Asked for piece by piece, so that memory works while the pass computes.
struct Soon {
  struct Bytes {
    const char* begin;
    int64_t of_each_sample;
  };
  std::array<Bytes, 3> arrays;

  void prefetch(int64_t begin, int64_t end) const {
    for (const auto& [from, each] : arrays) {
      for (int64_t at = begin * each; at < end * each; at += 64) __builtin_prefetch(from + at);
    }
  }
};

// The pass from the left over `count` rays. Weights from densities, or of half precision, also go
// to rows of whole registers.
template <bool long_rays, class T>
__attribute__((noinline)) RAYFUSE_KERNEL RayValues<accumulator<T>> weigh(
    const Options& options, const Rays<const T>& t, const Rays<const T>& w,
    const Rays<accumulator<T>>& w_rows, Kept<accumulator<T>>* kept, bool with_d_t,
    const Soon& soon) {
  using A = accumulator<T>;
  const int64_t S = options.S;
  LightPass<T, long_rays> pass{w, t, S, false};
  LevelledSum<A, long_rays> accumulation, moment;
  const bool with_mean = options.has_mean();
  along<A>(0, S, [&](int64_t k) {
    soon.prefetch(k, k + kLanes<A>);
    if (options.density) {
      pass.step(k);
    } else {
      pass.w = w.load_at(k, S - k);
      if (with_mean) pass.step_t(k);
    }
    if (options.density || !std::is_same_v<T, A>) w_rows.store_at(k, kLanes<A>, pass.w);
    accumulation.add(sum_columns(pass.w));
    const Block<A> mid = A(0.5) * (pass.t0 + pass.t1);
    if (with_mean) moment.add(sum_columns(pass.w * places(options.depth, mid)));
    if (kept) {
      Kept<A>& here = kept[k / kLanes<A>];
      if (options.density) {
        here.light.keep(pass, with_d_t);
      } else {
        pass.w.store_to(here.light.w);
      }
      if (with_mean) mid.store_to(here.mid);
    }
  });
  return {sum_samples<A>(accumulation.total()), sum_samples<A>(moment.total())};
}

// The bounds of a mean depth along a ray.
template <class T>
std::pair<accumulator<T>, accumulator<T>> bounds(const Options& options, const T* t) {
  using A = accumulator<T>;
  const int64_t S = options.S;
  if (options.depth == Depth::kLogMean) return {widen(t[0]), widen(t[S])};
  return {A(0.5) * (widen(t[0]) + widen(t[1])), A(0.5) * (widen(t[S - 1]) + widen(t[S]))};
}

// The gradients of weights, as far as they do not go through the features, of ray r in lane r:
// common + scale place_i.
template <class A>
struct WeightGradients {
  vec<A> common = {}, scale = {};
};

// The pass from the right: the gradients of weights are their products with the features, if any,
// and those above. With d_t the gradients of midpoints and widths go to rows.
template <bool long_rays, class T>
__attribute__((noinline)) RAYFUSE_KERNEL void back_to_weights(
    const Options& options, const WeightGradients<accumulator<T>>& d_weights,
    const Kept<accumulator<T>>* kept, bool with_products, const Rays<accumulator<T>>& products,
    const Rays<T>& d_w, bool with_d_w, bool with_d_t, const Rays<accumulator<T>>& d_mid) {
  using A = accumulator<T>;
  constexpr int N = kLanes<A>;
  const int64_t S = options.S;
  const vec<A> common = repeat_lane<0>(d_weights.common), scale = repeat_lane<0>(d_weights.scale);
  const bool with_mean = options.has_mean();
  LightGradients<A, long_rays> way_back;
  for (int64_t i = (S + N - 1) / N - 1; i >= 0; --i) {
    const int64_t k = i * N;
    Block<A> g = {};
    if (with_products) {
      g = Rays<const A>{products.first, products.stride, products.count}.load_at(k, N);
    }
    g = each_column<A>([&](int j) { return g.column[j] + common; });
    if (with_mean) {
      const Block<A> place = places(options.depth, kept[i].mid);
      g = each_column<A>([&](int j) { return g.column[j] + scale * place.column[j]; });
      if (with_d_t) {
        d_mid.store_at(k, N, each_column<A>([&](int j) {
                         const vec<A> d_place = scale * kept[i].light.w.column[j];
                         return d_midpoint<A>(options.depth, kept[i].mid.column[j], d_place);
                       }));
      }
    }
    if (options.density) {
      way_back.step(kept[i].light, g, {}, with_d_t);
      if (with_d_w) d_w.store_at(k, S - k, way_back.d_density);
      if (with_d_t) products.store_at(k, N, way_back.d_width);
    } else if (with_d_w) {
      d_w.store_at(k, S - k, g);
    }
  }
}

// ---- rays

// The rows that a thread works on: kRays of them, in whole registers.
template <class A>
class Rows {
 public:
  explicit Rows(int64_t S)
      : stride_((S + kLanes<A> - 1) / kLanes<A> * kLanes<A>), values_(kRays<A> * stride_) {}

  Rays<A> rays(int count) { return {values_.data(), stride_, count}; }
  void clear() { std::fill(values_.begin(), values_.end(), A(0)); }

 private:
  int64_t stride_;
  std::vector<A> values_;
};

// The weights of a block of rays: those given, or the rows that the pass from the left has filled.
template <class T>
Rays<const accumulator<T>> weights_of(const Options& options, const Rays<const T>& w,
                                      const Rays<accumulator<T>>& rows) {
  if constexpr (std::is_same_v<T, accumulator<T>>) {
    if (!options.density) return w;
  }
  return {rows.first, rows.stride, rows.count};
}

// After rays first.. of those up to `end`.
template <class T, class F>
Soon soon(const Options& options, int64_t first, int64_t count, int64_t end, const T* t, const T* w,
          const F* f) {
  const int64_t S = options.S, next = first + count;
  const auto bytes = [](const auto* p, int64_t at, int64_t each) {
    return Soon::Bytes{reinterpret_cast<const char*>(p ? p + at : p),
                       p ? each * int64_t{sizeof *p} : 0};
  };
  const int64_t rays = std::min<int64_t>(count, end - next);
  return {{bytes(f, first * S * options.C, count * options.C), bytes(t, next * (S + 1), rays),
           bytes(w, next * S, rays)}};
}

// Rays begin..end.
template <bool long_rays, class T, class F>
void composite(int64_t begin, int64_t end, const Options& options,
               const T* t,                      // [R, S+1]
               const T* w,                      // [R, S]
               const F* f,                      // [R, S, C] or null
               const T* background,             // [R, C] or null
               accumulator<T>* features,        // [R, C]
               accumulator<T>* depth,           // [R]
               accumulator<T>* accumulation) {  // [R]
  using A = accumulator<T>;
  const int64_t S = options.S, C = options.C;
  Rows<A> w_rows(S);
  std::vector<A> behind(C);
  for (int64_t first = begin; first < end; first += kRays<A>) {
    const int count = std::min<int64_t>(kRays<A>, end - first);
    const Rays<const T> t_rays{t + first * (S + 1), S + 1, count}, given{w + first * S, S, count};
    const Rays<A> rows = w_rows.rays(count);
    const RayValues<A> sums = weigh<long_rays, T>(options, t_rays, given, rows, nullptr, false,
                                                  soon(options, first, count, end, t, w, f));
    const Rays<const A> weights = weights_of(options, given, rows);
    if (f) {
      add_block_features(weights, f + first * S * C, S, C, features + first * C);
    } else {
      std::fill(features + first * C, features + (first + count) * C, A(0));
    }
    const RayDepths<A> depths(options.depth, sums);
    for (int i = 0; i < count; ++i) {
      const int64_t r = first + i;
      accumulation[r] = sums.accumulation[i];
      depth[r] = 0;
      if (options.has_mean()) {
        const auto [least, most] = bounds(options, t_rays[i]);
        const A value = depths.value[i];
        depth[r] = value < least ? least : value > most ? most : value;
      } else if (S && options.depth == Depth::kMedian) {
        const T* const edge = t_rays[i] + median(weights[i], S);
        depth[r] = A(0.5) * (widen(edge[0]) + widen(edge[1]));
      }
      const A* light_from = behind_samples(
          background ? background + r * C : nullptr,
          options.last_sample && f && S ? f + (r * S + S - 1) * C : nullptr, C, behind.data());
      if (light_from) blend(1 - sums.accumulation[i], light_from, C, features + r * C);
    }
  }
}

template <class T, class F>
struct Gradients {
  T* t;           // [R, S+1] or null
  T* w;           // [R, S] or null
  F* f;           // [R, S, C] or null
  T* background;  // [R, C] or null
  bool f_past_cache;
};

// Rays begin..end.
template <bool long_rays, class T, class F>
void gradients(int64_t begin, int64_t end, const Options& options,
               const accumulator<T>* d_features,      // [R, C] or null
               const accumulator<T>* d_depth,         // [R] or null
               const accumulator<T>* d_accumulation,  // [R] or null
               const T* t,                            // [R, S+1]
               const T* w,                            // [R, S]
               const F* f,                            // [R, S, C] or null
               const T* background,                   // [R, C] or null
               const Gradients<T, F>& d) {
  using A = accumulator<T>;
  const int64_t S = options.S, C = options.C;
  constexpr int K = kRays<A>, N = kLanes<A>;
  Rows<A> w_rows(S), g_rows(S), d_mid_rows(d.t ? S : 0);
  std::vector<Kept<A>> kept((S + N - 1) / N);
  const std::vector<A> no_gradient(K * C);
  std::vector<A> behind(C);
  for (int64_t first = begin; first < end; first += K) {
    const int count = std::min<int64_t>(K, end - first);
    const Rays<const T> t_rays{t + first * (S + 1), S + 1, count}, given{w + first * S, S, count};
    const Rays<A> rows = w_rows.rays(count), g = g_rows.rays(count);
    const RayValues<A> sums = weigh<long_rays, T>(options, t_rays, given, rows, kept.data(), d.t,
                                                  soon(options, first, count, end, t, w, f));
    const Rays<const A> weights = weights_of(options, given, rows);
    const A* d_features_here = d_features ? d_features + first * C : no_gradient.data();
    const bool last_behind = options.last_sample && f && S;
    if (f) {
      block_feature_gradients(weights, f + first * S * C, S, C, d_features_here, g,
                              d.f ? d.f + first * S * C : nullptr, d.f_past_cache);
    }

    const RayDepths<A> depths(options.depth, sums);
    WeightGradients<A> d_weights;
    DepthGradient<A> through_depth[K];
    for (int i = 0; i < count; ++i) {
      const int64_t r = first + i;
      const A light = 1 - sums.accumulation[i];
      const A* d_features_r = d_features_here + i * C;
      const F* last_f = last_behind ? f + (r * S + S - 1) * C : nullptr;
      const A* light_from =
          behind_samples(background ? background + r * C : nullptr, last_f, C, behind.data());
      d_weights.common[i] = (d_accumulation ? d_accumulation[r] : A(0)) -
                            (light_from ? dot(d_features_r, light_from, C) : A(0));
      for (int64_t c = 0; last_behind && d.f && c < C; ++c) {
        d.f[(r * S + S - 1) * C + c] = narrow<F>((weights[i][S - 1] + light) * d_features_r[c]);
      }
      for (int64_t c = 0; d.background && c < C; ++c) {
        d.background[r * C + c] = narrow<T>(light * d_features_r[c]);
      }
      if (!d_depth || !S) continue;
      if (options.has_mean()) {
        through_depth[i] =
            DepthGradient<A>(options.depth, depths, i, bounds(options, t_rays[i]), S, d_depth[r]);
        d_weights.common[i] -= through_depth[i].scale * through_depth[i].mean;
        d_weights.scale[i] = through_depth[i].scale;
      } else if (options.depth == Depth::kMedian) {
        through_depth[i] = DepthGradient<A>(median(weights[i], S));
      }
    }

    if (d.t) d_mid_rows.clear();
    const Rays<A> d_mid = d_mid_rows.rays(count);
    if (d.w || d.t) {
      back_to_weights<long_rays, T>(options, d_weights, kept.data(), f, g,
                                    {d.w + first * S, S, count}, d.w, d.t, d_mid);
    }
    for (int i = 0; d.t && i < count; ++i) {
      T* const d_t = d.t + (first + i) * (S + 1);
      const int64_t sample = through_depth[i].sample, edge = through_depth[i].edge;
      const A d_depth_r = d_depth ? d_depth[first + i] : A(0);
      if (sample >= 0) d_mid[i][sample] += d_depth_r;
      A from_left = edge == 0 ? d_depth_r : A(0);
      for (int64_t k = 0; k < S; ++k) {
        const A half = A(0.5) * d_mid[i][k], width = options.density ? g[i][k] : A(0);
        d_t[k] = narrow<T>(from_left + half - width);
        from_left = half + width;
      }
      d_t[S] = narrow<T>(from_left + (edge == S && S ? d_depth_r : A(0)));
    }
  }
  if (d.f_past_cache) finish_stream();
}

}  // namespace
}  // namespace rayfuse

#include "compositing_registration.h"
#include "large_memory.h"

namespace rayfuse {
namespace {

Options options_of(const Tensor& w, const MaybeTensor& f, const MaybeTensor& background,
                   int64_t depth, bool density, bool last_sample) {
  const int64_t C = f ? f->size(-1) : background ? background->size(-1) : 0;
  return {w.size(-1), C, static_cast<Depth>(depth), density, last_sample};
}

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& t, const Tensor& w, MaybeTensor f,
                                       MaybeTensor background, int64_t depth_kind, bool density,
                                       bool last_sample) {
  const Options options = options_of(w, f, background, depth_kind, density, last_sample);
  auto sizes = leading_sizes(w, 1);
  Tensor depth = empty(t, sizes, accumulator_dtype(t));
  Tensor accumulation = empty(t, sizes, accumulator_dtype(t));
  sizes.push_back(options.C);
  Tensor features = empty(t, sizes, accumulator_dtype(t));
  dispatch_pair(t, f, [&](auto type, auto f_type) {
    using T = decltype(type);
    using F = decltype(f_type);
    using A = accumulator<T>;
    const T *t_ptr = data<T>(t), *w_ptr = data<T>(w), *background_ptr = data<T>(background);
    const F* f_ptr = data<F>(f);
    A *features_ptr = mutable_data<A>(features), *depth_ptr = mutable_data<A>(depth);
    A* accumulation_ptr = mutable_data<A>(accumulation);
    const int64_t S = options.S;
    for_rays<A>(depth.numel(), S * (2 + options.C), [=](int64_t begin, int64_t end) {
      as_constant(is_long<A>(S), [=](auto long_rays) {
        composite<long_rays>(begin, end, options, t_ptr, w_ptr, f_ptr, background_ptr, features_ptr,
                             depth_ptr, accumulation_ptr);
      });
    });
  });
  return {features, depth, accumulation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(MaybeTensor d_features, MaybeTensor d_depth,
                                               MaybeTensor d_accumulation, const Tensor& t,
                                               const Tensor& w, MaybeTensor f,
                                               MaybeTensor background, int64_t depth, bool density,
                                               bool last_sample, int64_t needs) {
  const Options options = options_of(w, f, background, depth, density, last_sample);
  Tensor d_t = large_gradient(t, needs, 0), d_w = large_gradient(w, needs, 1);
  Tensor d_f = large_gradient(f, t, needs, 2),
         d_background = large_gradient(background, t, needs, 3);
  dispatch_pair(t, f, [&](auto type, auto f_type) {
    using T = decltype(type);
    using F = decltype(f_type);
    using A = accumulator<T>;
    const A *d_features_ptr = data<A>(d_features), *d_depth_ptr = data<A>(d_depth);
    const A* d_accumulation_ptr = data<A>(d_accumulation);
    const T *t_ptr = data<T>(t), *w_ptr = data<T>(w), *background_ptr = data<T>(background);
    const F* f_ptr = data<F>(f);
    const int64_t S = options.S;
    const Gradients<T, F> d{mutable_data<T>(d_t), mutable_data<T>(d_w), mutable_data<F>(d_f),
                            mutable_data<T>(d_background),
                            is_large(d_f) && S * options.C % kLanes<A> == 0};
    for_rays<A>(t.numel() / (S + 1), S * (2 + options.C), [=](int64_t begin, int64_t end) {
      as_constant(is_long<A>(S), [=](auto long_rays) {
        gradients<long_rays>(begin, end, options, d_features_ptr, d_depth_ptr, d_accumulation_ptr,
                             t_ptr, w_ptr, f_ptr, background_ptr, d);
      });
    });
  });
  return {d_t, d_w, d_f, d_background};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("composite_rays", TORCH_BOX(&fwd));
  m.impl("composite_rays_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
