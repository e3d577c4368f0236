// The features f [S, C] of one ray: their sum over samples with weights w [S], and what the
// gradient g [C] of that sum gives back, d_w_s = sum_c g_c f_sc and d_f_sc = w_s g_c. Registers go
// along the channels, a few samples at a time, so that memory is read in order; where two samples
// or more fit into a register, it takes as many as fit.
#pragma once

#include <vector>

#include "rays.h"

namespace rayfuse {

// Values begin .. begin + n of an array of any element type. What is small beside the features
// comes and goes through these, so that the element type of the features alone chooses a kernel.
template <class A>
struct RowReader {
  const void* data;
  void (*read)(const void* data, int64_t begin, int64_t n, A* to);

  void operator()(int64_t begin, int64_t n, A* to) const { read(data, begin, n, to); }
};
template <class A>
struct RowWriter {
  void* data;  // or null
  void (*write)(void* data, int64_t begin, int64_t n, const A* from);

  void operator()(int64_t begin, int64_t n, const A* from) const {
    if (data) write(data, begin, n, from);
  }
};

// Instead of a number of lanes: all of them.
struct AllLanes {};
template <class T>
vec<accumulator<T>> load(const T* p, AllLanes) {
  return load(p);
}
template <class T>
void store(T* p, vec<accumulator<T>> x, AllLanes) {
  store(p, x);
}

// Calls f(c, n) for the registers of C values, with the n of them that exist from c on.
template <class A, class F>
void for_registers(int64_t C, const F& f) {
  int64_t c = 0;
  for (; c + kLanes<A> <= C; c += kLanes<A>) f(c, AllLanes());
  if (c < C) f(c, C - c);
}

template <class T>
RAYFUSE_KERNEL void read_row(const void* data, int64_t begin, int64_t n, accumulator<T>* to) {
  const T* const from = static_cast<const T*>(data) + begin;
  for_registers<accumulator<T>>(n, [&](int64_t i, auto n) { store(to + i, load(from + i, n), n); });
}
template <class T>
RAYFUSE_KERNEL void write_row(void* data, int64_t begin, int64_t n, const accumulator<T>* from) {
  T* const to = static_cast<T*>(data) + begin;
  for_registers<accumulator<T>>(n, [&](int64_t i, auto n) { store(to + i, load(from + i, n), n); });
}

// n values, 0 at first, that may be read and written by whole registers.
template <class A>
class Padded {
 public:
  explicit Padded(int64_t n) : values_(n + kLanes<A>) {}
  operator A*() { return values_.data(); }
  // Makes room for n.
  void grow(int64_t n) {
    if (n + kLanes<A> > static_cast<int64_t>(values_.size())) values_.resize(n + kLanes<A>);
  }
  void clear() { std::fill(values_.begin(), values_.end(), A(0)); }

 private:
  std::vector<A> values_;
};

// So many terms add up in one level, and what the levels hold in a second one, with what that
// rounds off: a million samples lose no more than a few hundred do.
constexpr int64_t kInLevel = 64;

template <class T>
class RayFeatures {
 public:
  using A = accumulator<T>;

  // All that is read lies before f_end, and all that is written before d_f_end.
  // Where `past_cache`, d_f is stored so if its registers are aligned.
  RayFeatures(int64_t C, const T* f_end, const T* d_f_end = nullptr, bool past_cache = false)
      : sum(C),
        C_(C),
        f_end_(f_end),
        d_f_end_(d_f_end),
        past_cache_(past_cache && C % kLanes<A> == 0 &&
                    reinterpret_cast<uintptr_t>(d_f_end) % kVectorBytes == 0),
        near_(C),
        lost_(C) {
    for (int i = 0; i < kLanes<A>; ++i) {
      lane_[i] = i;
      sample_[i] = i / std::max<int64_t>(C, 1);
      channel_[i] = i % std::max<int64_t>(C, 1);
    }
  }

  Padded<A> w{0}, d_w{0};  // [S]
  Padded<A> sum;           // [C]

  // Goes on to a ray of S samples, whose weights begin at k.
  void go_to(int64_t k, int64_t S, const RowReader<A>& weights) {
    S_ = S;
    w.grow(S), d_w.grow(S);
    weights(k, S, w);
    // registers of several samples read on, and what is there must not be another ray's
    store(w + S, vec<A>{});
  }

  // sum = sum_s w_s f_s
  void add_up(const T* f) {  // [S, C]
    int64_t begin = 0;
    do {
      const int64_t end = std::min(begin + kInLevel, S_);
      if (is_packed()) {
        add_packed(begin, end, f);
      } else {
        with_registers([&](auto n) { add<n>(begin, end, f); });
      }
      const bool first = begin == 0;
      for_registers<A>(C_, [&](int64_t c, auto) {
        const vec<A> before = first ? vec<A>{} : load(sum + c);
        const vec<A> term = load(near_ + c) - (first ? vec<A>{} : load(lost_ + c));
        const vec<A> after = before + term, off = (after - before) - term;
        // an infinite sum stays one
        store(lost_ + c, off == off ? off : vec<A>{});
        store(sum + c, after);
      });
      begin = end;
    } while (begin < S_);
  }

  // d_w_s = sum_c g_c f_sc, d_f_s = w_s g; of an f that is in cache if it was just added up
  template <bool with_d_w, bool with_d_f, bool in_cache = false>
  void spread(const A* g,  // [C]
              const T* f,  // [S, C]
              T* d_f) {    // [S, C]
    if (is_packed()) return spread_packed<with_d_w, with_d_f>(g, f, d_f);
    with_registers([&](auto n) {
      int64_t s = 0;
      for (; s + kRows <= S_; s += kRows)
        spread_rows<kRows, n, with_d_w, with_d_f, in_cache>(s, g, f, d_f);
      for (; s < S_; ++s) spread_rows<1, n, with_d_w, with_d_f, in_cache>(s, g, f, d_f);
    });
    if (past_cache_) finish_stream();
  }

 private:
  // with fewer samples at a time the sums, in cache, are read and written more often
  static constexpr int kRows = kRays<A>;

  bool is_packed() const { return C_ > 0 && 2 * C_ <= kLanes<A>; }

  // Calls f with how many registers hold the channels where it pays to know it, else with 0.
  // 64 channels: the forward of a distillation took 4.2 ms and takes 3.0 (4096 x 48, one thread).
  template <class F>
  void with_registers(const F& f) const {
    switch (C_ % kLanes<A> == 0 ? C_ / kLanes<A> : 0) {
      case 2:
        return f(std::integral_constant<int, 2>());
      case 4:
        return f(std::integral_constant<int, 4>());
      case 8:
        return f(std::integral_constant<int, 8>());
      default:
        return f(std::integral_constant<int, 0>());
    }
  }

  // near = the sum of these samples
  template <int registers>
  void add(int64_t begin, int64_t end, const T* f) {
    if constexpr (registers > 0) {
      vec<A> x[registers] = {};
      for (int64_t s = begin; s < end; ++s) {
        const vec<A> w_s = broadcast(w[s]);
        for (int i = 0; i < registers; ++i) x[i] += w_s * load(f + s * C_ + i * kLanes<A>);
      }
      for (int i = 0; i < registers; ++i) store(near_ + i * kLanes<A>, x[i]);
    } else {
      near_.clear();
      int64_t s = begin;
      for (; s + kRows <= end; s += kRows) add_rows<kRows>(s, f);
      for (; s < end; ++s) add_rows<1>(s, f);
    }
  }

  template <int rows>
  void add_rows(int64_t s, const T* f) {
    f += s * C_;
    for_registers<A>(C_, [&](int64_t c, auto n) {
      vec<A> x = load(near_ + c);
      for (int i = 0; i < rows; ++i) {
        // half precision is done with a line too soon for the processor's own: 6.2 ms became 4.5
        // (4096 x 48 x 768, 2 threads), and 8.1 ms 6.0 for the gradients
        __builtin_prefetch(f + (rows + i) * C_ + c);
        x += w[s + i] * load(f + i * C_ + c, n);
      }
      store(near_ + c, x);
    });
  }

  template <int rows, int registers, bool with_d_w, bool with_d_f, bool in_cache>
  void spread_rows(int64_t s, const A* g, const T* f, T* d_f) {
    if (with_d_w) f += s * C_;
    if (with_d_f) d_f += s * C_;
    Block<A> total = {};
    const auto at_channels = [&](Block<A>& dot, int64_t c, auto n) {
      const vec<A> g_c = load(g + c, n);
      for (int i = 0; i < rows; ++i) {
        if (with_d_w) {
          if (in_cache) {
            // the next ray's, into the second level, as memory would idle (docs/features.md)
            __builtin_prefetch(f + (S_ + i) * C_ + c, 0, 2);
          } else {
            __builtin_prefetch(f + (rows + i) * C_ + c);
          }
          dot.column[i] += g_c * load(f + i * C_ + c, n);
        }
        if (!with_d_f) continue;
        const vec<A> x = w[s + i] * g_c;
        past_cache_ ? stream(d_f + i * C_ + c, x) : store(d_f + i * C_ + c, x, n);
      }
    };
    if constexpr (registers > 0) {
      for (int i = 0; i < registers; ++i) at_channels(total, i * kLanes<A>, AllLanes());
    } else {
      for (int64_t begin = 0; begin < C_; begin += kInLevel * kLanes<A>) {
        Block<A> dot = {};
        for_registers<A>(std::min(C_ - begin, kInLevel * kLanes<A>),
                         [&](int64_t i, auto n) { at_channels(dot, begin + i, n); });
        total = total + dot;
      }
    }
    if (with_d_w) store(d_w + s, sum_samples<A>(sum_columns(transpose(total))));
  }

  // Calls f(s, n) for the samples of each register, n of whose lanes belong to the ray.
  template <class F>
  void for_packed(int64_t begin, int64_t end, const F& f) {
    const int64_t step = kLanes<A> / C_;
    for (int64_t s = begin; s < end; s += step) f(s, std::min(step, end - s) * C_);
  }

  // Lanes that belong to no sample hold anything where none of the ray's follow: they stay alone.
  vec<A> load_packed(int64_t s, int64_t n, const T* f) const {
    const bool whole = n + C_ > kLanes<A> && f_end_ - (f + s * C_) >= kLanes<A>;
    return whole ? load(f + s * C_) : load(f + s * C_, n);
  }

  void add_packed(int64_t begin, int64_t end, const T* f) {
    vec<A> x = {};
    for_packed(begin, end, [&](int64_t s, int64_t n) {
      x += permute(load(w + s), sample_) * load_packed(s, n, f);
    });
    vec<A> total = x;
    for (int64_t i = C_; i + C_ <= kLanes<A>; i += C_) total += permute(x, moved(lane_, i));
    store(near_ + 0, total);
  }

  template <bool with_d_w, bool with_d_f>
  void spread_packed(const A* g, const T* f, T* d_f) {
    const vec<A> g_here = permute(load(g, C_), channel_);
    const auto first_lane = moved(lane_ * static_cast<integer>(C_), 0);
    for_packed(0, S_, [&](int64_t s, int64_t n) {
      if (with_d_w) {
        const vec<A> x = g_here * load_packed(s, n, f);
        vec<A> dot = x;
        for (int64_t c = 1; c < C_; ++c) dot += permute(x, moved(lane_, c));
        store(d_w + s, permute(dot, first_lane));
      }
      if (with_d_f) {
        // what is written too much is written again, by this thread
        T* const to = d_f + s * C_;
        const vec<A> d_f_here = permute(load(w + s), sample_) * g_here;
        d_f_end_ - to >= kLanes<A> ? store(to, d_f_here) : store(to, d_f_here, n);
      }
    });
  }

  using integer = typename index_of<A>::integer;
  static lane_index<A> moved(lane_index<A> lane, integer by) {
    return (lane + by) & static_cast<integer>(kLanes<A> - 1);
  }

  int64_t S_ = 0, C_;
  const T *f_end_, *d_f_end_;
  bool past_cache_;
  Padded<A> near_, lost_;
  lane_index<A> lane_, sample_, channel_;
};

}  // namespace rayfuse
