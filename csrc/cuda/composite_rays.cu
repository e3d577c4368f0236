// Compositing: features = sum_i w_i f_i + (1 - sum_i w_i) background, depth and accumulation, with
// w given or from densities. A warp owns a ray, a block a long one, a thread a run of its samples;
// samples and kChannels of their features are on chip. Forward: one pass over memory. Backward:
// one, and t and w once more where a ray does not fit on chip; all heads are in a weight's gradient
// g_i = d_features . (f_i - background) + d_accumulation + d_depth (s_i - depth) / sum_i w_i,
// d_f_i = w_i d_features; for densities then the way back of ray_weights. docs/compositing.md
#include "transmittance.h"

#include <cstring>

namespace rayfuse {
namespace {

enum class Depth : int64_t { kExpected, kLogMean, kMedian, kNone };

// Channels on chip at once; of more than these a sector is read.
constexpr int kChannels = 8;
constexpr int kFwdArrays = 3, kBwdArrays = 6;

template <class A>
constexpr A kExpectedEps = A(1e-10);
template <class A>
constexpr A kLogMeanEps = std::numeric_limits<float>::epsilon();

// Everything about the call that is not a tensor, and where things are on chip.
struct Options {
  int64_t R, S, C;
  Depth depth;
  bool density, last_sample;
  int rays_per_block, tile_size, chip, f_chip;

  __device__ bool has_mean() const { return depth == Depth::kExpected || depth == Depth::kLogMean; }
};

// What the mean depth is the mean of.
template <class A>
__device__ A place(Depth depth, A mid) {
  return depth == Depth::kExpected ? mid : log_of(mid < kSmallest<A> ? kSmallest<A> : mid);
}

// The pass from the left of a team over its ray.
template <int kThreads, class A>
struct LeftPass {
  const Team<kThreads>& team;
  const Options& options;
  A depth_left = 0, weight_left = 0;  // of the tiles before
  Sums<A, 3> own = {};  // weights, weights times places, samples before half of the weight

  // Writes the weights of this thread's samples, and the light behind each unless it is null.
  __device__ void step(const Tile& tile, const Medium<A>& medium, A* weights, A* passed) {
    if (options.density) {
      Sums<A, 1> depth = {};
      for (int k = tile.begin; k < tile.end; ++k) depth.value[0] += medium.depth(k);
      const auto [before, total] = team.template scan<false>(depth);
      A here = depth_left + before.value[0];
      for (int k = tile.begin; k < tile.end; ++k) {
        const A x = medium.depth(k);
        weights[k] = exp_of(-here) * -expm1_of(-x);
        here += x;
        if (passed) passed[k] = exp_of(-here);
      }
      depth_left += total.value[0];
    } else {
      for (int k = tile.begin; k < tile.end; ++k) weights[k] = medium.sigma[k];
    }
    Sums<A, 1> weight = {};
    for (int k = tile.begin; k < tile.end; ++k) {
      weight.value[0] += weights[k];
      if (options.has_mean()) own.value[1] += weights[k] * place(options.depth, medium.mid(k));
    }
    own.value[0] += weight.value[0];
    if (options.depth == Depth::kMedian) {
      const auto [before, total] = team.template scan<false>(weight);
      A sum = weight_left + before.value[0];
      for (int k = tile.begin; k < tile.end; ++k) own.value[2] += (sum += weights[k]) < A(0.5);
      weight_left += total.value[0];
    }
  }
};

// The depth of a ray, and how it depends on the weights.
template <class A>
struct RayDepth {
  A value = 0, weight = 1, mean = 0;
  bool thin = false;
  // the sample, or edge, that alone decides
  int64_t sample = -1, edge = -1;

  template <class T>
  __device__ RayDepth(const Options& options, const Sums<A, 3>& sums, const T* t) {
    const int64_t S = options.S;
    const auto mid = [&](int64_t k) { return A(0.5) * (widen(t[k]) + widen(t[k + 1])); };
    if (S == 0 || options.depth == Depth::kNone) return;
    if (options.depth == Depth::kMedian) {
      sample = min(static_cast<int64_t>(sums.value[2]), S - 1);
      value = mid(sample);
      return;
    }
    const bool expected = options.depth == Depth::kExpected;
    thin = !expected && sums.value[0] < kLogMeanEps<A>;
    weight = expected ? sums.value[0] + kExpectedEps<A> : thin ? kLogMeanEps<A> : sums.value[0];
    mean = sums.value[1] / weight;
    value = expected ? mean : exp_of(mean);
    const A least = expected ? mid(0) : widen(t[0]), most = expected ? mid(S - 1) : widen(t[S]);
    if (value < least || value > most) {
      (expected ? sample : edge) = value < least ? 0 : expected ? S - 1 : S;
      value = value < least ? least : most;
    }
  }
};

// Edges and weights or densities of the tile, on chip when all have passed the barrier.
template <int kThreads, class T>
__device__ Medium<accumulator<T>> load_medium(const Team<kThreads>& team, const BlockRays& rays,
                                              const Tile& tile, const T* t, const T* w,
                                              accumulator<T>* chip, int chip_each) {
  const int64_t S = rays.S;
  const T* const t_from = t + rays.first * (S + 1) + tile.first;
  const T* const w_from = w + rays.first * S + tile.first;
  auto* const t_here = on_chip(chip, t_from);
  auto* const w_here = on_chip(chip + chip_each, w_from);
  load(t_from, t_here, rays.span(S + 1, tile.count + 1));
  load(w_from, w_here, rays.span(S, tile.count));
  __syncthreads();
  return {t_here + team.index * (S + 1), w_here + team.index * S};
}

// `width` channels from c on of a team's samples in the tile, at `from`: the k-th one's lie at
// k width when all have passed the barrier.
template <int kThreads, class F>
__device__ const accumulator<F>* load_channels(const Team<kThreads>& team, bool mine,
                                               const Tile& tile, const F* from, int64_t C,
                                               int64_t c, int width, accumulator<F>* chip) {
  if (width == C) {
    chip = on_chip(chip, from);
    if (mine) load(from, chip, tile.count * width, team.rank, kThreads);
  } else if (mine) {
    for (int i = team.rank; i < tile.count * width; i += kThreads) {
      chip[i] = widen(from[i / width * C + c + i % width]);
    }
  }
  __syncthreads();
  return chip;
}

template <int kThreads, class T, class F>
__global__ void __launch_bounds__(kBlock, 1)
    composite_rays_fwd_kernel(Options options,
                              const T* __restrict__ t,           // [R, S+1]
                              const T* __restrict__ w,           // [R, S]
                              const F* __restrict__ f,           // [R, S, C] or null
                              const T* __restrict__ background,  // [R, C] or null
                              accumulator<T>* features,          // [R, C]
                              accumulator<T>* depth,             // [R]
                              accumulator<T>* accumulation) {    // [R]
  using A = accumulator<T>;
  const int64_t S = options.S, C = options.C;
  const int chip = options.chip, tile_size = options.tile_size;
  const Team<kThreads> team;
  const BlockRays rays(options.R, S, options.rays_per_block);
  const bool mine = team.index < rays.count;
  const int64_t r = rays.first + team.index;
  A* const arrays = reinterpret_cast<A*>(shared_memory);
  A* const weights = arrays + 2 * chip + team.index * (tile_size + 1);
  A* const f_buffer = arrays + kFwdArrays * chip + team.index * options.f_chip;

  LeftPass<kThreads, A> pass{team, options};
  for (int64_t first = 0; first == 0 || first < S; first += tile_size) {
    const Tile tile(team, rays, first, tile_size);
    const Medium<A> medium = load_medium(team, rays, tile, t, w, arrays, chip);
    pass.step(tile, medium, weights, nullptr);
    for (int64_t c = 0; c < C; c += kChannels) {
      const int width = static_cast<int>(min(C - c, int64_t{kChannels}));
      Sums<A, kChannels> own = {};
      if (f) {
        const A* const f_chip =
            load_channels(team, mine, tile, f + (r * S + first) * C, C, c, width, f_buffer);
        for (int k = tile.begin; k < tile.end; ++k) {
#pragma unroll
          for (int i = 0; i < kChannels; ++i) {
            if (i < width) own.value[i] += weights[k] * f_chip[k * width + i];
          }
        }
      }
      const auto total = team.template scan<false>(own).total;
      if (mine && team.rank == 0) {
        A* const sums = features + r * C + c;
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
          if (i < width) sums[i] = (first > 0 ? sums[i] : A(0)) + total.value[i];
        }
      }
      __syncthreads();
    }
    __syncthreads();
  }
  const auto sums = team.template scan<false>(pass.own).total;
  if (!mine) return;
  if (team.rank == 0) {
    depth[r] = RayDepth<A>(options, sums, t + r * (S + 1)).value;
    accumulation[r] = sums.value[0];
  }
  const A light = 1 - sums.value[0];
  const F* const last = options.last_sample && f && S ? f + (r * S + S - 1) * C : nullptr;
  for (int64_t c = team.rank; c < C; c += kThreads) {
    if (last) {
      features[r * C + c] += light * widen(last[c]);
    } else if (background) {
      features[r * C + c] += light * widen(background[r * C + c]);
    }
  }
}

template <class T, class F>
struct Gradients {
  T* t;           // [R, S+1] or null
  T* w;           // [R, S] or null
  F* f;           // [R, S, C] or null
  T* background;  // [R, C] or null

  // Where a tile may keep a value: where its gradients will be.
  __device__ void* kept(int64_t ray, int64_t S, int64_t C, int64_t first) const {
    if (t) return t + ray * (S + 1) + first;
    if (w) return w + ray * S + first;
    return f + (ray * S + first) * C;
  }
};

template <int kThreads, class T, class F>
__global__ void __launch_bounds__(kBlock, 1)
    composite_rays_bwd_kernel(Options options,
                              const accumulator<T>* __restrict__ d_features,      // [R, C] or null
                              const accumulator<T>* __restrict__ d_depth,         // [R] or null
                              const accumulator<T>* __restrict__ d_accumulation,  // [R] or null
                              const T* __restrict__ t,                            // [R, S+1]
                              const T* __restrict__ w,                            // [R, S]
                              const F* __restrict__ f,           // [R, S, C] or null
                              const T* __restrict__ background,  // [R, C] or null
                              Gradients<T, F> d) {
  using A = accumulator<T>;
  const int64_t S = options.S, C = options.C;
  const int chip = options.chip, tile_size = options.tile_size;
  const Team<kThreads> team;
  const BlockRays rays(options.R, S, options.rays_per_block);
  const bool mine = team.index < rays.count;
  const int64_t r = rays.first + team.index;
  A* const arrays = reinterpret_cast<A*>(shared_memory);
  // from barrier to barrier a thread's samples are its own
  A* const weights = arrays + 2 * chip + team.index * (tile_size + 1);
  A* const passed = arrays + 3 * chip + team.index * (tile_size + 1);
  A* const f_buffer = arrays + kBwdArrays * chip + team.index * options.f_chip;
  __shared__ A scales[kBlock / kThreads][kChannels];
  A* const scale = scales[team.index];
  const F* const last = mine && options.last_sample && f && S ? f + (r * S + S - 1) * C : nullptr;

  LeftPass<kThreads, A> pass{team, options};
  int64_t first = 0;
  for (; first + tile_size < S; first += tile_size) {
    if (threadIdx.x == 0 && (d.t || d.w || d.f)) {
      memcpy(d.kept(r, S, C, first), &pass.depth_left, sizeof(A));
    }
    const Tile tile(team, rays, first, tile_size);
    const Medium<A> medium = load_medium(team, rays, tile, t, w, arrays, chip);
    pass.step(tile, medium, weights, nullptr);
    __syncthreads();
  }

  // g_i = products with the features + common + slope place_i
  A light = 0, common = 0, slope = 0, fixed = 0, right_of_tile = 0, taken_next = 0;
  int64_t fixed_sample = -1, fixed_edge = -1;
  for (; first >= 0; first -= tile_size) {
    const Tile tile(team, rays, first, tile_size);
    if (!tile.is_last() && (d.t || d.w || d.f)) {
      memcpy(&pass.depth_left, d.kept(r, S, C, first), sizeof(A));
    }
    const Medium<A> medium = load_medium(team, rays, tile, t, w, arrays, chip);
    pass.step(tile, medium, weights, passed);
    if (tile.is_last()) {
      const auto sums = team.template scan<false>(pass.own).total;
      light = 1 - sums.value[0];
      if (mine && d_accumulation) common = d_accumulation[r];
      if (mine && d_depth) {
        const RayDepth<A> depth(options, sums, t + r * (S + 1));
        fixed = d_depth[r], fixed_sample = depth.sample, fixed_edge = depth.edge;
        if (options.has_mean() && fixed_sample < 0 && fixed_edge < 0) {
          const A d_mean = options.depth == Depth::kExpected ? fixed : fixed * depth.value;
          slope = d_mean / depth.weight;
          if (!depth.thin) common -= slope * depth.mean;
        }
      }
      for (int64_t c = 0; mine && d_features && (last || background) && c < C; ++c) {
        common -= d_features[r * C + c] * (last ? widen(last[c]) : widen(background[r * C + c]));
      }
      for (int64_t c = team.rank; mine && d.background && c < C; c += kThreads) {
        d.background[r * C + c] = narrow<T>(d_features ? light * d_features[r * C + c] : A(0));
      }
    }

    T* const d_w_to = d.w ? d.w + rays.first * S + first : nullptr;
    T* const d_t_to = d.t ? d.t + rays.first * (S + 1) + first : nullptr;
    A* const d_w_here = on_chip(arrays + 4 * chip, d_w_to);
    A* const d_t_here = on_chip(arrays + 5 * chip, d_t_to);
    A *const d_w_chip = d_w_here + team.index * S, *const d_t_chip =
                                                       d_t_here + team.index * (S + 1);
    for (int k = tile.begin; k < tile.end; ++k) {
      d_w_chip[k] = common;
      if (options.has_mean()) d_w_chip[k] += slope * place(options.depth, medium.mid(k));
    }

    for (int64_t c = 0; f && d_features && c < C; c += kChannels) {
      const int width = static_cast<int>(min(C - c, int64_t{kChannels}));
      const int64_t from = (r * S + first) * C;
      if (mine && team.rank < width) scale[team.rank] = d_features[r * C + c + team.rank];
      const A* const f_chip = load_channels(team, mine, tile, f + from, C, c, width, f_buffer);
      for (int k = tile.begin; k < tile.end; ++k) {
        A product = 0;
        for (int i = 0; i < width; ++i) product += scale[i] * f_chip[k * width + i];
        d_w_chip[k] += product;
      }
      if (d.f && mine) {
        const auto d_f_at = [&](int k, int i) {
          const bool is_behind = last && first + k == S - 1;
          return narrow<F>((is_behind ? weights[k] + light : weights[k]) * scale[i]);
        };
        const int values = tile.count * width;
        if (width == C) {
          F* const to = d.f + from;
          for_each_vector(
              to, values, [&](int i) { to[i] = d_f_at(i / width, i % width); },
              [&](int i) {
                Vector<F> out;
#pragma unroll
                for (int j = 0; j < Vector<F>::kLanes; ++j) {
                  out.value[j] = d_f_at((i + j) / width, (i + j) % width);
                }
                __stwb(reinterpret_cast<uint4*>(to + i), out.bits);
              },
              team.rank, kThreads);
        } else {
          for (int i = team.rank; i < values; i += kThreads) {
            d.f[from + i / width * C + c + i % width] = d_f_at(i / width, i % width);
          }
        }
      }
      __syncthreads();
    }
    if (f && !d_features && d.f && mine) {
      for (int64_t i = team.rank; i < tile.count * C; i += kThreads) {
        d.f[(r * S + first) * C + i] = narrow<F>(A(0));
      }
    }

    Sums<A, 1> own = {};
    if (options.density) {
      for (int k = tile.begin; k < tile.end; ++k) own.value[0] += d_w_chip[k] * weights[k];
    }
    const auto [after, total] = team.template scan<true>(own);
    A later = right_of_tile + after.value[0];
    right_of_tile += total.value[0];
    for (int k = tile.end - 1; k >= tile.begin; --k) {
      A d_width = 0;
      if (options.density) {
        const A g = d_w_chip[k], d_x = g * passed[k] - later;
        later += g * weights[k];
        d_w_chip[k] = d_x * medium.width(k);
        d_width = medium.d_width(k, d_x);
      }
      const A mid = medium.mid(k);
      A d_mid = slope * weights[k];
      if (options.depth == Depth::kLogMean) {
        d_mid = mid < kSmallest<A> ? A(0) : d_mid / mid;
      }
      if (first + k == fixed_sample) d_mid += fixed;
      d_t_chip[k + 1] = A(0.5) * d_mid + d_width;
      passed[k] = d_width - A(0.5) * d_mid;
      if (first + k == S - 1 && fixed_edge == S) d_t_chip[k + 1] += fixed;
    }
    __syncthreads();
    join_edges(tile, d_t_chip, passed, taken_next);
    if (first == 0 && mine && team.rank == 0) {
      d_t_chip[0] = (S ? -passed[0] : A(0)) + (fixed_edge == 0 ? fixed : A(0));
    }
    if (mine && tile.count) taken_next = passed[0];
    __syncthreads();
    if (d.w) store(d_w_to, d_w_here, rays.span(S, tile.count));
    if (d.t) {
      const int front = first > 0;
      store(d_t_to + front, d_t_here + front, rays.span(S + 1, tile.count + 1 - front));
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

using MaybeTensor = std::optional<Tensor>;

// The element types: f's may be half of the others'.
template <class Call>
void dispatch_pair(const Tensor& t, const MaybeTensor& f, const Call& call) {
  dispatch(t, [&](auto type) {
    if constexpr (std::is_same_v<decltype(type), float>) {
      if (f && is_half(*f)) {
        if (f->scalar_type() == ScalarType::Half) return call(type, half{});
        return call(type, bfloat16{});
      }
    }
    call(type, type);
  });
}

template <class T>
const T* maybe_data(const MaybeTensor& x) {
  return x ? data<T>(*x) : nullptr;
}

// How rays go over blocks, with so many arrays on chip and a few channels beside.
template <class T, class F, int arrays>
struct Layout {
  using A = accumulator<T>;
  Plan<A, arrays + kChannels> plan;
  Options options;

  Layout(const Tensor& t, const Tensor& w, const MaybeTensor& f, const MaybeTensor& background,
         int64_t depth, bool density, bool last_sample)
      : plan(t.numel() / (w.size(-1) + 1), w.size(-1)) {
    const int64_t S = w.size(-1), C = f ? f->size(-1) : background ? background->size(-1) : 0;
    const int width = f ? static_cast<int>(std::min<int64_t>(C, kChannels)) : 0;
    options = {t.numel() / (S + 1),
               S,
               C,
               static_cast<Depth>(depth),
               density,
               last_sample,
               plan.rays_per_block,
               plan.tile,
               plan.template chip<T>(),
               width ? chip_size<F>(plan.tile * width) : 0};
  }
  Grid grid(const Device& device) const {
    return plan.grid(arrays * options.chip + options.rays_per_block * options.f_chip,
                     device.stream());
  }
};

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& t, const Tensor& w, MaybeTensor f,
                                       MaybeTensor background, int64_t depth_kind, bool density,
                                       bool last_sample) {
  const Device device(t);
  auto sizes = leading_sizes(w, 1);
  Tensor depth = empty(t, sizes, accumulator_dtype(t));
  Tensor accumulation = empty(t, sizes, accumulator_dtype(t));
  sizes.push_back(f ? f->size(-1) : background ? background->size(-1) : 0);
  Tensor features = empty(t, sizes, accumulator_dtype(t));
  dispatch_pair(t, f, [&](auto type, auto f_type) {
    using T = decltype(type);
    using F = decltype(f_type);
    using A = accumulator<T>;
    const Layout<T, F, kFwdArrays> layout(t, w, f, background, depth_kind, density, last_sample);
    launch(layout.grid(device),
           layout.plan.teams.pick(composite_rays_fwd_kernel<kFew, T, F>,
                                  composite_rays_fwd_kernel<kWarp, T, F>,
                                  composite_rays_fwd_kernel<kBlock, T, F>),
           layout.options, data<T>(t), data<T>(w), maybe_data<F>(f), maybe_data<T>(background),
           mutable_data<A>(features), mutable_data<A>(depth), mutable_data<A>(accumulation));
  });
  return {features, depth, accumulation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(MaybeTensor d_features, MaybeTensor d_depth,
                                               MaybeTensor d_accumulation, const Tensor& t,
                                               const Tensor& w, MaybeTensor f,
                                               MaybeTensor background, int64_t depth, bool density,
                                               bool last_sample, int64_t needs) {
  const Device device(t);
  const auto gradient = [&](const MaybeTensor& x, int i) {
    return x ? empty_gradient(*x, needs, i) : empty(t, {0}, dtype_of(t));
  };
  Tensor d_t = gradient(t, 0), d_w = gradient(w, 1), d_f = gradient(f, 2);
  Tensor d_background = gradient(background, 3);
  if (d_t.numel() + d_w.numel() + d_f.numel() + d_background.numel() == 0) {
    return {d_t, d_w, d_f, d_background};
  }
  dispatch_pair(t, f, [&](auto type, auto f_type) {
    using T = decltype(type);
    using F = decltype(f_type);
    using A = accumulator<T>;
    const Layout<T, F, kBwdArrays> layout(t, w, f, background, depth, density, last_sample);
    const Gradients<T, F> d{mutable_data<T>(d_t), mutable_data<T>(d_w), mutable_data<F>(d_f),
                            mutable_data<T>(d_background)};
    launch(layout.grid(device),
           layout.plan.teams.pick(composite_rays_bwd_kernel<kFew, T, F>,
                                  composite_rays_bwd_kernel<kWarp, T, F>,
                                  composite_rays_bwd_kernel<kBlock, T, F>),
           layout.options, maybe_data<A>(d_features), maybe_data<A>(d_depth),
           maybe_data<A>(d_accumulation), data<T>(t), data<T>(w), maybe_data<F>(f),
           maybe_data<T>(background), d);
  });
  return {d_t, d_w, d_f, d_background};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("composite_rays", TORCH_BOX(&fwd));
  m.impl("composite_rays_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
