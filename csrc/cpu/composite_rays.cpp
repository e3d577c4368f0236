// Compositing: features = sum_i w_i f_i + (1 - sum_i w_i) background, depth and accumulation, with
// w given or from densities. One thread owns a few rays; of these only the weights' scans go along
// several rays at once, everything else along one at a time, from rows of weights in cache.
// Forward: one pass over memory. Backward: one, with all heads in the gradient of a weight:
// g_i = d_features . (f_i - background) + d_accumulation + d_depth (s_i - depth) / sum_i w_i,
// d_f_i = w_i d_features; for densities then the way back of ray_weights. docs/compositing.md
#include "transmittance.h"

#include <vector>

namespace rayfuse {
namespace {

enum class Depth : int64_t { kExpected, kLogMean, kMedian, kNone };

// So many samples add up in one level: 2^16 lose no more to rounding than a few hundred do.
constexpr int64_t kPiece = 512;
// Interleaved channels are taken apart in registers up to so many.
constexpr int kFewChannels = 4;

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

template <class A, int places = kLanes<A> / 2>
A sum_lanes(vec<A> x) {
  if constexpr (places > 0) return sum_lanes<A, places / 2>(x + shift_down<places>(x));
  return x[0];
}

// The sum of term(k), k = 0, kLanes, ... < S.
template <class A, class F>
A sum_along(int64_t S, const F& term) {
  A total = 0;
  for (int64_t begin = 0; begin < S; begin += kPiece) {
    vec<A> piece = {};
    along<A>(begin, std::min(begin + kPiece, S), [&](int64_t k) { piece += term(k); });
    total += sum_lanes<A>(piece);
  }
  return total;
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
                                     ((i * C + c) / n == v          ? n + (i * C + c) % n
                                      : v == 1 && (i * C + c) < n   ? i * C + c
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

// sums_c = sum_i w_i f_ic
template <int C, class F>
void add_few(const accumulator<F>* w, const F* f, int64_t S, accumulator<F>* sums) {
  using A = accumulator<F>;
  constexpr int N = kLanes<A>;
  std::fill(sums, sums + C, A(0));
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
    for (int c = 0; c < C; ++c) sums[c] += piece[c / N][c % N];
  }
}
template <class F>
void add_many(const accumulator<F>* w, const F* f, int64_t S, int64_t C, accumulator<F>* sums) {
  using A = accumulator<F>;
  constexpr int kAtOnce = 4;
  along<A>(0, C, [&](int64_t c) {
    vec<A> total = {};
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
      total += (piece[0] + piece[1]) + (piece[2] + piece[3]);
    }
    store_some(sums + c, total, C - c);
  });
}

// products_i = sum_c d_features_c f_ic for S samples and the rest of a register; d_f_ic = w_i
// d_features_c unless d_f is null.
template <int C, class F>
void gradients_few(const accumulator<F>* w, const F* f, int64_t S,
                   const accumulator<F>* d_features, accumulator<F>* products, F* d_f) {
  using A = accumulator<F>;
  constexpr int N = kLanes<A>;
  vec<A> scale[C];
  each_register<C>([&](auto v) {
    [&]<int... i>(std::integer_sequence<int, i...>) {
      scale[v] = vec<A>{d_features[(v * N + i) % C]...};
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
      store_some(d_f + at, repeat_each<C, v>(w_here) * scale[v], S * C - at);
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
__attribute__((noinline)) RAYFUSE_KERNEL void add_features(const accumulator<F>* w, const F* f,
                                                           int64_t S, int64_t C,
                                                           accumulator<F>* sums) {
  if (C == 3) return add_few<3>(w, f, S, sums);
  if (C == 1) return add_few<1>(w, f, S, sums);
  if (C == 4) return add_few<4>(w, f, S, sums);
  add_many(w, f, S, C, sums);
}
template <class F>
__attribute__((noinline)) RAYFUSE_KERNEL void feature_gradients(
    const accumulator<F>* w, const F* f, int64_t S, int64_t C, const accumulator<F>* d_features,
    accumulator<F>* products, F* d_f) {
  if (C == 3) return gradients_few<3>(w, f, S, d_features, products, d_f);
  if (C == 1) return gradients_few<1>(w, f, S, d_features, products, d_f);
  if (C == 4) return gradients_few<4>(w, f, S, d_features, products, d_f);
  gradients_many(w, f, S, C, d_features, products, d_f);
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

// ---- the depth of one ray

template <class T>
struct Midpoints {
  using A = accumulator<T>;
  const T* t;  // [S+1]
  int64_t S;

  vec<A> at(int64_t k) const {
    return A(0.5) * (load_some(t + k, S + 1 - k) + load_some(t + k + 1, S - k));
  }
  A operator[](int64_t k) const { return A(0.5) * (widen(t[k]) + widen(t[k + 1])); }
  // what the logarithmic mean takes a logarithm of
  vec<A> positive_at(int64_t k) const {
    const vec<A> mid = at(k);
    return mid < kTiny ? kTiny - vec<A>{} : mid;
  }
  static constexpr A kTiny = std::numeric_limits<A>::min();
};

// Where the depth of a ray lies, and how it depends on the weights.
template <class T>
struct RayDepth {
  using A = accumulator<T>;

  const Midpoints<T>& mid;
  const A* w;  // [S]
  int64_t S;
  Depth kind;
  A accumulation;
  A mean = 0, value = 0, least = 0, most = 0;
  int64_t median = 0;

  RayDepth(const Midpoints<T>& mid, const A* w, Depth kind, A accumulation)
      : mid(mid), w(w), S(mid.S), kind(kind), accumulation(accumulation) {
    if (S == 0 || kind == Depth::kNone) return;
    if (kind == Depth::kMedian) {
      // in double, as torch sums
      for (double sum = w[0]; sum < 0.5 && median < S - 1;) sum += w[++median];
      value = least = most = mid[median];
      return;
    }
    if (kind == Depth::kExpected) {
      mean = sum_along<A>(S, [&](int64_t k) { return load_some(w + k, S - k) * mid.at(k); }) /
             (accumulation + kExpectedEps<A>);
      value = mean, least = mid[0], most = mid[S - 1];
    } else {
      mean = sum_along<A>(S, [&](int64_t k) {
        return load_some(w + k, S - k) * log_of<A>(mid.positive_at(k));
      });
      mean /= accumulation < kLogMeanEps<A> ? kLogMeanEps<A> : accumulation;
      value = exp_of<A>(mean - vec<A>{})[0], least = widen(mid.t[0]), most = widen(mid.t[S]);
    }
  }

  A clipped() const { return value < least ? least : value > most ? most : value; }

  // Adds d_depth to the gradients of weights, and writes those of midpoints unless d_mid is null.
  void gradients(A d_depth, A* g, A* d_mid, A& d_t_first, A& d_t_last) const {
    if (S == 0 || kind == Depth::kNone) return;
    if (kind == Depth::kMedian) {
      if (d_mid) d_mid[median] += d_depth;
      return;
    }
    const bool expected = kind == Depth::kExpected;
    if (value < least || value > most) {
      const bool first = value < least;
      if (!expected) {
        (first ? d_t_first : d_t_last) += d_depth;
      } else if (d_mid) {
        d_mid[first ? 0 : S - 1] += d_depth;
      }
      return;
    }
    const bool thin = !expected && accumulation < kLogMeanEps<A>;
    const A weight = expected ? accumulation + kExpectedEps<A>
                     : thin   ? kLogMeanEps<A>
                              : accumulation;
    const A scale = (expected ? d_depth : d_depth * value) / weight, center = thin ? A(0) : mean;
    along<A>(0, S, [&](int64_t k) {
      const vec<A> s = mid.at(k);
      const vec<A> place = expected ? s : log_of<A>(mid.positive_at(k));
      store(g + k, load(g + k) + scale * (place - center));
      if (!d_mid) return;
      const vec<A> d_place = scale * load_some(w + k, S - k);
      const vec<A> d_s = expected ? d_place : s < Midpoints<T>::kTiny ? vec<A>{} : d_place / s;
      store(d_mid + k, load(d_mid + k) + d_s);
    });
  }
};

// ---- weights

// Of S densities along `count` rays, w_rays[r] for each, rounded up to whole registers; what the
// way back needs is kept unless `kept` is null.
template <bool long_rays, class T>
RAYFUSE_KERNEL void weights_of_densities(const Rays<const T>& sigma, const Rays<const T>& t,
                                         int64_t S, const Rays<accumulator<T>>& w_rays,
                                         KeptLight<accumulator<T>>* kept) {
  using A = accumulator<T>;
  LightPass<T, long_rays> pass{sigma, t, S, false};
  along<A>(0, S, [&](int64_t k) {
    pass.step(k);
    w_rays.store_at(k, kLanes<A>, pass.w);
    if (kept) kept[k / kLanes<A>].keep(pass);
  });
}

// Back to densities; d_width takes the place of d_w unless it is not wanted.
template <bool long_rays, class T>
RAYFUSE_KERNEL void gradients_of_densities(const KeptLight<accumulator<T>>* kept, int64_t S,
                                           const Rays<accumulator<T>>& d_w, const Rays<T>& d_sigma,
                                           bool with_d_sigma, bool with_d_width) {
  using A = accumulator<T>;
  constexpr int N = kLanes<A>;
  LightGradients<A, long_rays> way_back;
  for (int64_t i = (S + N - 1) / N - 1; i >= 0; --i) {
    const int64_t k = i * N;
    way_back.step(kept[i], Rays<const A>{d_w.first, d_w.stride, d_w.count}.load_at(k, N), {});
    if (with_d_sigma) d_sigma.store_at(k, S - k, way_back.d_density);
    if (with_d_width) d_w.store_at(k, N, way_back.d_width);
  }
}

// Everything about the call that is not a tensor.
struct Options {
  int64_t S, C;
  Depth depth;
  bool density, last_sample;
};

// The rows that a thread works on: kRays of them, in whole registers.
template <class A>
class Rows {
 public:
  explicit Rows(int64_t S)
      : stride_((S + kLanes<A> - 1) / kLanes<A> * kLanes<A>), values_(kRays<A> * stride_) {}

  A* operator[](int r) { return values_.data() + r * stride_; }
  Rays<A> rays(int count) { return {values_.data(), stride_, count}; }
  void clear() { std::fill(values_.begin(), values_.end(), A(0)); }

 private:
  int64_t stride_;
  std::vector<A> values_;
};

// The weights of ray r, which is number i of a block: given, or widened.
template <class T>
const accumulator<T>* given_weights(const T* w, int64_t S, accumulator<T>* row) {
  using A = accumulator<T>;
  if constexpr (std::is_same_v<T, A>) return w;
  along<A>(0, S, [&](int64_t k) { store(row + k, load_some(w + k, S - k)); });
  return row;
}

// Rays begin..end.
template <bool long_rays, class T, class F>
void composite(int64_t begin, int64_t end, const Options& options,
               const T* t,                     // [R, S+1]
               const T* w,                     // [R, S]
               const F* f,                     // [R, S, C] or null
               const T* background,            // [R, C] or null
               accumulator<T>* features,       // [R, C]
               accumulator<T>* depth,          // [R]
               accumulator<T>* accumulation) { // [R]
  using A = accumulator<T>;
  const auto [S, C, kind, density, last_sample] = options;
  Rows<A> w_rows(S);
  std::vector<A> behind(C);
  for (int64_t first = begin; first < end; first += kRays<A>) {
    const int count = std::min<int64_t>(kRays<A>, end - first);
    if (density) {
      weights_of_densities<long_rays, T>({w + first * S, S, count},
                                         {t + first * (S + 1), S + 1, count}, S, w_rows.rays(count),
                                         nullptr);
    }
    for (int i = 0; i < count; ++i) {
      const int64_t r = first + i;
      const A* w_r = density ? w_rows[i] : given_weights(w + r * S, S, w_rows[i]);
      const A total = sum_along<A>(S, [&](int64_t k) { return load_some(w_r + k, S - k); });
      accumulation[r] = total;
      depth[r] = RayDepth<T>({t + r * (S + 1), S}, w_r, kind, total).clipped();
      if (f) {
        add_features(w_r, f + r * S * C, S, C, features + r * C);
      } else {
        std::fill(features + r * C, features + (r + 1) * C, A(0));
      }
      const A* light_from = behind_samples(
          background ? background + r * C : nullptr,
          last_sample && f && S ? f + (r * S + S - 1) * C : nullptr, C, behind.data());
      if (light_from) blend(1 - total, light_from, C, features + r * C);
    }
  }
}

template <class T, class F>
struct Gradients {
  T* t;           // [R, S+1] or null
  T* w;           // [R, S] or null
  F* f;           // [R, S, C] or null
  T* background;  // [R, C] or null
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
  const auto [S, C, kind, density, last_sample] = options;
  constexpr int K = kRays<A>, N = kLanes<A>;
  Rows<A> w_rows(S), g_rows(S), d_mid_rows(d.t ? S : 0);
  std::vector<KeptLight<A>> kept(density ? (S + N - 1) / N : 0);
  const std::vector<A> no_gradient(C);
  std::vector<A> behind(C);
  for (int64_t first = begin; first < end; first += K) {
    const int count = std::min<int64_t>(K, end - first);
    A d_t_first[K] = {}, d_t_last[K] = {};
    if (density) {
      weights_of_densities<long_rays, T>({w + first * S, S, count},
                                         {t + first * (S + 1), S + 1, count}, S, w_rows.rays(count),
                                         kept.data());
    }
    if (d.t) d_mid_rows.clear();
    for (int i = 0; i < count; ++i) {
      const int64_t r = first + i;
      const A* w_r = density ? w_rows[i] : given_weights(w + r * S, S, w_rows[i]);
      const A total = sum_along<A>(S, [&](int64_t k) { return load_some(w_r + k, S - k); });
      const A* d_features_r = d_features ? d_features + r * C : no_gradient.data();
      A* const g = g_rows[i];
      F* const d_f = d.f ? d.f + r * S * C : nullptr;
      const bool last_behind = last_sample && f && S;
      if (f) {
        feature_gradients(w_r, f + r * S * C, S, C, d_features_r, g, d_f);
      } else {
        along<A>(0, S, [&](int64_t k) { store(g + k, vec<A>{}); });
      }
      // what all samples have in common
      const A* light_from =
          behind_samples(background ? background + r * C : nullptr,
                         last_behind ? f + (r * S + S - 1) * C : nullptr, C, behind.data());
      const A common = (d_accumulation ? d_accumulation[r] : A(0)) -
                       (light_from ? dot(d_features_r, light_from, C) : A(0));
      for (int64_t c = 0; c < C; ++c) {
        if (last_behind && d_f) {
          d_f[(S - 1) * C + c] = narrow<F>((w_r[S - 1] + (1 - total)) * d_features_r[c]);
        }
        if (d.background) d.background[r * C + c] = narrow<T>((1 - total) * d_features_r[c]);
      }
      along<A>(0, S, [&](int64_t k) { store(g + k, load(g + k) + common); });
      if (d_depth) {
        const RayDepth<T> depth({t + r * (S + 1), S}, w_r, kind, total);
        depth.gradients(d_depth[r], g, d.t ? d_mid_rows[i] : nullptr, d_t_first[i], d_t_last[i]);
      }
      if (d.w && !density) {
        along<A>(0, S, [&](int64_t k) { store_some(d.w + r * S + k, load(g + k), S - k); });
      }
    }
    if (density && (d.w || d.t)) {
      gradients_of_densities<long_rays, T>(kept.data(), S, g_rows.rays(count),
                                           {d.w + first * S, S, count}, d.w, d.t);
    }
    for (int i = 0; d.t && i < count; ++i) {
      T* const d_t = d.t + (first + i) * (S + 1);
      const A *d_mid = d_mid_rows[i], *d_width = g_rows[i];
      A from_left = d_t_first[i];
      for (int64_t k = 0; k < S; ++k) {
        const A half = A(0.5) * d_mid[k], width = density ? d_width[k] : A(0);
        d_t[k] = narrow<T>(from_left + half - width);
        from_left = half + width;
      }
      d_t[S] = narrow<T>(from_left + d_t_last[i]);
    }
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
    const T *t_ptr = data<T>(t), *w_ptr = data<T>(w), *background_ptr = maybe_data<T>(background);
    const F* f_ptr = maybe_data<F>(f);
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
  const auto gradient = [&](const MaybeTensor& x, int i) {
    return x ? empty_gradient(*x, needs, i) : empty(t, {0}, dtype_of(t));
  };
  Tensor d_t = gradient(t, 0), d_w = gradient(w, 1), d_f = gradient(f, 2);
  Tensor d_background = gradient(background, 3);
  dispatch_pair(t, f, [&](auto type, auto f_type) {
    using T = decltype(type);
    using F = decltype(f_type);
    using A = accumulator<T>;
    const A *d_features_ptr = maybe_data<A>(d_features), *d_depth_ptr = maybe_data<A>(d_depth);
    const A* d_accumulation_ptr = maybe_data<A>(d_accumulation);
    const T *t_ptr = data<T>(t), *w_ptr = data<T>(w), *background_ptr = maybe_data<T>(background);
    const F* f_ptr = maybe_data<F>(f);
    const Gradients<T, F> d{mutable_data<T>(d_t), mutable_data<T>(d_w), mutable_data<F>(d_f),
                            mutable_data<T>(d_background)};
    const int64_t S = options.S;
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
