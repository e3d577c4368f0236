// Interlevel loss of packed rays: L = 1/n sum_i r_i u_i over a ray's n samples, r_i = max(0, w_i -
// w_outer_i), u_i = r_i / (w_i + eps), w_outer_i the weight of the m bins from begin_i to end_i:
// from the last that does not start beyond sample i to the first that ends beyond it. One thread
// owns a ray. Forward: running sums of w_env in double, then a search for both ends of every
// sample, 16 bins at a time. It keeps dL/dw_i = u_i (2 - u_i) / n, and dL/dw_env, to which a
// difference array takes the dL/dw_outer_i = -2 u_i / n. Backward: d_loss times these.
// Source: Mip-NeRF 360, eq. 13; docs/interlevel.md.
#include "interlevel_loss.h"
#include "packed_pairs.h"

namespace rayfuse {
namespace {

// Calls f(k, x) for n values, as many doubles as a register has at a time.
template <class T, class F>
void for_each_double(const T* from, int64_t n, const F& f) {
  using A = accumulator<T>;
  constexpr int N = kLanes<double>;
  typedef A part_of_lanes __attribute__((vector_size(N * sizeof(A))));
  for (int64_t k = 0; k < n; k += kLanes<A>) {
    A lanes[kLanes<A>];
    store(lanes, load_at(from, k, n));
    for (int part = 0; part < kLanes<A>; part += N) {
      part_of_lanes x;
      std::memcpy(&x, lanes + part, sizeof x);
      f(k + part, __builtin_convertvector(x, vec<double>));
    }
  }
}

// The samples of a ray; the bins of its envelope likewise.
template <class T>
struct Intervals {
  const T *starts, *ends, *w;
  int64_t n;
};

// Of an array of all rays.
template <class T>
struct PackedIntervals {
  const T *starts, *ends, *w;  // [P]
  const int64_t* offsets;      // [R+1]

  Intervals<T> ray(int64_t r) const {
    const int64_t k = offsets[r];
    return {starts + k, ends + k, w + k, offsets[r + 1] - k};
  }
};

// The bins that bound the samples of a ray.
template <bool clamp, class T>
class Bounds {
 public:
  using A = accumulator<T>;

  explicit Bounds(int64_t outside) : outside_(outside) {}

  void locate(const Intervals<T>& samples, const Intervals<T>& bins) {
    const int64_t n = samples.n, m = bins.n;
    reserve(n, m);
    search(starts_, bins.starts, m, samples.starts, n);
    search(ends_, bins.ends, m, samples.ends, n);
    add_up(bins.w, m);
    const A first = m ? starts_.sorted.values()[0] : A(0);
    const A last = m ? ends_.sorted.values()[m - 1] : A(0);
    const bool is_zero = outside_ == kOutsideZero;
    const A *const starts = starts_.x.data(), *const ends = ends_.x.data();
    const lane_int<A>*const start_nodes = starts_.nodes.data(), *const end_nodes =
                                                                    ends_.nodes.data();
    lane_int<A>*const begins = begin_.data(), *const behinds = end_.data();
    const double* const until = until_.data();
    A* const w_outer = w_outer_.data();
#pragma GCC unroll 4
    for (int64_t i = 0; i < n; ++i) {
      int64_t begin = starts_.sorted.count(start_nodes[i], starts[i]);
      int64_t behind = ends_.sorted.count(end_nodes[i], ends[i]);
      begin -= begin > 0;
      behind += behind < m;
      if (!clamp) {
        behind = first > ends[i] ? 0 : behind;
        begin = is_zero && !(last > starts[i]) ? m : begin;
      }
      begins[i] = begin, behinds[i] = behind;
      w_outer[i] = static_cast<A>(until[behind] - until[begin]);
    }
  }
  const A* w_outer() const { return w_outer_.data(); }

  // From the gradients to the bounds of n samples, those to the weights of m bins.
  void store_gradient(const A* d_outer, int64_t n, A* d_w_env, int64_t m) {
    double* const steps = until_.data();
    std::fill_n(steps, m + 1, 0.0);
    for (int64_t i = 0; i < n; ++i) {
      steps[begin_[i]] += d_outer[i];
      steps[end_[i]] -= d_outer[i];
    }
    LeftScan<double, false> scan;
    for_each_double(
        steps, m, [&](int64_t k, vec<double> step) { store(steps + k, scan.add(step).including); });
    for (int64_t k = 0; k < m; ++k) d_w_env[k] = static_cast<A>(steps[k]);
  }

 private:
  // One end of bins and of samples.
  struct Ends {
    Sorted<A> sorted{0};
    std::vector<A> x;
    std::vector<lane_int<A>> nodes;
  };

  void reserve(int64_t n, int64_t m) {
    const size_t padded = n + Sorted<A>::kPadding;
    if (begin_.size() < padded) {
      for (auto* ends : {&starts_, &ends_}) ends->x.resize(padded), ends->nodes.resize(padded);
      begin_.resize(padded), end_.resize(padded), w_outer_.resize(padded);
    }
    if (until_.size() < static_cast<size_t>(m + 1 + kLanes<A>)) until_.resize(m + 1 + kLanes<A>);
  }
  static void search(Ends& ends, const T* bins, int64_t m, const T* samples, int64_t n) {
    ends.sorted.resize(m);
    A* const values = ends.sorted.values();
    for (int64_t k = 0; k < m; k += kLanes<A>) store(values + k, load_at(bins, k, m));
    ends.sorted.finish();
    // a NaN lies beyond all others
    const vec<A> beyond = broadcast(std::numeric_limits<A>::infinity());
    for (int64_t i = 0; i < n; i += kLanes<A>) {
      const vec<A> x = load_at(samples, i, n);
      store(ends.x.data() + i, x == x ? x : beyond);
    }
    ends.sorted.count_in_nodes(ends.x.data(), n, ends.nodes.data());
  }
  void add_up(const T* w_env, int64_t m) {
    LeftScan<double, false> scan;
    until_[0] = 0;
    for_each_double(w_env, m, [&](int64_t k, vec<double> x) {
      store(until_.data() + k + 1, scan.add(x).including);
    });
  }

  int64_t outside_;
  Ends starts_, ends_;
  std::vector<lane_int<A>> begin_, end_;
  std::vector<A> w_outer_;
  std::vector<double> until_;  // before each bin
};

// Rays first..last.
template <bool clamp, class T>
RAYFUSE_KERNEL void losses(int64_t first, int64_t last, int64_t outside, accumulator<T> eps,
                           const PackedIntervals<T>& samples, const PackedIntervals<T>& bins,
                           accumulator<T>* loss,         // [R]
                           accumulator<T>* slope,        // [P]
                           accumulator<T>* slope_env) {  // [Q]
  using A = accumulator<T>;
  Bounds<clamp, T> bounds(outside);
  std::vector<A> slope_outer;
  for (int64_t r = first; r < last; ++r) {
    const Intervals<T> ray = samples.ray(r), envelope = bins.ray(r);
    const size_t padded = ray.n + kLanes<A>;
    if (slope_outer.size() < padded) slope_outer.resize(padded);
    bounds.locate(ray, envelope);
    loss[r] = loss_and_slopes(RaySamples::of(samples.offsets, r, last), eps, A(1), samples.w,
                              bounds.w_outer(), slope, slope_outer.data());
    bounds.store_gradient(slope_outer.data(), ray.n, slope_env + bins.offsets[r], envelope.n);
  }
}

constexpr char kOp[] = "packed_interlevel_loss";

template <class T>
PackedIntervals<T> intervals(const Tensor& starts, const Tensor& ends, const Tensor& w,
                             const Tensor& offsets) {
  return {data<T>(starts), data<T>(ends), data<T>(w), data<int64_t>(offsets)};
}

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& t_starts, const Tensor& t_ends,
                                       const Tensor& w, const Tensor& offsets,
                                       const Tensor& t_env_starts, const Tensor& t_env_ends,
                                       const Tensor& w_env, const Tensor& offsets_env,
                                       int64_t outside, double eps) {
  const PackedRays rays(kOp, offsets, w.numel());
  const PackedRays envelopes(kOp, offsets_env, w_env.numel(), "offsets_env");
  const auto dtype = accumulator_dtype(w);
  Tensor loss = empty(w, {rays.R}, dtype), slope = empty(w, {w.numel()}, dtype),
         slope_env = empty(w, {w_env.numel()}, dtype);
  dispatch(w, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const auto samples = intervals<T>(t_starts, t_ends, w, offsets);
    const auto bins = intervals<T>(t_env_starts, t_env_ends, w_env, offsets_env);
    A *loss_ptr = mutable_data<A>(loss), *slope_ptr = mutable_data<A>(slope),
      *slope_env_ptr = mutable_data<A>(slope_env);
    as_constant(outside == kOutsideClamp, [&](auto clamp) {
      for_each_piece(rays, envelopes, [=](int64_t first, int64_t last) {
        losses<clamp>(first, last, outside, static_cast<A>(eps), samples, bins, loss_ptr, slope_ptr,
                      slope_env_ptr);
      });
    });
  });
  return {loss, slope, slope_env};
}

std::tuple<Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& slope, const Tensor& slope_env,
                               const Tensor&, const Tensor&, const Tensor& w, const Tensor& offsets,
                               const Tensor&, const Tensor&, const Tensor& w_env,
                               const Tensor& offsets_env, int64_t, double, int64_t needs) {
  const auto d = [&](const Tensor& x, const Tensor& offsets, const char* name, const Tensor& slope,
                     int i) {
    return scaled(PackedRays(kOp, offsets, x.numel(), name), d_loss, slope, x, needs, i);
  };
  return {d(w, offsets, "offsets", slope, 0), d(w_env, offsets_env, "offsets_env", slope_env, 1)};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_interlevel_loss", TORCH_BOX(&fwd));
  m.impl("packed_interlevel_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
