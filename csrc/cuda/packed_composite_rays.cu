// Compositing of packed rays: features = sum_i w_i f_i + (1 - sum_i w_i) background, depth and
// accumulation, with w given or from densities. A warp owns a ray, a block a long one, a thread
// kItems samples of each tile; weights, and kChannels of the features at a time, are on chip.
// Forward: one pass over memory. Backward: one, and t and w once more where a ray has several
// tiles; all heads are in a weight's gradient g_i = d_features . (f_i - background) +
// d_accumulation + d_depth (s_i - depth) / sum_i w_i, d_f_i = w_i d_features; for densities then
// the way back of ray_weights. docs/compositing.md
#include "packed.h"
#include "transmittance.h"

#include <cstring>

namespace rayfuse {
namespace {

enum class Depth : int64_t { kExpected, kLogMean, kMedian, kNone };

constexpr int kItems = 2;
// Channels on chip at once; of more than these a sector is read.
constexpr int kChannels = 8;

template <class A>
constexpr A kExpectedEps = A(1e-10);
template <class A>
constexpr A kLogMeanEps = std::numeric_limits<float>::epsilon();
// Whatever is as deep lets no light through; infinite sums would cancel to NaN.
template <class A>
constexpr A kDark = A(1.5) * std::numeric_limits<A>::max_exponent;

// Everything about the call that is not a tensor.
struct Options {
  int64_t R, P, C;
  Depth depth;
  bool density, last_sample;

  __device__ bool has_mean() const { return depth == Depth::kExpected || depth == Depth::kLogMean; }
  __device__ bool needs_intervals() const { return density || has_mean(); }
};

template <class T, class F>
struct Inputs {
  const T *t_starts, *t_ends, *w;  // [P]
  const int64_t* offsets;          // [R+1]
  const F* f;                      // [P, C] or null
  const T* background;             // [R, C] or null

  __device__ accumulator<T> mid(int64_t k) const {
    return accumulator<T>(0.5) * (widen(t_starts[k]) + widen(t_ends[k]));
  }
  // Channel c of what stands behind a ray's samples.
  __device__ accumulator<T> behind(const Options& options, const PackedRay& ray, int64_t c) const {
    if (options.last_sample && f && ray.begin < ray.end) {
      return widen(f[(ray.end - 1) * options.C + c]);
    }
    return background ? widen(background[ray.index * options.C + c]) : accumulator<T>(0);
  }
};

// What the mean depth is the mean of.
template <class A>
__device__ A place(Depth depth, A mid) {
  return depth == Depth::kExpected ? mid : log_of(mid < kSmallest<A> ? kSmallest<A> : mid);
}

// What the tiles to the left leave.
template <class A>
struct LeftOfTile {
  Running<A, false> depth, weight;
  Sums<A, 3> own = {};  // weights, weights times places, samples before half of the weight
};

// kItems samples of each thread of a team, from `first` on; those outside of the ray weigh nothing.
template <class A, int kThreads>
struct Items {
  static constexpr int kSize = kThreads * kItems;

  const Team<kThreads>& team;
  const PackedRay& ray;
  const int64_t first;
  // the samples of the tile that are in the ray
  const int64_t begin, end;
  A density[kItems], mid[kItems], width[kItems], w[kItems], passed[kItems];

  template <class T, class F>
  __device__ Items(const Team<kThreads>& team, const PackedRay& ray, const Options& options,
                   const Inputs<T, F>& in, int64_t first, LeftOfTile<A>& left)
      : team(team),
        ray(ray),
        first(first),
        begin(max(first, ray.begin)),
        end(min(first + kSize, ray.end)) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      density[i] = mid[i] = width[i] = 0;
      // all lanes read, so that the warp's requests stay whole
      if (first + i * kThreads >= ray.end) continue;
      const int64_t k = min(max(at(i), ray.begin), ray.end - 1);
      density[i] = widen(in.w[k]);
      if (options.needs_intervals()) {
        const A start = widen(in.t_starts[k]), stop = widen(in.t_ends[k]);
        mid[i] = A(0.5) * (start + stop);
        width[i] = stop - start;
      }
      if (!ray.has(at(i))) density[i] = width[i] = 0;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      w[i] = density[i];
      passed[i] = 0;
      if (options.density) {
        // a wall without width is nothing
        const bool nothing = density[i] > kLargest<A> && width[i] == 0;
        A x = nothing ? A(0) : density[i] * width[i];
        x = x > kDark<A> ? kDark<A> : x;
        const A before = left.depth.add(team, x);
        w[i] = exp_of(-before) * -expm1_of(-x);
        passed[i] = exp_of(-(before + x));
      }
      left.own.value[0] += w[i];
      if (options.has_mean()) left.own.value[1] += w[i] * place(options.depth, mid[i]);
      if (options.depth == Depth::kMedian) {
        const A sum = left.weight.add(team, w[i]) + w[i];
        left.own.value[2] += ray.has(at(i)) && sum < A(0.5);
      }
    }
  }

  __device__ int64_t at(int i) const { return first + i * kThreads + team.rank; }

  // Writes the weights of the tile; all can read them after a barrier.
  __device__ void share(A* weights) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) weights[i * kThreads + team.rank] = w[i];
  }
};

// The depth of a ray, and how it depends on the weights.
template <class A>
struct RayDepth {
  A value = 0, weight = 1, mean = 0;
  bool thin = false;
  // the midpoint, start or end that alone decides
  int64_t sample = -1, start = -1, end = -1;

  template <class T, class F>
  __device__ RayDepth(const Options& options, const Sums<A, 3>& sums, const PackedRay& ray,
                      const Inputs<T, F>& in) {
    const int64_t first = ray.begin, last = ray.end - 1;
    if (first > last || options.depth == Depth::kNone) return;
    if (options.depth == Depth::kMedian) {
      sample = min(first + static_cast<int64_t>(sums.value[2]), last);
      value = in.mid(sample);
      return;
    }
    const bool expected = options.depth == Depth::kExpected;
    thin = !expected && sums.value[0] < kLogMeanEps<A>;
    weight = expected ? sums.value[0] + kExpectedEps<A> : thin ? kLogMeanEps<A> : sums.value[0];
    mean = sums.value[1] / weight;
    value = expected ? mean : exp_of(mean);
    const A least = expected ? in.mid(first) : widen(in.t_starts[first]);
    const A most = expected ? in.mid(last) : widen(in.t_ends[last]);
    if (value < least) {
      (expected ? sample : start) = first;
      value = least;
    } else if (value > most) {
      (expected ? sample : end) = last;
      value = most;
    }
  }
};

// Rows of shared memory, one for each warp; a block has them all. Features of a tile take one.
template <class F>
using FeatureRow = accumulator<F>[chip_size<F>(kWarp * kItems * kChannels)];

// `width` channels from c on of the samples begin..end: the k-th one's lie at k width when all have
// passed the barrier.
template <int kThreads, class F>
__device__ const accumulator<F>* load_channels(const Team<kThreads>& team, const F* f, int64_t C,
                                               int64_t begin, int64_t end, int64_t c, int width,
                                               accumulator<F>* chip) {
  const F* const from = f + begin * C + c;
  const int values = static_cast<int>(end - begin) * width;
  // what the last ones held has been read
  sync(team);
  if (width == C) {
    chip = on_chip(chip, from);
    load(from, chip, values, team.rank, kThreads);
  } else {
    for (int i = team.rank; i < values; i += kThreads) {
      chip[i] = widen(from[i / width * C + i % width]);
    }
  }
  sync(team);
  return chip;
}

template <class T, class F>
__global__ void __launch_bounds__(kBlock, 1)
    packed_composite_rays_fwd_kernel(Options options, Inputs<T, F> in,
                                     accumulator<T>* __restrict__ features,        // [R, C]
                                     accumulator<T>* __restrict__ depth,           // [R]
                                     accumulator<T>* __restrict__ accumulation) {  // [R]
  using A = accumulator<T>;
  __shared__ __align__(16) FeatureRow<F> f_rows[kPackedRays];
  // g++ sees no use of a static inside a generic lambda
  FeatureRow<F>* const f_chips = f_rows;
  const int64_t C = options.C;
  for_each_packed_ray(
      in.offsets, options.R, options.P,
      [&]<int kThreads>(const Team<kThreads>& team, PackedRay ray) {
        using Items = Items<A, kThreads>;
        A* const sums = features + ray.index * C;
        LeftOfTile<A> left;
        for (int64_t first = first_tile(ray.begin); first < ray.end; first += Items::kSize) {
          const Items items(team, ray, options, in, first, left);
          for (int64_t c = 0; in.f && c < C; c += kChannels) {
            const int width = static_cast<int>(min(C - c, int64_t{kChannels}));
            const A* const f =
                load_channels(team, in.f, C, items.begin, items.end, c, width, f_chips[team.index]);
            Sums<A, kChannels> own = {};
#pragma unroll
            for (int i = 0; i < kItems; ++i) {
              if (!ray.has(items.at(i))) continue;
              const A* const f_k = f + (items.at(i) - items.begin) * width;
#pragma unroll
              for (int j = 0; j < kChannels; ++j) {
                if (j < width) own.value[j] += items.w[i] * f_k[j];
              }
            }
            const auto total = team.template scan<false>(own).total;
            if (team.rank == 0) {
              const bool is_first = first <= ray.begin;
#pragma unroll
              for (int j = 0; j < kChannels; ++j) {
                if (j < width) sums[c + j] = (is_first ? A(0) : sums[c + j]) + total.value[j];
              }
            }
          }
        }
        const auto total = team.template scan<false>(left.own).total;
        if (team.rank == 0) {
          depth[ray.index] = RayDepth<A>(options, total, ray, in).value;
          accumulation[ray.index] = total.value[0];
        }
        sync(team);
        const bool has_sums = in.f && ray.begin < ray.end;
        for (int64_t c = team.rank; c < C; c += kThreads) {
          const A behind = in.behind(options, ray, c);
          sums[c] = (has_sums ? sums[c] : A(0)) + (1 - total.value[0]) * behind;
        }
      });
}

template <class T, class F>
struct Gradients {
  T *t_starts, *t_ends, *w;  // [P] or null
  F* f;                      // [P, C] or null
  T* background;             // [R, C] or null

  __device__ void store(int64_t k, accumulator<T> d_start, accumulator<T> d_end,
                        accumulator<T> d_w) const {
    if (t_starts) t_starts[k] = narrow<T>(d_start);
    if (t_ends) t_ends[k] = narrow<T>(d_end);
    if (w) w[k] = narrow<T>(d_w);
  }
  // Where a tile may keep a value: where its gradients will be. Null if there are none.
  __device__ void* kept(int64_t first, int64_t C) const {
    T* const each = w ? w : t_starts ? t_starts : t_ends;
    if (each) return each + first;
    return f ? f + first * C : nullptr;
  }
};

template <class T, class F>
__global__ void __launch_bounds__(kBlock, 1) packed_composite_rays_bwd_kernel(
    Options options,
    const accumulator<T>* __restrict__ d_features,      // [R, C] or null
    const accumulator<T>* __restrict__ d_depth,         // [R] or null
    const accumulator<T>* __restrict__ d_accumulation,  // [R] or null
    Inputs<T, F> in, Gradients<T, F> d) {
  using A = accumulator<T>;
  __shared__ __align__(16) FeatureRow<F> f_rows[kPackedRays];
  __shared__ A weight_rows[kPackedRays][kWarp * kItems], scale_rows[kPackedRays][kChannels];
  FeatureRow<F>* const f_chips = f_rows;
  auto* const weight_chips = weight_rows;
  auto* const scales = scale_rows;
  const int64_t C = options.C;
  for_each_stray_sample(in.offsets, options.R, options.P, [&](int64_t k) {
    d.store(k, 0, 0, 0);
    for (int64_t c = 0; d.f && c < C; ++c) d.f[k * C + c] = narrow<F>(A(0));
  });
  for_each_packed_ray(
      in.offsets, options.R, options.P,
      [&]<int kThreads>(const Team<kThreads>& team, PackedRay ray) {
        using Items = Items<A, kThreads>;
        const int64_t r = ray.index;
        A* const weights = weight_chips[team.index];
        A* const scale = scales[team.index];
        LeftOfTile<A> left;
        int64_t first = first_tile(ray.begin);
        for (; first + Items::kSize < ray.end; first += Items::kSize) {
          if (void* const kept = d.kept(first, C); kept && team.rank == 0 && first > ray.begin) {
            memcpy(kept, &left.depth.sum, sizeof(A));
          }
          Items(team, ray, options, in, first, left);
        }
        sync(team);

        // g_i = products with the features + common + slope place_i
        A light = 1, common = 0, slope = 0, fixed = 0;
        int64_t fixed_sample = -1, fixed_start = -1, fixed_end = -1;
        Running<A, true> behind;
        bool is_last = true;
        do {
          if (!is_last) {
            left = {};
            const void* const kept = d.kept(first, C);
            if (kept && first > ray.begin) memcpy(&left.depth.sum, kept, sizeof(A));
            sync(team);
          }
          const Items items(team, ray, options, in, first, left);
          if (is_last) {
            const auto sums = team.template scan<false>(left.own).total;
            light = 1 - sums.value[0];
            if (d_accumulation) common = d_accumulation[r];
            if (d_depth) {
              const RayDepth<A> depth(options, sums, ray, in);
              fixed = d_depth[r];
              fixed_sample = depth.sample, fixed_start = depth.start, fixed_end = depth.end;
              if (options.has_mean() && fixed_sample < 0 && fixed_start < 0 && fixed_end < 0) {
                slope = (options.depth == Depth::kExpected ? fixed : fixed * depth.value) /
                        depth.weight;
                if (!depth.thin) common -= slope * depth.mean;
              }
            }
            A shown = 0;
            for (int64_t c = team.rank; c < C; c += kThreads) {
              const A d_feature = d_features ? d_features[r * C + c] : A(0);
              shown += d_feature * in.behind(options, ray, c);
              if (d.background) d.background[r * C + c] = narrow<T>(light * d_feature);
            }
            common -= team.sum(shown);
            is_last = false;
          }

          A g[kItems];
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            g[i] = common;
            if (options.has_mean()) g[i] += slope * place(options.depth, items.mid[i]);
          }
          items.share(weights);
          for (int64_t c = 0; in.f && d_features && c < C; c += kChannels) {
            const int width = static_cast<int>(min(C - c, int64_t{kChannels}));
            // the barriers of load_channels part it from those who read the last ones
            const A* const f =
                load_channels(team, in.f, C, items.begin, items.end, c, width, f_chips[team.index]);
            if (team.rank < width) scale[team.rank] = d_features[r * C + c + team.rank];
            sync(team);
#pragma unroll
            for (int i = 0; i < kItems; ++i) {
              if (!ray.has(items.at(i))) continue;
              const A* const f_k = f + (items.at(i) - items.begin) * width;
              A product = 0;
              for (int j = 0; j < width; ++j) product += scale[j] * f_k[j];
              g[i] += product;
            }
            if (!d.f) continue;
            const int values = static_cast<int>(items.end - items.begin) * width;
            const auto d_f_at = [&](int i) {
              const int64_t k = items.begin + i / width;
              const bool is_behind = options.last_sample && k == ray.end - 1;
              const A share = weights[k - first] + (is_behind ? light : A(0));
              return narrow<F>(share * scale[i % width]);
            };
            F* const to = d.f + items.begin * C + c;
            if (width == C) {
              for_each_vector(
                  to, values, [&](int i) { to[i] = d_f_at(i); },
                  [&](int i) {
                    Vector<F> out;
#pragma unroll
                    for (int j = 0; j < Vector<F>::kLanes; ++j) out.value[j] = d_f_at(i + j);
                    __stwb(reinterpret_cast<uint4*>(to + i), out.bits);
                  },
                  team.rank, kThreads);
            } else {
              for (int i = team.rank; i < values; i += kThreads)
                to[i / width * C + i % width] = d_f_at(i);
            }
          }
          if (in.f && !d_features && d.f) {
            for (int64_t i = items.begin * C + team.rank; i < items.end * C; i += kThreads) {
              d.f[i] = narrow<F>(A(0));
            }
          }

#pragma unroll
          for (int i = kItems - 1; i >= 0; --i) {
            const int64_t k = items.at(i);
            A d_w = g[i], d_width = 0;
            if (options.density) {
              const A later = behind.add(team, ray.has(k) ? g[i] * items.w[i] : A(0));
              const A d_x = g[i] * items.passed[i] - later;
              d_w = d_x * items.width[i];
              // a wall stays one, however thick it is
              d_width = items.density[i] > kLargest<A> ? A(0) : d_x * items.density[i];
            }
            if (!ray.has(k)) continue;
            A d_mid = slope * items.w[i];
            if (options.depth == Depth::kLogMean) {
              d_mid = items.mid[i] < kSmallest<A> ? A(0) : d_mid / items.mid[i];
            }
            if (k == fixed_sample) d_mid += fixed;
            d.store(k, A(0.5) * d_mid - d_width + (k == fixed_start ? fixed : A(0)),
                    A(0.5) * d_mid + d_width + (k == fixed_end ? fixed : A(0)), d_w);
          }
          sync(team);
          first -= Items::kSize;
        } while (first + Items::kSize > ray.begin);
      });
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

using MaybeTensor = std::optional<Tensor>;

// The element types: f's may be half of the others'.
template <class Call>
void dispatch_pair(const Tensor& w, const MaybeTensor& f, const Call& call) {
  dispatch(w, [&](auto type) {
    if constexpr (std::is_same_v<decltype(type), float>) {
      if (f && is_half(*f)) {
        if (f->scalar_type() == ScalarType::Half) return call(type, half{});
        return call(type, bfloat16{});
      }
    }
    call(type, type);
  });
}

Options options_of(const Tensor& w, const Tensor& offsets, const MaybeTensor& f,
                   const MaybeTensor& background, int64_t depth, bool density, bool last_sample) {
  const int64_t C = f ? f->size(-1) : background ? background->size(-1) : 0;
  return {offsets.numel() - 1, w.numel(), C, static_cast<Depth>(depth), density, last_sample};
}

template <class T, class F>
Inputs<T, F> inputs_of(const Tensor& t_starts, const Tensor& t_ends, const Tensor& w,
                       const Tensor& offsets, const MaybeTensor& f, const MaybeTensor& background) {
  return {data<T>(t_starts),      data<T>(t_ends), data<T>(w),
          data<int64_t>(offsets), data<F>(f),      data<T>(background)};
}

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& t_starts, const Tensor& t_ends,
                                       const Tensor& w, const Tensor& offsets, MaybeTensor f,
                                       MaybeTensor background, int64_t depth_kind, bool density,
                                       bool last_sample) {
  const Device device(w);
  const Options options = options_of(w, offsets, f, background, depth_kind, density, last_sample);
  Tensor features = empty(w, {options.R, options.C}, accumulator_dtype(w));
  Tensor depth = empty(w, {options.R}, accumulator_dtype(w));
  Tensor accumulation = empty(w, {options.R}, accumulator_dtype(w));
  dispatch_pair(w, f, [&](auto type, auto f_type) {
    using T = decltype(type);
    using F = decltype(f_type);
    using A = accumulator<T>;
    launch({packed_blocks(options.R), kBlock, 0, device.stream()},
           packed_composite_rays_fwd_kernel<T, F>, options,
           inputs_of<T, F>(t_starts, t_ends, w, offsets, f, background), mutable_data<A>(features),
           mutable_data<A>(depth), mutable_data<A>(accumulation));
  });
  return {features, depth, accumulation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
    MaybeTensor d_features, MaybeTensor d_depth, MaybeTensor d_accumulation, const Tensor& t_starts,
    const Tensor& t_ends, const Tensor& w, const Tensor& offsets, MaybeTensor f,
    MaybeTensor background, int64_t depth, bool density, bool last_sample, int64_t needs) {
  const Device device(w);
  const Options options = options_of(w, offsets, f, background, depth, density, last_sample);
  Tensor d_t_starts = empty_gradient(t_starts, needs, 0);
  Tensor d_t_ends = empty_gradient(t_ends, needs, 1), d_w = empty_gradient(w, needs, 2);
  Tensor d_f = empty_gradient(f, w, needs, 3),
         d_background = empty_gradient(background, w, needs, 4);
  const int64_t values =
      d_t_starts.numel() + d_t_ends.numel() + d_w.numel() + d_f.numel() + d_background.numel();
  if (values == 0) return {d_t_starts, d_t_ends, d_w, d_f, d_background};
  dispatch_pair(w, f, [&](auto type, auto f_type) {
    using T = decltype(type);
    using F = decltype(f_type);
    using A = accumulator<T>;
    const Gradients<T, F> d{mutable_data<T>(d_t_starts), mutable_data<T>(d_t_ends),
                            mutable_data<T>(d_w), mutable_data<F>(d_f),
                            mutable_data<T>(d_background)};
    // one block at least, for samples of no ray
    launch({std::max<int64_t>(packed_blocks(options.R), 1), kBlock, 0, device.stream()},
           packed_composite_rays_bwd_kernel<T, F>, options, data<A>(d_features), data<A>(d_depth),
           data<A>(d_accumulation), inputs_of<T, F>(t_starts, t_ends, w, offsets, f, background),
           d);
  });
  return {d_t_starts, d_t_ends, d_w, d_f, d_background};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_composite_rays", TORCH_BOX(&fwd));
  m.impl("packed_composite_rays_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
