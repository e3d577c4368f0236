// Scans along rays, several rays at once. A scan inside one register costs log2(lanes) shuffles and
// as many dependent additions for each; so a block takes as many rays as a 128-bit lane has values
// and is transposed lane by lane (2 shuffles a register for float). Most steps of a scan then go
// from one register to the next, and only the lanes' totals are scanned across.
#pragma once

#include <algorithm>

#include "simd.h"

namespace rayfuse {

// Calls f with a flag that templates can take.
template <class F>
void as_constant(bool flag, const F& f) {
  if (flag) {
    f(std::true_type());
  } else {
    f(std::false_type());
  }
}

// Rays in a block: 4 of float, 2 of double.
template <class A>
constexpr int kRays = 16 / sizeof(A);

// kLanes samples of kRays rays. Sample s of ray r is in register s % kRays, in lane
// s / kRays * kRays + r. A block of rows has ray r in register r instead.
template <class A>
struct Block {
  vec<A> column[kRays<A>];

  // register by register: copied as one object it would go through the stack
  void store_to(Block& out) const {
    for (int j = 0; j < kRays<A>; ++j) out.column[j] = column[j];
  }
};

// f(0), f(1), ... as a block, inlined and unrolled.
template <class A, class F>
Block<A> each_column(const F& f) {
  return [&]<int... j>(std::integer_sequence<int, j...>) {
    return Block<A>{{f(j)...}};
  }(std::make_integer_sequence<int, kRays<A>>());
}

template <class A>
Block<A> operator+(const Block<A>& a, const Block<A>& b) {
  return each_column<A>([&](int j) { return a.column[j] + b.column[j]; });
}
template <class A>
Block<A> operator-(const Block<A>& a, const Block<A>& b) {
  return each_column<A>([&](int j) { return a.column[j] - b.column[j]; });
}
template <class A>
Block<A> operator*(const Block<A>& a, const Block<A>& b) {
  return each_column<A>([&](int j) { return a.column[j] * b.column[j]; });
}
template <class A>
Block<A> operator*(A a, const Block<A>& b) {
  return each_column<A>([&](int j) { return a * b.column[j]; });
}

// From rows to columns and back, within each 128-bit lane.
template <class A>
Block<A> transpose(const Block<A>& x) {
  const auto& [column] = x;
  if constexpr (kRays<A> == 2) {
    return {{unpack<1, 0>(column[0], column[1]), unpack<1, 1>(column[0], column[1])}};
  } else {
    const auto low01 = unpack<1, 0>(column[0], column[1]);
    const auto high01 = unpack<1, 1>(column[0], column[1]);
    const auto low23 = unpack<1, 0>(column[2], column[3]);
    const auto high23 = unpack<1, 1>(column[2], column[3]);
    return {{unpack<2, 0>(low01, low23), unpack<2, 1>(low01, low23), unpack<2, 0>(high01, high23),
             unpack<2, 1>(high01, high23)}};
  }
}

// Up to kRays rays of an array. Where there are fewer, the last one stands in for the others: its
// results are computed more than once and stored once.
template <class T>
struct Rays {
  using A = accumulator<std::remove_const_t<T>>;

  T* first;
  int64_t stride;
  int count;

  T* operator[](int r) const { return first + std::min(r, count - 1) * stride; }

  // Samples k.. of all rays, of which n exist; the others are 0.
  Block<A> load_at(int64_t k, int64_t n) const {
    return transpose(each_column<A>(
        [&](int r) { return n < kLanes<A> ? load((*this)[r] + k, n) : load((*this)[r] + k); }));
  }
  void store_at(int64_t k, int64_t n, const Block<A>& x) const {
    const Block<A> rows = transpose(x);
    [&]<int... r>(std::integer_sequence<int, r...>) {
      (..., (r < count && (n < kLanes<A> ? store((*this)[r] + k, rows.column[r], n)
                                         : store((*this)[r] + k, rows.column[r]),
                           true)));
    }(std::make_integer_sequence<int, kRays<A>>());
  }
  // Samples k.. of all rays will be written soon: a store that misses the cache would stall.
  void prefetch_for_store(int64_t k) const {
    for (int r = 0; r < kRays<A>; ++r) __builtin_prefetch((*this)[r] + k, 1);
  }
  // A share of the rays behind these, which will be read next. Of rows that are long the
  // processor's own prefetcher loses track (docs/distortion.md); it follows shorter ones, of which
  // 48 samples would take up to a quarter longer from cache.
  void prefetch_next(int64_t k) const {
    constexpr int64_t kLong = 256 / sizeof(T);
    if (stride < kLong) return;
    const T* const next = first + kRays<A> * (stride + k);
    for (int r = 0; r < kRays<A>; ++r) __builtin_prefetch(next + r * kLanes<A>);
  }
  // Value k of each ray, for all samples of a block.
  vec<A> broadcast_at(int64_t k) const {
    vec<A> x = {};
    for (int r = 0; r < kRays<A>; ++r) x[r] = widen((*this)[r][k]);
    return repeat_lane<0>(x);
  }
};

// Blocks that come in order from the left, one sample late.
template <class A>
class Delay {
 public:
  explicit Delay(vec<A> first) : end_(first) {}

  Block<A> operator()(const Block<A>& x) {
    constexpr int K = kRays<A>;
    const vec<A> first = window<kLanes<A> - K>(end_, x.column[K - 1]);
    end_ = x.column[K - 1];
    return each_column<A>([&](int j) { return j ? x.column[j - 1] : first; });
  }

 private:
  vec<A> end_;
};

// So many blocks add up in one level; longer rays take two, so that 2^20 samples lose no more to
// rounding than a few hundred do. The second level costs a tenth of the time at 48 samples.
constexpr int kBlocksInLevel = 128;

template <class A>
bool is_long(int64_t samples) {
  return samples > kBlocksInLevel * kLanes<A>;
}

template <class A, bool long_rays>
class LevelledSum {
 public:
  // A term for each lane.
  void add(vec<A> x) {
    fold(near_);
    near_ += x;
  }
  // Goes on from `lane`, and as many as there are rays, which held the sums of the last block; x
  // are the sums inside the next one.
  // Returns the sums up to each lane of the last block and of this one, both without far().
  template <int lane, int rays = kRays<A>>
  std::pair<vec<A>, vec<A>> go_on(vec<A> x) {
    fold(repeat<lane, rays>(near_));
    const vec<A> last = near_;
    near_ = x + repeat<lane, rays>(near_);
    return {last, near_};
  }
  vec<A> with_far(vec<A> x) const { return long_rays ? far_ + x : x; }
  vec<A> total() const { return with_far(near_); }

 private:
  void fold(vec<A> near) {
    if (!long_rays || terms_++ < kBlocksInLevel) return;
    // what the sum rounds off is added with the next term
    const vec<A> term = near - lost_, sum = far_ + term;
    const vec<A> lost = (sum - far_) - term;
    // an infinite sum stays one
    lost_ = lost == lost ? lost : vec<A>{};
    far_ = sum;
    near_ = vec<A>{};
    terms_ = 1;
  }

  vec<A> near_ = {}, far_ = {}, lost_ = {};
  int terms_ = 0;
};

// A running sum over blocks that come in order from the left.
template <class A, bool long_rays>
class LeftSum {
 public:
  // Adds a block; returns the sums before each of its samples, and including it.
  std::pair<Block<A>, Block<A>> add(const Block<A>& x) {
    constexpr int K = kRays<A>, kLast = kLanes<A> - K;
    Block<A> inside = x;
    for (int j = 1; j < K; ++j) inside.column[j] += inside.column[j - 1];
    const auto [last, here] = sum_.template go_on<kLast>(inclusive_lanes<K>(inside.column[K - 1]));
    const vec<A> before = sum_.with_far(window<kLast>(last, here));
    return {each_column<A>([&](int j) { return j ? before + inside.column[j - 1] : before; }),
            each_column<A>([&](int j) { return before + inside.column[j]; })};
  }
  // The sum of everything, of ray r.
  A total(int r) const { return sum_.total()[kLanes<A> - kRays<A> + r]; }

 private:
  template <int places>
  static vec<A> inclusive_lanes(vec<A> x) {
    if constexpr (places < kLanes<A>) return inclusive_lanes<2 * places>(x + shift_up<places>(x));
    return x;
  }
  LevelledSum<A, long_rays> sum_;
};

// The same from the right.
template <class A, bool long_rays>
class RightSum {
 public:
  // Adds a block; returns the sums after each of its samples, and including it.
  std::pair<Block<A>, Block<A>> add(const Block<A>& x) {
    constexpr int K = kRays<A>;
    Block<A> inside = x;
    for (int j = K - 2; j >= 0; --j) inside.column[j] += inside.column[j + 1];
    const auto [last, here] = sum_.template go_on<0>(inclusive_lanes<K>(inside.column[0]));
    const vec<A> after = sum_.with_far(window<K>(here, last));
    return {each_column<A>([&](int j) { return j < K - 1 ? after + inside.column[j + 1] : after; }),
            each_column<A>([&](int j) { return after + inside.column[j]; })};
  }

 private:
  template <int places>
  static vec<A> inclusive_lanes(vec<A> x) {
    if constexpr (places < kLanes<A>) return inclusive_lanes<2 * places>(x + shift_down<places>(x));
    return x;
  }
  LevelledSum<A, long_rays> sum_;
};

// The sum of all lanes.
template <class A, int places = kLanes<A> / 2>
A sum_lanes(vec<A> x) {
  if constexpr (places >= kRays<A>) return sum_lanes<A, places / 2>(x + shift_down<places>(x));
  if constexpr (places > 0) return sum_lanes<A, places / 2>(x + shift_inside<-places>(x));
  return x[0];
}
// The sum of all samples: ray r is in lane r.
template <class A, int places = kLanes<A> / 2>
vec<A> sum_samples(vec<A> x) {
  if constexpr (places >= kRays<A>) return sum_samples<A, places / 2>(x + shift_down<places>(x));
  return x;
}
template <class A>
vec<A> sum_columns(const Block<A>& x) {
  vec<A> total = x.column[0];
  for (int j = 1; j < kRays<A>; ++j) total += x.column[j];
  return total;
}
// The sum of row r is in lane r.
template <class A>
vec<A> sum_rows(const Block<A>& x) {
  return sum_samples<A>(sum_columns(transpose(x)));
}

}  // namespace rayfuse
