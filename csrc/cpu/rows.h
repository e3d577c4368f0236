// Values of kLanes rows of memory, one row a lane: register v holds value v of all rows. 16 bytes
// of each row are transposed at a time, within the 128-bit lanes of registers that are put together
// of as many rows as they have such lanes.
#pragma once

#include <algorithm>

#include "rays.h"

namespace rayfuse {

// Up to kLanes rows. Where there are fewer, the last one stands in for the others.
template <class T>
struct Rows {
  using A = accumulator<std::remove_const_t<T>>;

  T* first;
  int64_t stride;
  int count;

  T* operator[](int i) const { return first + std::min(i, count - 1) * stride; }

  // The first n values.
  void load_to(vec<A>* columns, int64_t n) const {
    if (n < kRays<A>) {
      for (int64_t v = 0; v < n; ++v) {
        for (int i = 0; i < kLanes<A>; ++i) columns[v][i] = widen((*this)[i][v]);
      }
      return;
    }
    for_pieces(n, [&](int64_t v) {
      const Block<A> block =
          transpose(each_column<A>([&](int r) { return together(r, v, pieces()); }));
      for (int j = 0; j < kRays<A>; ++j) columns[v + j] = block.column[j];
    });
  }
  void store_from(const vec<A>* columns, int64_t n) const {
    if (n < kRays<A>) {
      for (int i = 0; i < count; ++i) {
        for (int64_t v = 0; v < n; ++v) (*this)[i][v] = narrow<T>(columns[v][i]);
      }
      return;
    }
    for_pieces(n, [&](int64_t v) {
      const Block<A> block = transpose(each_column<A>([&](int j) { return columns[v + j]; }));
      for (int r = 0; r < kRays<A>; ++r) apart(r, v, block.column[r]);
    });
  }

 private:
  static constexpr int kPieces = kLanes<A> / kRays<A>;

  static auto pieces() { return std::make_integer_sequence<int, kPieces>(); }

  // The last piece overlaps the one before it, where values do not divide into pieces.
  template <class F>
  static void for_pieces(int64_t n, const F& f) {
    int64_t v = 0;
    for (; v + kRays<A> <= n; v += kRays<A>) f(v);
    if (v < n) f(n - kRays<A>);
  }

  // Values v.. of rows r, r + kRays, ... Put together in registers: a load of several smaller
  // stores has to wait until they are in the cache.
  template <int... q>
  vec<A> together(int r, int64_t v, std::integer_sequence<int, q...>) const {
    if constexpr (sizeof(T) == sizeof(A)) {
      vec<A> x = {};
      (..., (x = with_lane128<q>(x, (*this)[q * kRays<A> + r] + v)));
      return x;
    } else {
      std::remove_const_t<T> values[kLanes<A>];
      (...,
       std::memcpy(values + q * kRays<A>, (*this)[q * kRays<A> + r] + v, kRays<A> * sizeof(T)));
      return load(values);
    }
  }
  void apart(int r, int64_t v, vec<A> x) const {
    T values[kLanes<A>];
    store(values, x);
    for (int q = 0; q < kPieces; ++q) {
      const int i = q * kRays<A> + r;
      if (i < count) std::memcpy((*this)[i] + v, values + q * kRays<A>, kRays<A> * sizeof(T));
    }
  }
};

}  // namespace rayfuse
