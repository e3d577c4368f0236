// A search among the values of a ray that do not decrease, for many numbers at once.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "simd.h"

namespace rayfuse {

// An integer as wide as a lane.
template <class A>
using lane_int = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
template <class I>
vec<I> load_ints(const I* p) {
  vec<I> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class I>
void store_ints(I* p, vec<I> x) {
  std::memcpy(p, &x, sizeof x);
}

// Copies n values; whether none of them decreases.
template <class T>
bool copy_sorted(const T* from, int64_t n, accumulator<T>* to) {
  constexpr int N = kLanes<accumulator<T>>;
  uint32_t rises = kAllLanes<accumulator<T>>;
  const auto copy = [&](int64_t k) {
    const auto x = load(from + k);
    rises &= lanes_up_to(x, load(from + k + 1));
    store(to + k, x);
  };
  int64_t k = n > N ? n - 1 : 0;
  for (int64_t i = 0; i + N < k; i += N) copy(i);
  if (n > N) copy(n - 1 - N);
  for (; k < n; ++k) {
    to[k] = widen(from[k]);
    if (!(to[k] <= widen(from[std::min(k + 1, n - 1)]))) rises = 0;
  }
  return rises == kAllLanes<accumulator<T>>;
}

// Sorted values to be searched: 16 of them are compared at once, after the last ones of all 16.
template <class A>
class Sorted {
 public:
  static constexpr int kNode = 16, kAtOnce = 4, kPadding = kAtOnce * kLanes<A>;

  explicit Sorted(int64_t n) { resize(n); }

  void resize(int64_t n) {
    n_ = n;
    const size_t nodes = n / kNode + 3;
    if (nodes_.size() < nodes) nodes_.resize(nodes);
  }

  // Where the n values are written, with two more at -1 and n.
  A* values() { return reinterpret_cast<A*>(nodes_.data()) + kNode; }
  // They have been.
  void finish() {
    const vec<A> none = broadcast(std::numeric_limits<A>::quiet_NaN());
    for (int j = 0; j < kNode; j += kLanes<A>) store(values() + n_ + j, none);
  }
  // For each of n numbers, how many values are in nodes wholly up to it. Reads and writes kPadding
  // more.
  void count_in_nodes(const A* x, int64_t n, lane_int<A>* count) const {
    const Node *const begin = nodes_.data() + 1, *const end = begin + n_ / kNode;
    if (end - begin > 4 * kNode) {
      for (int64_t i = 0; i < n; ++i) {
        const auto above = [](A x, const Node& node) { return x < node.value[kNode - 1]; };
        count[i] = (std::upper_bound(begin, end, x[i], above) - begin) * kNode;
      }
      return;
    }
    for (int64_t i = 0; i < n; i += kAtOnce * kLanes<A>) {
      vec<A> here[kAtOnce];
      vec<lane_int<A>> counts[kAtOnce] = {};
      for (int j = 0; j < kAtOnce; ++j) here[j] = load(x + i + j * kLanes<A>);
      for (const Node* node = begin; node < end; ++node) {
        const vec<A> last = broadcast(node->value[kNode - 1]);
        for (int j = 0; j < kAtOnce; ++j) {
          counts[j] = last <= here[j] ? counts[j] + kNode : counts[j];
        }
      }
      for (int j = 0; j < kAtOnce; ++j) store_ints(count + i + j * kLanes<A>, counts[j]);
    }
  }
  // How many values are not above x, of which so many are in nodes wholly up to it.
  int64_t count(int64_t in_nodes, A x) const {
    const A* const node = nodes_[1].value + in_nodes;
    uint32_t up_to = 0;
    for (int j = 0; j < kNode; j += kLanes<A>) {
      up_to |= lanes_up_to(load(node + j), broadcast(x)) << j;
    }
    return in_nodes + count_bits(up_to);
  }

 private:
  struct alignas(64) Node {
    A value[kNode];
  };

  int64_t n_;
  std::vector<Node> nodes_;
};

// How many of n values are not above x, as torch.searchsorted finds it, also where its result
// depends on the way.
template <class T>
int64_t count_by_bisection(const T* values, int64_t n, accumulator<T> x) {
  int64_t begin = 0, end = n;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (widen(values[middle]) > x) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

// Finds numbers among the values of one ray after the other.
template <class T>
class Search {
 public:
  using A = accumulator<T>;

  // Where the n numbers are written, and up to a register more.
  A* numbers(int64_t n) {
    const size_t padded = n + Sorted<A>::kPadding;
    if (numbers_.size() < padded) numbers_.resize(padded), nodes_.resize(padded);
    return numbers_.data();
  }
  // Calls f(i, count) for each of them: so many of m values are not above number i; all, if that is
  // NaN.
  template <class F>
  void among(const T* values, int64_t m, int64_t n, const F& f) {
    const A* const x = numbers_.data();
    sorted_.resize(m);
    if (!copy_sorted(values, m, sorted_.values())) {
      for (int64_t i = 0; i < n; ++i) f(i, count_by_bisection(values, m, x[i]));
      return;
    }
    sorted_.finish();
    lane_int<A>* const nodes = nodes_.data();
    sorted_.count_in_nodes(x, n, nodes);
#pragma GCC unroll 4
    for (int64_t i = 0; i < n; ++i) f(i, x[i] == x[i] ? sorted_.count(nodes[i], x[i]) : m);
  }

 private:
  Sorted<A> sorted_{0};
  std::vector<A> numbers_;
  std::vector<lane_int<A>> nodes_;
};

}  // namespace rayfuse
