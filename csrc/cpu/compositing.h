// What composite_rays shares with its packed form: the features of one ray, of which 1, 3 or 4
// interleaved channels are taken apart in registers, and how its depth depends on its samples.
#pragma once

#include <algorithm>
#include <limits>

#include "explog.h"
#include "rays.h"

namespace rayfuse {

enum class Depth : int64_t { kExpected, kLogMean, kMedian, kNone };

// So many samples add up in one level: a million lose no more to rounding than a few hundred do.
constexpr int64_t kPiece = 512;

template <class A>
constexpr A kExpectedEps = A(1e-10);
template <class A>
constexpr A kLogMeanEps = std::numeric_limits<float>::epsilon();

// ---- rows

// The first n values at p, any number of which may exist.
template <class T>
vec<accumulator<T>> load_some(const T* p, int64_t n) {
  if (n >= kLanes<accumulator<T>>) return load(p);
  return load(p, std::max<int64_t>(n, 0));
}
template <class T>
void store_some(T* p, vec<accumulator<T>> x, int64_t n) {
  if (n >= kLanes<accumulator<T>>) return store(p, x);
  if (n > 0) store(p, x, n);
}

// f(k) for the registers of a row.
template <class A, class F>
void along(int64_t begin, int64_t end, const F& f) {
  for (int64_t k = begin; k < end; k += kLanes<A>) f(k);
}

// ---- C interleaved channels of kLanes samples, in C registers

// Registers v and v + 1, ... of n, laid end to end, from value `from` on; zeros follow.
template <int from, class V, int n>
V window_of(const V (&x)[n]) {
  constexpr int v = from / kLanesOf<V>, lane = from % kLanesOf<V>;
  const V low = v < n ? x[v < n ? v : 0] : V{};
  if constexpr (lane == 0) return low;
  const V high = v + 1 < n ? x[v + 1 < n ? v + 1 : 0] : V{};
  return window<lane>(low, high);
}

// Register v of a value for each sample, repeated for its channels.
template <int C, int v, class V>
V repeat_each(V x) {
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(x, x, ((v * kLanesOf<V> + i) / C)...);
  }(std::make_integer_sequence<int, kLanesOf<V>>());
}

// Channel c of each sample.
template <int c, int v = 1, class V, int C>
V channel_of(const V (&x)[C], V found) {
  constexpr int n = kLanesOf<V>;
  if constexpr (v >= C) {
    return found;
  } else {
    return channel_of<c, v + 1>(x, [&]<int... i>(std::integer_sequence<int, i...>) {
      return __builtin_shufflevector(found, x[v],
                                     ((i * C + c) / n == v        ? n + (i * C + c) % n
                                      : v == 1 && (i * C + c) < n ? i * C + c
                                                                  : i)...);
    }(std::make_integer_sequence<int, n>()));
  }
}

// The sum over the channels of each sample.
template <class V, int C>
V sum_channels(const V (&x)[C]) {
  return [&]<int... c>(std::integer_sequence<int, c...>) {
    return (... + channel_of<c>(x, x[0]));
  }(std::make_integer_sequence<int, C>());
}

// The sums over the samples, of channel c in lane c, counted over the registers.
template <int samples, class V, int C>
void sum_samples_of(V (&x)[C]) {
  if constexpr (samples > 1) {
    [&]<int... v>(std::integer_sequence<int, v...>) {
      const V high[] = {window_of<samples / 2 * C + v * kLanesOf<V>>(x)...};
      (..., (x[v] += high[v]));
    }(std::make_integer_sequence<int, C>());
    sum_samples_of<samples / 2>(x);
  }
}

// f(v) for the registers of C channels, unrolled.
template <int C, class F>
void each_register(const F& f) {
  [&]<int... v>(std::integer_sequence<int, v...>) {
    (..., f(std::integral_constant<int, v>()));
  }(std::make_integer_sequence<int, C>());
}

// Lane i of the result is the sum of the lanes of x[i].
template <class V, int n>
V sum_each(V (&x)[n]) {
  if constexpr (n == 1) {
    return x[0];
  } else {
    constexpr int lanes = kLanesOf<V>, half = n / 2;
    V halves[half];
    const auto pair = [&]<int offset, int... i>(V a, V b, std::integer_sequence<int, i...>) {
      return __builtin_shufflevector(
          a, b, (i / n * n + offset * half + i % half + (i / half % 2) * lanes)...);
    };
    constexpr auto lane = std::make_integer_sequence<int, lanes>();
    for (int i = 0; i < half; ++i) {
      const V a = x[i], b = x[i + half];
      halves[i] = pair.template operator()<0>(a, b, lane) + pair.template operator()<1>(a, b, lane);
    }
    return sum_each(halves);
  }
}

// ---- the features of one ray

// Adds a piece; what that rounds off is added with the next one. An infinite sum stays one.
template <class V>
void add_piece(V piece, V& sum, V& lost) {
  const V term = piece - lost, next = sum + term, off = (next - sum) - term;
  lost = off == off ? off : V{};
  sum = next;
}

// sums_c = sum_i w_i f_ic
template <int C, class F>
void add_few(const accumulator<F>* w, const F* f, int64_t S, accumulator<F>* sums) {
  using A = accumulator<F>;
  constexpr int N = kLanes<A>;
  std::fill(sums, sums + C, A(0));
  A lost[C] = {};
  for (int64_t begin = 0; begin < S; begin += kPiece) {
    vec<A> piece[C] = {};
    along<A>(begin, std::min(begin + kPiece, S), [&](int64_t k) {
      const vec<A> w_here = load_some(w + k, S - k);
      each_register<C>([&](auto v) {
        const int64_t at = k * C + v * N;
        const vec<A> f_here = load_some(f + at, S * C - at);
        piece[v] = multiply_add(repeat_each<C, v>(w_here), f_here, piece[v]);
      });
    });
    sum_samples_of<N>(piece);
    for (int c = 0; c < C; ++c) add_piece<A>(piece[c / N][c % N], sums[c], lost[c]);
  }
}
template <class F>
void add_many(const accumulator<F>* w, const F* f, int64_t S, int64_t C, accumulator<F>* sums) {
  using A = accumulator<F>;
  constexpr int kAtOnce = 4;
  along<A>(0, C, [&](int64_t c) {
    vec<A> total = {}, lost = {};
    for (int64_t begin = 0; begin < S; begin += kPiece) {
      const int64_t end = std::min(begin + kPiece, S);
      vec<A> piece[kAtOnce] = {};
      int64_t i = begin;
      for (; i + kAtOnce <= end; i += kAtOnce) {
        for (int j = 0; j < kAtOnce; ++j) {
          piece[j] += w[i + j] * load_some(f + (i + j) * C + c, C - c);
        }
      }
      for (; i < end; ++i) piece[0] += w[i] * load_some(f + i * C + c, C - c);
      add_piece((piece[0] + piece[1]) + (piece[2] + piece[3]), total, lost);
    }
    store_some(sums + c, total, C - c);
  });
}

// products_i = sum_c d_features_c f_ic for S samples and the rest of a register; d_f_ic = w_i
// d_features_c unless d_f is null, past the cache where it has whole, aligned registers alone.
template <int C, class F>
void gradients_few(const accumulator<F>* w, const F* f, int64_t S, const accumulator<F>* d_features,
                   accumulator<F>* products, F* d_f, bool past_cache) {
  using A = accumulator<F>;
  constexpr int N = kLanes<A>;
  vec<A> scale[C];
  each_register<C>([&](auto v) {
    [&]<int... i>(std::integer_sequence<int, i...>) {
      if constexpr (C <= N) {
        const vec<A> once = load_some(d_features, C);
        scale[v] = __builtin_shufflevector(once, once, ((v * N + i) % C)...);
      } else {
        scale[v] = vec<A>{d_features[(v * N + i) % C]...};
      }
    }(std::make_integer_sequence<int, N>());
  });
  along<A>(0, S, [&](int64_t k) {
    vec<A> product[C];
    each_register<C>([&](auto v) {
      const int64_t at = k * C + v * N;
      product[v] = scale[v] * load_some(f + at, S * C - at);
    });
    store(products + k, sum_channels(product));
    if (!d_f) return;
    const vec<A> w_here = load_some(w + k, S - k);
    each_register<C>([&](auto v) {
      const int64_t at = k * C + v * N;
      const vec<A> x = repeat_each<C, v>(w_here) * scale[v];
      past_cache ? stream(d_f + at, x) : store_some(d_f + at, x, S * C - at);
    });
  });
}
template <class F>
void gradients_many(const accumulator<F>* w, const F* f, int64_t S, int64_t C,
                    const accumulator<F>* d_features, accumulator<F>* products, F* d_f) {
  using A = accumulator<F>;
  constexpr int N = kLanes<A>;
  along<A>(0, S, [&](int64_t k) {
    vec<A> rows[N] = {};
    const int count = std::min<int64_t>(N, S - k);
    along<A>(0, C, [&](int64_t c) {
      const vec<A> scale = load_some(d_features + c, C - c);
      for (int i = 0; i < count; ++i) {
        const int64_t at = (k + i) * C + c;
        rows[i] += scale * load_some(f + at, C - c);
        if (d_f) store_some(d_f + at, w[k + i] * scale, C - c);
      }
    });
    store(products + k, sum_each(rows));
  });
}

template <class F>
void add_features(const accumulator<F>* w, const F* f, int64_t S, int64_t C, accumulator<F>* sums) {
  if (C == 3) {
    add_few<3>(w, f, S, sums);
  } else if (C == 1) {
    add_few<1>(w, f, S, sums);
  } else if (C == 4) {
    add_few<4>(w, f, S, sums);
  } else {
    add_many(w, f, S, C, sums);
  }
}
template <class F>
void feature_gradients(const accumulator<F>* w, const F* f, int64_t S, int64_t C,
                       const accumulator<F>* d_features, accumulator<F>* products, F* d_f,
                       bool past_cache = false) {
  if (C == 3) {
    gradients_few<3>(w, f, S, d_features, products, d_f, past_cache);
  } else if (C == 1) {
    gradients_few<1>(w, f, S, d_features, products, d_f, past_cache);
  } else if (C == 4) {
    gradients_few<4>(w, f, S, d_features, products, d_f, past_cache);
  } else {
    gradients_many(w, f, S, C, d_features, products, d_f);
  }
}

// What stands behind the samples of one ray: nothing, a background, or the last of the samples.
template <class T, class F>
const accumulator<T>* behind_samples(const T* background, const F* last_f, int64_t C,
                                     accumulator<T>* behind) {
  if (!last_f && !background) return nullptr;
  for (int64_t c = 0; c < C; ++c) behind[c] = last_f ? widen(last_f[c]) : widen(background[c]);
  return behind;
}

// Not inlined, so that products and sums are fused alike whatever the type of f.
template <class A>
__attribute__((noinline)) void blend(A light, const A* behind, int64_t C, A* features) {
  for (int64_t c = 0; c < C; ++c) features[c] += light * behind[c];
}
template <class A>
__attribute__((noinline)) A dot(const A* x, const A* y, int64_t C) {
  A sum = 0;
  for (int64_t c = 0; c < C; ++c) sum += x[c] * y[c];
  return sum;
}

// ---- depths

inline bool is_mean(Depth depth) { return depth == Depth::kExpected || depth == Depth::kLogMean; }

// What the mean depth is the mean of, at midpoints s.
template <class A>
vec<A> place(Depth depth, vec<A> s) {
  if (depth == Depth::kExpected) return s;
  constexpr A kTiny = std::numeric_limits<A>::min();
  return log_of<A>(s < kTiny ? kTiny - vec<A>{} : s);
}
// The gradients of midpoints s from those of their places.
template <class A>
vec<A> d_midpoint(Depth depth, vec<A> s, vec<A> d_place) {
  if (depth == Depth::kExpected) return d_place;
  return s < std::numeric_limits<A>::min() ? vec<A>{} : d_place / s;
}

// A value for each of a few rays: of ray r in lane r.
template <class A>
struct RayValues {
  vec<A> accumulation = {}, moment = {};  // sum_i w_i, sum_i w_i place_i
};

// Where the mean depths of these rays lie, and how they depend on the weights.
template <class A>
struct RayDepths {
  vec<A> value = {}, weight = {}, mean = {};
  bool thin[kRays<A>] = {};

  RayDepths(Depth depth, const RayValues<A>& sums) {
    if (!is_mean(depth)) return;
    const vec<A> total = sums.accumulation;
    if (depth == Depth::kExpected) {
      weight = total + kExpectedEps<A>;
      value = mean = sums.moment / weight;
    } else {
      weight = total < kLogMeanEps<A> ? kLogMeanEps<A> - vec<A>{} : total;
      mean = sums.moment / weight;
      value = exp_of<A>(mean);
      for (int r = 0; r < kRays<A>; ++r) thin[r] = total[r] < kLogMeanEps<A>;
    }
  }
};

// The first sample at which the weights reach a half; summed in double, as torch does.
template <class A>
int64_t median(const A* w, int64_t S) {
  int64_t k = 0;
  for (double sum = w[0]; sum < 0.5 && k < S - 1;) sum += w[++k];
  return k;
}

// Where the gradient of one ray's depth goes: to the weight of sample i scale (place_i - mean), or
// all of it to one midpoint or edge.
template <class A>
struct DepthGradient {
  A common = 0, scale = 0, mean = 0;
  int64_t sample = -1, edge = -1;

  // Of the mean depth of ray r, which has S samples.
  DepthGradient(Depth depth, const RayDepths<A>& depths, int r, std::pair<A, A> bounds, int64_t S,
                A d_depth) {
    const A value = depths.value[r];
    const bool expected = depth == Depth::kExpected;
    if (value < bounds.first) {
      (expected ? sample : edge) = 0;
    } else if (value > bounds.second) {
      (expected ? sample : edge) = expected ? S - 1 : S;
    } else {
      scale = (expected ? d_depth : d_depth * value) / depths.weight[r];
      if (!depths.thin[r]) mean = depths.mean[r];
    }
  }
  // Of the median, which is the midpoint of a sample.
  explicit DepthGradient(int64_t median) : sample(median) {}
  DepthGradient() = default;
};

}  // namespace rayfuse
