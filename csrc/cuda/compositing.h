// What composite_rays shares with its packed form on a GPU: samples of rays on chip, the passes of
// a team along them, and how depth and features of a ray depend on its samples. A team owns a ray,
// a thread a run of its samples. A crew, a warp or the block of a long ray, reads and writes what
// lies end to end as one piece: samples of several rays, and all channels of their features if
// these are few; of more channels kFew threads read a sector at a time, from memory.
#pragma once

#include "crew.h"
#include "transmittance.h"

#include <cstring>

namespace rayfuse {

enum class Depth : int64_t { kExpected, kLogMean, kMedian, kNone };

// So many channels are on chip with their samples.
constexpr int kFewChannels = 4;
// Arrays on chip beside times and features: w; and its gradients, and what a sample lets through
// and weighs.
constexpr int kFwdArrays = 1, kBwdArrays = 4;

template <class A>
constexpr A kExpectedEps = A(1e-10);
template <class A>
constexpr A kLogMeanEps = std::numeric_limits<float>::epsilon();
// Whatever is as deep lets no light through; infinite sums would cancel to NaN.
template <class A>
constexpr A kDark = A(1.5) * std::numeric_limits<A>::max_exponent;
// Blocks on a multiprocessor, of so many registers that none is spilled: the warps of all hide what
// each of them waits for.
template <class T, int blocks>
constexpr int kBlocks = sizeof(T) == 8 ? blocks / 2 : blocks;

// Everything about the call that is neither a tensor nor how rays lie in memory.
struct Options {
  int64_t C;
  Depth depth;
  bool density, last_sample;
  // channels on chip, if they are few; samples on chip, of a ray; values of an array of them, and
  // of their features
  int few, tile, chip, f_chip;

  // Keeps so many samples of a ray on chip, which are these edges and samples of a crew; how many
  // values that takes.
  template <class T, class F>
  int fit(int samples, int of_crew, int arrays) {
    tile = samples, chip = chip_size<T>(of_crew);
    f_chip = few ? chip_size<F>(few * of_crew) : 0;
    return arrays * chip + f_chip;
  }
  __device__ bool has_mean() const { return depth == Depth::kExpected || depth == Depth::kLogMean; }
};

// Calls f<n>() for a number of few channels.
template <class Call>
__device__ void with_channels(int n, const Call& call) {
  if (n == 3) return call.template operator()<3>();
  if (n == 1) return call.template operator()<1>();
  if (n == 4) return call.template operator()<4>();
  if (n == 2) return call.template operator()<2>();
}

// What 1 - exp(-x) is, given exp(-x): a series where that would cancel.
__device__ inline float stopped(float x, float passed) {
  constexpr float terms[] = {1.f / 40320, 1.f / 5040, 1.f / 720, 1.f / 120,
                             1.f / 24,    1.f / 6,    1.f / 2,   1.f};
  float series = 0;
#pragma unroll
  for (const float term : terms) series = std::fma(-x, series, term);
  return std::abs(x) < 0.5f ? x * series : 1 - passed;
}
__device__ inline double stopped(double x, double) { return -expm1(-x); }

// ---- on chip

// The part of the block's shared memory that a crew has.
template <class A, int kThreads>
__device__ A* room_of(const Crew<kThreads>& crew, const Options& options, int arrays) {
  A* const all = reinterpret_cast<A*>(shared_memory);
  return all + crew.index * (arrays * options.chip + options.f_chip);
}

// Samples on chip, the first of the crew at 0.
template <class A>
struct Samples {
  const A *starts, *ends;
  A* w;

  __device__ A width(int k) const { return ends[k] - starts[k]; }
  __device__ A mid(int k) const { return A(0.5) * (starts[k] + ends[k]); }
  // a wall without width is nothing
  __device__ A depth(int k) const {
    const A x = w[k] > kLargest<A> && width(k) == 0 ? A(0) : w[k] * width(k);
    return x > kDark<A> ? kDark<A> : x;
  }
  // of a width; a wall stays one, however thick it is
  __device__ A d_width(int k, A d_depth) const {
    return w[k] > kLargest<A> ? A(0) : d_depth * w[k];
  }
};

// ---- along a ray

// What the mean depth is the mean of.
template <class A>
__device__ A place(Depth depth, A mid) {
  return depth == Depth::kExpected ? mid : log_of(mid < kSmallest<A> ? kSmallest<A> : mid);
}

// The pass from the left of a team over its ray, a tile at a time. Loops over the few samples of a
// thread are not unrolled, here and below: that cost registers, so that fewer warps waited
// together.
template <int kThreads, class A>
struct LeftPass {
  const Team<kThreads>& team;
  const Options& options;
  TileSum<A> depth = {}, weight = {};  // of the tiles before
  Sums<A, 3> own = {};  // weights, weights times places, samples before half of the weight

  // Writes the weights of this thread's samples, maybe over those given, and the light behind each
  // unless it is null.
  __device__ void step(const Piece& piece, const Samples<A>& samples, A* weights, A* passed) {
    A light = 0;
    if (options.density) {
      Sums<A, 1> x = {};
#pragma unroll 1
      for (int k = piece.begin; k < piece.end; ++k) x.value[0] += samples.depth(k);
      const auto [before, total] = team.template scan<false>(x);
      light = exp_of(-(depth.sum + before.value[0]));
      depth.add(total.value[0]);
    }
    Sums<A, 1> here = {};
#pragma unroll 1
    for (int k = piece.begin; k < piece.end; ++k) {
      A w = samples.w[k];
      if (options.density) {
        const A x = samples.depth(k), through = exp_of(-x);
        w = light * stopped(x, through);
        light *= through;
        if (passed) passed[k] = light;
      }
      here.value[0] += w;
      if (options.has_mean()) {
        own.value[1] = std::fma(w, place(options.depth, samples.mid(k)), own.value[1]);
      }
      weights[k] = w;
    }
    own.value[0] += here.value[0];
    if (options.depth == Depth::kMedian) {
      const auto [before, total] = team.template scan<false>(here);
      A sum = weight.sum + before.value[0];
#pragma unroll 1
      for (int k = piece.begin; k < piece.end; ++k) own.value[2] += (sum += weights[k]) < A(0.5);
      weight.add(total.value[0]);
    }
  }
  // The sums of the ray.
  __device__ Sums<A, 3> sums() const {
    return Sums<A, 3>::each([&](int i) { return team.sum(own.value[i]); });
  }
};

// The depth of a ray, and how it depends on the weights.
template <class A>
struct RayDepth {
  A value = 0, weight = 1, mean = 0;
  bool thin = false;
  // the sample that alone decides, or -1, and how by its start and its end
  int64_t sample = -1;
  A by_start = A(0.5), by_end = A(0.5);

  template <class Rays>
  __device__ RayDepth(const Options& options, const Sums<A, 3>& sums, const Rays& rays) {
    const int64_t last = rays.samples - 1;
    if (!rays.exists || last < 0 || options.depth == Depth::kNone) return;
    const auto mid = [&](int64_t k) { return A(0.5) * (rays.start(k) + rays.end(k)); };
    if (options.depth == Depth::kMedian) {
      sample = min(static_cast<int64_t>(sums.value[2]), last);
      value = mid(sample);
      return;
    }
    const bool expected = options.depth == Depth::kExpected;
    thin = !expected && sums.value[0] < kLogMeanEps<A>;
    weight = expected ? sums.value[0] + kExpectedEps<A> : thin ? kLogMeanEps<A> : sums.value[0];
    mean = sums.value[1] / weight;
    value = expected ? mean : exp_of(mean);
    const A least = expected ? mid(0) : rays.start(0), most = expected ? mid(last) : rays.end(last);
    const bool below = value < least;
    const bool above = value > most;
    if (below || above) {
      value = below ? least : most;
      sample = below ? 0 : last;
      if (!expected) by_start = below, by_end = above;
    }
  }
};

template <class T, class F>
struct Inputs {
  const T* w;           // of samples
  const F* f;           // of samples, [C], or null
  const T* background;  // of rays, [C], or null

  template <class Rays>
  __device__ bool shows_last(const Options& options, const Rays& rays) const {
    return options.last_sample && f && rays.samples > 0;
  }
  // Channel c of what stands behind the samples of a ray.
  template <class Rays>
  __device__ accumulator<T> behind(const Options& options, const Rays& rays, int64_t c) const {
    if (shows_last(options, rays)) {
      return widen(f[(rays.begin + rays.own + rays.samples - 1) * options.C + c]);
    }
    return background ? widen(background[rays.index * options.C + c]) : accumulator<T>(0);
  }
};

// The threads of a team that look at the channels of a sample together, and their samples.
template <int kThreads>
struct ChannelLanes {
  static constexpr int kGroups = kThreads / kFew;

  const int lane, group;

  __device__ explicit ChannelLanes(const Team<kThreads>& team)
      : lane(team.rank % kFew), group(team.rank / kFew) {}
};

template <class A>
struct Outputs {
  A* features;      // [R, C]
  A* depth;         // [R]
  A* accumulation;  // [R]
};

template <class Rays, class T, class F>
__device__ void composite(const Options& options, const Rays& rays, const Inputs<T, F>& in,
                          const Outputs<accumulator<T>>& out, accumulator<T>* room) {
  using A = accumulator<T>;
  constexpr int kThreads = Rays::kThreads;
  const auto& crew = rays.crew;
  const auto& team = crew.team;
  const int64_t C = options.C;
  A* const row = out.features + rays.index * C;
  const int tile = Rays::kRooms * options.tile, chip = Rays::kRooms * options.chip;
  A *const w_room = room + Rays::kTimes * chip, *const f_room = w_room + kFwdArrays * chip;

  LeftPass<kThreads, A> left{team, options};
  Sums<A, kFewChannels> own = {};
  // all rays of a crew, empty ones too, have the same number of tiles
  int64_t first = -rays.lead;
  do {
    const Piece piece(rays, first, tile);
    // what they held has been read
    crew.sync();
    Samples<A> samples = rays.read(piece, options, room);
    samples.w = crew.read(in.w + piece.from, w_room, piece.all);
    const int few = options.few;
    const A* f = nullptr;
    if (few) f = crew.read(in.f + piece.from * C, f_room, piece.all * few);
    crew.sync();
    left.step(piece, samples, samples.w, nullptr);
    with_channels(few, [&]<int n>() {
#pragma unroll 1
      for (int k = piece.begin; k < piece.end; ++k) {
#pragma unroll
        for (int j = 0; j < n; ++j) {
          own.value[j] = std::fma(samples.w[k], f[k * n + j], own.value[j]);
        }
      }
    });
    if (!in.f || few) continue;

    crew.sync();
    const ChannelLanes<kThreads> lanes(team);
    constexpr int kGroups = ChannelLanes<kThreads>::kGroups;
    // warps of a block take turns with the channels
    constexpr int kWarpGroups = kWarp / kFew < kGroups ? kWarp / kFew : kGroups;
    const int group = lanes.group % kWarpGroups;
    for (int64_t c0 = lanes.group / kWarpGroups * kFew; c0 < C;
         c0 += kGroups / kWarpGroups * kFew) {
      const int64_t c = c0 + lanes.lane;
      const bool has = piece.exists && c < C;
      A sum = 0;
      if (has) {
        const F* const f_c = in.f + (piece.from + piece.own) * C + c;
#pragma unroll 2
        for (int k = group; k < piece.count; k += kWarpGroups) {
          sum = std::fma(samples.w[piece.own + k], widen(f_c[k * C]), sum);
        }
      }
#pragma unroll
      for (int places = kFew; places < kFew * kWarpGroups; places *= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, places);
      }
      if (has && group == 0) row[c] = (piece.first > 0 ? row[c] : A(0)) + sum;
    }
  } while (!Rays::kOneTile && (first += tile) < rays.samples);

  const auto sums = left.sums();
  A own_channel = 0;
  with_channels(options.few, [&]<int n>() {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const A total = team.sum(own.value[j]);
      if (team.rank == j) own_channel = total;
    }
  });
  crew.sync();
  if (!rays.exists) return;
  if (team.rank == 0) {
    out.depth[rays.index] = RayDepth<A>(options, sums, rays).value;
    out.accumulation[rays.index] = sums.value[0];
  }
  const bool has_row = in.f && !options.few && rays.samples > 0;
  const bool shows = in.background || in.shows_last(options, rays);
#pragma unroll 1
  for (int64_t c = team.rank; c < C; c += kThreads) {
    const A sum = has_row ? row[c] : own_channel;
    row[c] = shows ? std::fma(1 - sums.value[0], in.behind(options, rays, c), sum) : sum;
  }
}

template <class A>
struct Incoming {
  const A* features;      // [R, C] or null
  const A* depth;         // [R] or null
  const A* accumulation;  // [R] or null
};

template <class T, class F>
struct Gradients {
  T* w;           // of samples, or null
  F* f;           // of samples, [C], or null
  T* background;  // of rays, [C], or null
};

// g_i = products with the features + common + slope (place_i - mean), the gradient of a weight.
template <class A>
struct Slopes {
  A light = 1, common = 0, slope = 0, mean = 0;
  // what the times of the sample that alone decides on the depth get
  A fixed_start = 0, fixed_end = 0;
  int64_t fixed_sample = -1;

  template <class Rays>
  __device__ void add_depth(const Options& options, const Sums<A, 3>& sums, const Rays& rays,
                            A d_depth) {
    const RayDepth<A> depth(options, sums, rays);
    fixed_sample = depth.sample;
    fixed_start = depth.by_start * d_depth, fixed_end = depth.by_end * d_depth;
    if (!options.has_mean() || depth.sample >= 0) return;
    slope = (options.depth == Depth::kExpected ? d_depth : d_depth * depth.value) / depth.weight;
    if (!depth.thin) mean = depth.mean;
  }
};

template <class Rays, class T, class F>
__device__ void composite_back(const Options& options, const Rays& rays,
                               const Incoming<accumulator<T>>& d_out, const Inputs<T, F>& in,
                               const Gradients<T, F>& d, accumulator<T>* room) {
  using A = accumulator<T>;
  constexpr int kThreads = Rays::kThreads;
  const auto& crew = rays.crew;
  const auto& team = crew.team;
  const int64_t C = options.C;
  const int tile = Rays::kRooms * options.tile, chip = Rays::kRooms * options.chip;
  A *const w_room = room + Rays::kTimes * chip, *const f_room = w_room + kBwdArrays * chip;
  const auto read = [&](const Piece& piece) {
    // what they held has been read
    crew.sync();
    Samples<A> samples = rays.read(piece, options, room);
    samples.w = crew.read(in.w + piece.from, w_room, piece.all);
    return samples;
  };
  // How deep a tile lies is kept where its gradients will be.
  const auto kept = [&](int64_t first) -> void* {
    const int64_t k = rays.begin + first;
    if (d.w) return d.w + k;
    if (void* const times = rays.kept(first)) return times;
    return d.f ? d.f + k * C : nullptr;
  };

  LeftPass<kThreads, A> left{team, options};
  int64_t first = -rays.lead;
  for (; !Rays::kOneTile && first + tile < rays.samples; first += tile) {
    const Piece piece(rays, first, tile);
    const Samples<A> samples = read(piece);
    void* const to = kept(piece.first);
    if (to && team.rank == 0 && piece.first > 0) memcpy(to, &left.depth.sum, sizeof(A));
    crew.sync();
    left.step(piece, samples, samples.w, nullptr);
  }

  Slopes<A> slopes;
  TileSum<A> behind;
  const int few = d_out.features ? options.few : 0;
  A next_start = 0;
  for (bool is_last = true; first >= -rays.lead; first -= tile, is_last = false) {
    if (Rays::kOneTile && !is_last) break;
    const Piece piece(rays, first, tile);
    const Samples<A> samples = read(piece);
    const F* const f_from = in.f + piece.from * C;
    A* f = nullptr;
    if (few) f = crew.read(f_from, f_room, piece.all * few);
    if (!is_last) {
      left.depth = {};
      const void* const from = kept(piece.first);
      if (from && piece.first > 0) memcpy(&left.depth.sum, from, sizeof(A));
    }
    crew.sync();
    T* const d_w_to = d.w ? d.w + piece.from : nullptr;
    A* const g = on_chip(w_room + chip, d_w_to);
    // of the weights, then of the starts and ends
    A* const passed = on_chip(w_room + 2 * chip, rays.d_starts(piece));
    A* const weights = on_chip(w_room + 3 * chip, rays.d_ends(piece));
    left.step(piece, samples, weights, passed);

    if (is_last) {
      const auto sums = left.sums();
      slopes.light = 1 - sums.value[0];
      A shown = 0;
      if (rays.exists) {
        if (d_out.accumulation) slopes.common = d_out.accumulation[rays.index];
        if (d_out.depth) slopes.add_depth(options, sums, rays, d_out.depth[rays.index]);
#pragma unroll 1
        for (int64_t c = team.rank; c < C; c += kThreads) {
          const A d_feature = d_out.features ? d_out.features[rays.index * C + c] : A(0);
          shown = std::fma(d_feature, in.behind(options, rays, c), shown);
          if (d.background) {
            d.background[rays.index * C + c] = narrow<T>(slopes.light * d_feature);
          }
        }
      }
      slopes.common -= team.sum(shown);
    }
    const auto share_at = [&](int k) {
      const bool is_behind =
          options.last_sample && piece.first + (k - piece.own) == rays.samples - 1;
      return is_behind ? weights[k] + slopes.light : weights[k];
    };
    const A* const d_features = d_out.features + rays.index * C;

    if (few) {
      with_channels(few, [&]<int n>() {
        A scale[n];
#pragma unroll
        for (int j = 0; j < n; ++j) scale[j] = rays.exists ? d_features[j] : A(0);
#pragma unroll 1
        for (int k = piece.begin; k < piece.end; ++k) {
          const A share = share_at(k);
          A product = 0;
#pragma unroll
          for (int j = 0; j < n; ++j) {
            product = std::fma(scale[j], f[k * n + j], product);
            f[k * n + j] = share * scale[j];
          }
          g[k] = product;
        }
      });
    } else if (in.f && d_out.features) {
      // g is the part of d_features that is d_f, for all lanes, until there is the product
#pragma unroll 1
      for (int k = piece.begin; k < piece.end; ++k) g[k] = share_at(k);
      crew.sync();
      const ChannelLanes<kThreads> lanes(team);
      const int longest = rays.longest_of(piece);
      for (int k0 = 0; k0 < longest; k0 += ChannelLanes<kThreads>::kGroups) {
        const int k = piece.own + k0 + lanes.group;
        const bool has = piece.exists && k0 + lanes.group < piece.count;
        A product = 0;
        if (has) {
          const A share = g[k];
          const F* const f_k = f_from + k * C;
          F* const d_f_k = d.f + (piece.from + k) * C;
#pragma unroll 2
          for (int64_t c = lanes.lane; c < C; c += kFew) {
            product = std::fma(d_features[c], widen(f_k[c]), product);
            if (d.f) d_f_k[c] = narrow<F>(share * d_features[c]);
          }
        }
#pragma unroll
        for (int places = kFew / 2; places > 0; places /= 2) {
          product += __shfl_xor_sync(kAllLanes, product, places);
        }
        __syncwarp();
        if (has && lanes.lane == 0) g[k] = product;
      }
      crew.sync();
    } else {
#pragma unroll 1
      for (int k = piece.begin; k < piece.end; ++k) g[k] = 0;
    }

    Sums<A, 1> own = {};
#pragma unroll 1
    for (int k = piece.begin; k < piece.end; ++k) {
      A g_k = g[k] + slopes.common;
      if (options.has_mean()) {
        g_k = std::fma(slopes.slope, place(options.depth, samples.mid(k)) - slopes.mean, g_k);
      }
      g[k] = g_k;
      own.value[0] = std::fma(g_k, weights[k], own.value[0]);
    }
    A later = 0;
    if (options.density) {
      const auto [after, total] = team.template scan<true>(own);
      later = behind.sum + after.value[0];
      behind.add(total.value[0]);
    }
#pragma unroll 1
    for (int k = piece.end - 1; k >= piece.begin; --k) {
      const int64_t sample = piece.first + (k - piece.own);
      A d_width = 0;
      if (options.density) {
        const A g_k = g[k], d_x = std::fma(g_k, passed[k], -later);
        later = std::fma(g_k, weights[k], later);
        g[k] = d_x * samples.width(k);
        d_width = samples.d_width(k, d_x);
      }
      A d_mid = slopes.slope * weights[k];
      if (options.depth == Depth::kLogMean) {
        const A mid = samples.mid(k);
        d_mid = mid < kSmallest<A> ? A(0) : d_mid / mid;
      }
      const bool is_fixed = sample == slopes.fixed_sample;
      passed[k] = std::fma(A(0.5), d_mid, (is_fixed ? slopes.fixed_start : A(0)) - d_width);
      weights[k] = std::fma(A(0.5), d_mid, (is_fixed ? slopes.fixed_end : A(0)) + d_width);
    }
    crew.sync();
    rays.write(piece, options, room, passed, weights, next_start);
    if (d.w) crew.write(d_w_to, g, piece.all);
    if (!d.f) continue;
    F* const d_f_to = d.f + piece.from * C;
    const int values = static_cast<int>(piece.all * C);
    if (few && on_chip(f_room, d_f_to) == f) {
      crew.write(d_f_to, f, values);
    } else if (few || !d_out.features) {
#pragma unroll 1
      for (int i = crew.rank; i < values; i += crew.kSize) d_f_to[i] = narrow<F>(f ? f[i] : A(0));
    }
  }
}

}  // namespace rayfuse
