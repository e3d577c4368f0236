// The bins of an envelope in which the edges of a ray lie, the weight between them, and the way
// back: what outer_bound and the interlevel losses share. Bins -1 and E are what lies outside, and
// weigh nothing. Derivation: docs/interlevel.md.
#pragma once

#include "rays.h"
#include "sorted.h"

namespace rayfuse {

// The choices of `outside`, in their order.
enum : int64_t { kOutsideClamp, kOutsideZero, kOutsideBelowZero };

// A vector of n doubles.
template <int n>
struct doubles_of {
  typedef double type __attribute__((vector_size(8 * n)));
};
template <int n>
using doubles = typename doubles_of<n>::type;

// A ray's edges and those of its envelope.
template <class T>
struct Edges {
  using A = accumulator<T>;

  std::vector<A> t;
  Sorted<A> inner;
  A first, last;
  bool sorted, env_sorted;

  Edges(int64_t S, int64_t E)
      : t(S + 1 + Sorted<A>::kPadding), inner(std::max<int64_t>(E - 1, 0)) {}

  void read(const T* t_row, int64_t S, const T* t_env, int64_t E) {
    sorted = copy_sorted(t_row, S + 1, t.data());
    env_sorted = copy_sorted(t_env, E + 1, inner.values() - 1);
    first = inner.values()[-1], last = inner.values()[std::max<int64_t>(E - 1, 0)];
    inner.finish();
  }
};

// The envelopes of a group of rays.
template <class T, bool clamp>
class Envelope {
 public:
  using A = accumulator<T>;
  static constexpr int kGroup = 2 * kRays<A>;

  Envelope(int64_t S, int64_t E, int64_t outside)
      : S_(S),
        E_(E),
        outside_(outside),
        until_(E + kLanes<A> + 3),
        edges_(kGroup, Edges<T>(S, E)),
        nodes_(S + 1 + Sorted<A>::kPadding),
        bins_(S + 2 + kLanes<A>),
        w_outer_(S + 1),
        sums_(S + 1 + kLanes<A>),
        last_rows_(E + kTooFar) {
    bins_[0] = -2;
  }

  // Reads the edges of so many rays. What one ray's search reads has been written long before.
  void read_edges(const T* t, const T* t_env, int rays) {
    for (int i = 0; i < rays; ++i) {
      edges_[i].read(t + i * (S_ + 1), S_, t_env + i * (E_ + 1), E_);
    }
  }
  // Sums their weights.
  void add_up(const T* w_env, int rays) {
    const int in_first = std::min(rays, kRays<A>);
    const Rays<const T> halves[] = {
        {w_env, E_, in_first},
        {w_env + (rays - in_first ? kRays<A> * E_ : 0), E_, std::max(rays - in_first, 1)}};
    HalfSums sums[2] = {};
    for (int64_t k = 0; k < E_; k += kLanes<A>) {
      const Block<A> weights[] = {halves[0].load_at(k, E_ - k), halves[1].load_at(k, E_ - k)};
      [&]<int... s>(std::integer_sequence<int, s...>) {
        (..., add_sample<s>(weights, sums, until_[k + s + 2]));
      }(std::make_integer_sequence<int, kLanes<A>>());
    }
    for (int h = 0; h < 2; ++h) until_[E_ + 2].half[h] = until_[E_ + 3].half[h] = sums[h];
  }

  // Finds the bins of the edges of one of these rays, and the bounds of its samples.
  void locate(int ray, const T* t, const T* t_env) {
    const Edges<T>& edges = edges_[ray];
    sorted_ = edges.sorted && edges.env_sorted;
    if (!sorted_) return locate_by_bisection(ray, t, t_env);
    const A *const t_here = edges.t.data(), first = edges.first, last = edges.last;
    const int64_t S = S_;
    const bool is_zero = outside_ == kOutsideZero;
    lane_int<A>*const nodes = nodes_.data(), *const bins = bins_.data() + 1;
    edges.inner.count_in_nodes(t_here, S_ + 1, nodes);
    A* const w_outer = w_outer_.data() + 1;
    const double* const until = sums_until(ray);
    double before = 0;
#pragma GCC unroll 4
    for (int64_t i = 0; i < S + 1; ++i) {
      int64_t bin = edges.inner.count(nodes[i], t_here[i]);
      if (!clamp) bin += (is_zero && !(last > t_here[i])) - (first > t_here[i]);
      bins[i] = bin;
      const double* const here = until + bin * kGroup;
      w_outer[i - 1] = static_cast<A>(here[kGroup] - before);
      before = here[0];
    }
  }
  const A* w_outer() const { return w_outer_.data() + 1; }

  // The gradient to w_env of the ray that was located last, ray r of those up to `end` that a
  // thread stores in this order.
  template <class G>
  void store_gradient_of(int64_t r, int64_t end,
                         const A* d_outer,  // [-1 .. S + kLanes], 0 where there is no sample
                         G* d_w_env) {      // [R, E]
    G* const row = d_w_env + r * E_;
    if ((end - 1 - r) * E_ >= kTooFar) return store_gradient(d_outer, row);
    store_gradient(d_outer, last_rows_.data());
    for (int64_t k = 0; k < E_; ++k) row[k] = narrow<G>(last_rows_[k]);
  }

 private:
  static constexpr int kTooFar = kLanes<A> + 1;

  using HalfSums = doubles<kRays<A>>;
  struct alignas(2 * sizeof(HalfSums)) Sums {
    HalfSums half[2];
  };

  template <int s>
  static void add_sample(const Block<A> (&weights)[2], HalfSums (&sums)[2], Sums& until) {
    for (int h = 0; h < 2; ++h) {
      const auto x = lane128<s / kRays<A>>(weights[h].column[s % kRays<A>]);
      sums[h] += __builtin_convertvector(x, HalfSums);
      until.half[h] = sums[h];
    }
  }

  // A bin bounds the samples on either side of every edge in it, or else the one that spans it: no
  // more are added up. Up to kTooFar values behind the row are written.
  template <class G>
  void store_gradient(const A* d_outer,  // [-1 .. S + kLanes], 0 where there is no sample
                      G* d_w_env) {      // [E]
    if (!sorted_) return store_gradient_of_differences(d_outer, d_w_env);
    add_up_bins(d_outer);
    const int64_t S = S_, E = E_;
    const lane_int<A>* const bins = bins_.data() + 1;
    const A* const sums = sums_.data();
    int64_t k = 0, next = bins[0];
    // what is written too far is overwritten
    const auto fill = [&](A x) {
      do {
        store(d_w_env + k, broadcast(x));
        k += kLanes<A>;
      } while (k < next);
    };
    fill(A(0));
    for (int64_t i = 0; i <= S; ++i) {
      k = next;
      next = i < S ? bins[i + 1] : E;
      if (clamp || (k >= 0 && k < E)) d_w_env[k] = narrow<G>(sums[i]);
      ++k;
      fill(d_outer[i]);
    }
  }

  // Of a ray of the group, the weight before each bin.
  const double* sums_until(int ray) const {
    return reinterpret_cast<const double*>(&until_[1]) + ray;
  }

  // For each edge, the sum over the samples on either side of the edges of its bin so far.
  void add_up_bins(const A* d_outer) {
    double carry = 0;
    for (int64_t i = 0; i <= S_; i += kLanes<A>) {
      auto same = load_ints(&bins_[i + 1]) == load_ints(&bins_[i]);
      vec<A> sum = load(d_outer + i) + mask(load(d_outer + i - 1), ~same);
      add_up_lanes<1>(sum, same);
      const double last = sum[kLanes<A> - 1];
      store(&sums_[i], sum + mask(broadcast(static_cast<A>(carry)), same));
      carry = same[kLanes<A> - 1] ? carry + last : last;
    }
  }
  template <int places, class M>
  static void add_up_lanes(vec<A>& sum, M& same) {
    if constexpr (places < kLanes<A>) {
      sum += mask(shift_up<places>(sum), same);
      same &= window<kLanes<A> - places>(~M{}, same);
      add_up_lanes<2 * places>(sum, same);
    }
  }
  template <class M>
  static vec<A> mask(vec<A> x, M m) {
    return (vec<A>)((M)x & m);
  }

  __attribute__((noinline)) void locate_by_bisection(int ray, const T* t, const T* t_env) {
    lane_int<A>* const bins = bins_.data() + 1;
    for (int64_t i = 0; i <= S_; ++i) {
      const int64_t up_to = count_by_bisection(t_env, E_ + 1, widen(t[i]));
      const int64_t last = outside_ == kOutsideZero ? E_ + 1 : E_;
      bins[i] = std::max(std::min(up_to, last), int64_t{clamp}) - 1;
    }
    const double* const until = sums_until(ray);
    for (int64_t i = 0; i < S_; ++i) {
      w_outer_[i + 1] = static_cast<A>(until[(bins[i + 1] + 1) * kGroup] - until[bins[i] * kGroup]);
    }
  }
  template <class G>
  __attribute__((noinline)) void store_gradient_of_differences(const A* d_outer, G* d_w_env) {
    const lane_int<A>* const bins = bins_.data() + 1;
    std::vector<double> steps(E_ + 3);
    for (int64_t i = 0; i < S_; ++i) {
      steps[bins[i] + 1] += d_outer[i];
      steps[bins[i + 1] + 2] -= d_outer[i];
    }
    double sum = steps[0];
    for (int64_t k = 0; k < E_; ++k) d_w_env[k] = narrow<G>(static_cast<A>(sum += steps[k + 1]));
  }

  int64_t S_, E_, outside_;
  bool sorted_ = true;
  std::vector<Sums> until_;
  std::vector<Edges<T>> edges_;
  std::vector<lane_int<A>> nodes_, bins_;  // bins from -1
  std::vector<A> w_outer_, sums_;          // w_outer from -1
  std::vector<A> last_rows_;
};

}  // namespace rayfuse
