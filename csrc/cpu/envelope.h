// The bins of an envelope in which the edges of a ray lie, the weight between them, and the way
// back: what outer_bound and interlevel_loss share. Bins are counted from 1: bin 0 and bin E + 1 are
// what lies outside, and weigh nothing. Derivation: docs/interlevel.md.
#pragma once

#include <limits>
#include <vector>

#include "rays.h"

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

// Copies n values, infinity for what is not a number; whether the values, as they were, are sorted.
template <class T>
bool copy_edges(const T* from, int64_t n, accumulator<T>* to) {
  using A = accumulator<T>;
  constexpr int N = kLanes<A>;
  const vec<A> infinity = vec<A>{} + std::numeric_limits<A>::infinity();
  uint32_t falls = 0;
  int64_t k = 0;
  for (; k + N < n; k += N) {
    const vec<A> x = load(from + k);
    falls |= lanes_above(x, load(from + k + 1));
    store(to + k, x == x ? x : infinity);
  }
  const vec<A> x = load(from + k, n - k);
  falls |= lanes_above(x, k + 1 < n ? window<1>(x, x) : x) & ((1u << (n - k)) - 1) >> 1;
  falls |= lanes_above(x, x);
  store(to + k, x == x ? x : infinity, n - k);
  return !falls;
}

// Sorted values, searched without a branch: 16 of them are compared at once. Level 0 has all, level
// l + 1 the last one of every full node of level l.
template <class A>
class Tree {
 public:
  static constexpr int kNode = 16;

  explicit Tree(int64_t n) : n_(n) {
    int64_t begin = 1;
    for (; n > kNode; n /= kNode) {
      levels_.push_back(begin);
      begin += n / kNode + 1;
    }
    levels_.push_back(begin);
    nodes_.resize(begin + n / kNode + 1);
  }

  // Where the n values are written, from -1 to n.
  A* values() { return nodes_[1].value; }

  void grow() {
    int64_t n = n_;
    for (size_t l = 0;; ++l) {
      A* const level = nodes_[levels_[l]].value;
      const int64_t full = n / kNode;
      std::fill(level + n, level + (full + 1) * kNode, std::numeric_limits<A>::quiet_NaN());
      if (l + 1 == levels_.size()) return;
      A* const next = nodes_[levels_[l + 1]].value;
      for (int64_t i = 0; i < full; ++i) next[i] = level[i * kNode + kNode - 1];
      n = full;
    }
  }

  // How many values are not above x, which is a number.
  int64_t count(A x) const {
    int64_t i = 0;
    for (size_t l = levels_.size(); l-- > 0;) {
      const A* node = nodes_[levels_[l] + i].value;
      uint32_t above = 1u << kNode;
      for (int j = 0; j < kNode; j += kLanes<A>) {
        above |= lanes_above(load(node + j), vec<A>{} + x) << j;
      }
      i = i * kNode + __builtin_ctz(above);
    }
    return i;
  }

 private:
  struct alignas(64) Node {
    A value[kNode];
  };

  int64_t n_;
  std::vector<Node> nodes_;
  std::vector<int64_t> levels_;
};

// The envelopes of a group of rays, whose sums are taken together, and of these one ray at a time.
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
        tree_(std::max<int64_t>(E - 1, 0)),
        edges_(S + 1),
        bins_(S + 1),
        w_outer_(S),
        d_bins_(E + 2 * kLanes<A> + 2) {}

  // Sums the weights of so many rays.
  void add_up(const T* w_env, int rays) {
    const int in_first = std::min(rays, kRays<A>);
    const Rays<const T> halves[] = {{w_env, E_, in_first},
                                    {w_env + (rays - in_first ? kRays<A> * E_ : 0), E_,
                                     std::max(rays - in_first, 1)}};
    HalfSums sums[2] = {};
    for (int64_t k = 0; k < E_; k += kLanes<A>) {
      const Block<A> weights[] = {halves[0].load_at(k, E_ - k), halves[1].load_at(k, E_ - k)};
      [&]<int... s>(std::integer_sequence<int, s...>) {
        (..., add_sample<s>(weights, sums, until_[k + s + 2]));
      }(std::make_integer_sequence<int, kLanes<A>>());
    }
    for (int h = 0; h < 2; ++h) until_[E_ + 2].half[h] = until_[E_ + 3].half[h] = sums[h];
  }

  // Finds the bins of the edges of a ray of the group, and the bounds of its samples.
  void locate(int ray, const T* t, const T* t_env) {
    sorted_ = copy_edges(t, S_ + 1, edges_.data());
    A* const inner = tree_.values();
    const bool env_sorted = copy_edges(t_env, E_ + 1, inner - 1);
    const A first = inner[-1], last = inner[std::max<int64_t>(E_ - 1, 0)];
    if (!env_sorted) return locate_by_bisection(ray, t, t_env);
    tree_.grow();
    double before = 0;
    for (int64_t i = 0; i <= S_; ++i) {
      const A x = edges_[i];
      int64_t bin = 1 + tree_.count(x);
      if (!clamp) bin += (outside_ == kOutsideZero && !(last > x)) - (first > x);
      bins_[i] = bin;
      if (i > 0) w_outer_[i - 1] = static_cast<A>(sum_until(bin + 1, ray) - before);
      before = sum_until(bin, ray);
    }
  }
  const A* w_outer() const { return w_outer_.data(); }

  // The gradient to w_env of the ray that was located last. A bin bounds the samples on either side
  // of every edge in it, or else the one that spans it: no more are added up.
  void store_gradient(const A* d_outer,  // [S]
                      T* d_w_env) {      // [E]
    if (!sorted_) return store_gradient_of_differences(d_outer, d_w_env);
    A* const d_bins = d_bins_.data();
    std::fill(d_bins, d_bins + bins_[0], A(0));
    double here = 0;
    A d_before = 0;
    for (int64_t i = 0, bin_before = -1; i <= S_; ++i) {
      const int64_t bin = bins_[i], next = i < S_ ? bins_[i + 1] : E_ + 1;
      const A d_behind = i < S_ ? d_outer[i] : A(0);
      here = (bin == bin_before ? here : d_before) + d_behind;
      d_bins[bin] = static_cast<A>(here);
      // what is written too far is overwritten
      int64_t k = bin + 1;
      do {
        store(d_bins + k, vec<A>{} + d_behind);
        k += kLanes<A>;
      } while (k < next);
      bin_before = bin;
      d_before = d_behind;
    }
    int64_t k = 0;
    for (; k + kLanes<A> <= E_; k += kLanes<A>) store(d_w_env + k, load(d_bins + 1 + k));
    store(d_w_env + k, load(d_bins + 1 + k, E_ - k), E_ - k);
  }

 private:
  using HalfSums = doubles<kRays<A>>;
  struct alignas(64) Sums {
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
  // The weight before a bin.
  double sum_until(int64_t bin, int ray) const {
    return reinterpret_cast<const double*>(&until_[bin])[ray];
  }

  // What torch.searchsorted does, also where its result depends on the way.
  __attribute__((noinline)) void locate_by_bisection(int ray, const T* t, const T* t_env) {
    sorted_ = false;
    for (int64_t i = 0; i <= S_; ++i) {
      int64_t begin = 0, end = E_ + 1;
      while (begin < end) {
        const int64_t middle = begin + (end - begin) / 2;
        if (widen(t_env[middle]) > widen(t[i])) {
          end = middle;
        } else {
          begin = middle + 1;
        }
      }
      const int64_t last = outside_ == kOutsideZero ? E_ + 1 : E_;
      bins_[i] = std::max(std::min(begin, last), int64_t{clamp});
    }
    for (int64_t i = 0; i < S_; ++i) {
      w_outer_[i] = static_cast<A>(sum_until(bins_[i + 1] + 1, ray) - sum_until(bins_[i], ray));
    }
  }
  __attribute__((noinline)) void store_gradient_of_differences(const A* d_outer, T* d_w_env) {
    std::vector<double> steps(E_ + 3);
    for (int64_t i = 0; i < S_; ++i) {
      steps[bins_[i]] += d_outer[i];
      steps[bins_[i + 1] + 1] -= d_outer[i];
    }
    double sum = steps[0];
    for (int64_t k = 0; k < E_; ++k) d_w_env[k] = narrow<T>(static_cast<A>(sum += steps[k + 1]));
  }

  int64_t S_, E_, outside_;
  bool sorted_ = true;
  std::vector<Sums> until_;
  Tree<A> tree_;
  std::vector<A> edges_;
  std::vector<int64_t> bins_;
  std::vector<A> w_outer_, d_bins_;
};

}  // namespace rayfuse
