// Rows of a few values that lie end to end in memory, kLanes of them at a time as their columns:
// lane i of column c is value c of row i.
#pragma once

#include <algorithm>

#include "triples.h"

namespace rayfuse {

template <class A, int width>
struct Columns {
  vec<A> column[width];
};

// Every second value of a and b laid end to end, from `first` on; and back.
template <int first, class V>
V every_second(V a, V b) {
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, (2 * i + first)...);
  }(std::make_integer_sequence<int, kLanesOf<V>>());
}
template <bool high, class V>
V take_alternately(V a, V b) {
  constexpr int n = kLanesOf<V>;
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, (i / 2 + high * n / 2 + i % 2 * n)...);
  }(std::make_integer_sequence<int, n>());
}

// Lane i of the result is lane (3 i + first) % kLanes, or the other way round.
template <int first, bool back, class V>
V step_by_three(V x) {
  constexpr int n = kLanesOf<V>;
  // 3 third = 1 modulo n
  constexpr int third = (n % 3 == 1 ? 2 * n + 1 : n + 1) / 3;
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(
        x, x, (back ? (i + n - first % n) % n * third % n : (3 * i + first) % n)...);
  }(std::make_integer_sequence<int, n>());
}

template <class A, int width>
Columns<A, width> columns_of_rows(const Columns<A, width>& rows) {
  const vec<A>* const r = rows.column;
  if constexpr (width == 1) {
    return rows;
  } else if constexpr (width == 3) {
    const Triples<A> x{{r[0], r[1], r[2]}};
    return {{step_by_three<0, false>(component<0>(x)), step_by_three<1, false>(component<1>(x)),
             step_by_three<2, false>(component<2>(x))}};
  } else {
    static_assert(width % 2 == 0, "rows of a power of 2, or 3 times that");
    Columns<A, width / 2> even, odd;
    for (int j = 0; j < width / 2; ++j) {
      even.column[j] = every_second<0>(r[2 * j], r[2 * j + 1]);
      odd.column[j] = every_second<1>(r[2 * j], r[2 * j + 1]);
    }
    even = columns_of_rows(even), odd = columns_of_rows(odd);
    Columns<A, width> out;
    for (int c = 0; c < width; ++c) out.column[c] = (c % 2 ? odd : even).column[c / 2];
    return out;
  }
}

template <class A, int width>
Columns<A, width> rows_of_columns(const Columns<A, width>& columns) {
  const vec<A>* const c = columns.column;
  if constexpr (width == 1) {
    return columns;
  } else if constexpr (width == 3) {
    const vec<A> x = step_by_three<0, true>(c[0]), y = step_by_three<1, true>(c[1]),
                 z = step_by_three<2, true>(c[2]);
    return {{take_turns<0>(x, y, z), take_turns<kLanes<A>>(x, y, z),
             take_turns<2 * kLanes<A>>(x, y, z)}};
  } else {
    static_assert(width % 2 == 0, "rows of a power of 2, or 3 times that");
    Columns<A, width / 2> even, odd;
    for (int i = 0; i < width; ++i) (i % 2 ? odd : even).column[i / 2] = c[i];
    even = rows_of_columns(even), odd = rows_of_columns(odd);
    Columns<A, width> out;
    for (int j = 0; j < width / 2; ++j) {
      out.column[2 * j] = take_alternately<false>(even.column[j], odd.column[j]);
      out.column[2 * j + 1] = take_alternately<true>(even.column[j], odd.column[j]);
    }
    return out;
  }
}

// The first n rows at p, the others are 0.
template <int width, class T, class A = accumulator<T>>
Columns<A, width> load_columns(const T* p, int64_t n) {
  constexpr int N = kLanes<A>;
  Columns<A, width> rows;
  for (int j = 0; j < width; ++j) {
    rows.column[j] =
        n >= N ? load(p + j * N) : load(p + j * N, std::clamp<int64_t>(width * n - j * N, 0, N));
  }
  return columns_of_rows(rows);
}
template <int width, class T, class A = accumulator<T>>
void store_columns(T* p, const Columns<A, width>& x, int64_t n) {
  constexpr int N = kLanes<A>;
  const Columns<A, width> rows = rows_of_columns(x);
  for (int j = 0; j < width; ++j) {
    if (n >= N) {
      store(p + j * N, rows.column[j]);
    } else {
      store(p + j * N, rows.column[j], std::clamp<int64_t>(width * n - j * N, 0, N));
    }
  }
}

}  // namespace rayfuse
