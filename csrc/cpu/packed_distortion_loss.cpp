// Distortion loss of packed rays: L = sum_j w_j (spread_j + 1/3 w_j dt_j) with dt_j the width of
// sample j, spread_j = sum_{k<=j} gap_k left_k, gap_k = 2 (m_k - m_{k-1}) between midpoints, 0 for
// the first one, and left_k, right_k the weight on either side of sample k.
// One thread owns a ray. Forward: one pass from the left. Backward: the same pass, which keeps what
// the way back needs in cache, then one from the right:
// d_w_j = spread_j + sum_{k>j} gap_k (w_k + right_k) + 2/3 w_j dt_j,
// d_m_j = 2 w_j (left_j - right_j), d_dt_j = 1/3 w_j^2. Derivation: docs/distortion.md.
#include "packed.h"

#include <vector>

namespace rayfuse {
namespace {

// The pass from the left along a ray, a register at a time.
template <class T, bool long_rays>
struct LeftPass {
  using A = accumulator<T>;

  const RaySamples& ray;
  const T *t_starts, *t_ends, *w;  // [P]
  LeftScan<A, long_rays> weight = {}, spread = {};
  vec<A> start = {}, end = {};
  vec<A> w0 = {}, left = {}, gap = {}, width = {}, spread_left = {};

  void step(int64_t k) {
    w0 = ray.load(w, k);
    // before the first sample any finite gap will do: no weight lies there
    const vec<A> start_before = start, end_before = end;
    start = ray.load(t_starts, k), end = ray.load(t_ends, k);
    gap = (start - delayed<false>(start_before, start)) + (end - delayed<false>(end_before, end));
    width = end - start;
    left = weight.add(w0).before;
    spread_left = spread.add(gap * left).including;
  }
};

template <bool long_rays, class T>
accumulator<T> loss_of(const RaySamples& ray, const T* t_starts, const T* t_ends, const T* w) {
  using A = accumulator<T>;
  LeftPass<T, long_rays> pass{ray, t_starts, t_ends, w};
  LevelledSum<A, long_rays> total;
  for (int64_t k = 0; k < ray.n; k += kLanes<A>) {
    pass.step(k);
    total.add(pass.w0 * (pass.spread_left + A(1) / 3 * (pass.w0 * pass.width)));
  }
  return sum_lanes<A>(total.total());
}

// Rays of so few samples take them one by one: with 5, registers of mostly zeros took 1.7 times as
// long.
constexpr int kFew = 6;

template <class T>
accumulator<T> loss_of_few(const RaySamples& ray, const T* t_starts, const T* t_ends, const T* w) {
  using A = accumulator<T>;
  A left = 0, spread = 0, loss = 0;
  for (int64_t k = ray.begin; k < ray.begin + ray.n; ++k) {
    const A start = widen(t_starts[k]), end = widen(t_ends[k]), w0 = widen(w[k]);
    if (k > ray.begin)
      spread += ((start - widen(t_starts[k - 1])) + (end - widen(t_ends[k - 1]))) * left;
    loss += w0 * (spread + A(1) / 3 * (w0 * (end - start)));
    left += w0;
  }
  return loss;
}

// Rays first..last.
template <class T>
RAYFUSE_KERNEL void losses(int64_t first, int64_t last,
                           const T* t_starts,       // [P]
                           const T* t_ends,         // [P]
                           const T* w,              // [P]
                           const int64_t* offsets,  // [R+1]
                           accumulator<T>* loss) {  // [R]
  using A = accumulator<T>;
  for (int64_t r = first; r < last; ++r) {
    const RaySamples ray = RaySamples::of(offsets, r, last);
    if (ray.n <= kFew) {
      loss[r] = loss_of_few(ray, t_starts, t_ends, w);
    } else if (is_long<A>(ray.n)) {
      loss[r] = loss_of<true>(ray, t_starts, t_ends, w);
    } else {
      loss[r] = loss_of<false>(ray, t_starts, t_ends, w);
    }
  }
}

// What the pass from the left leaves for the way back; d_w as far as it depends on the left.
template <class A>
struct Kept {
  vec<A> w, gap, left, d_w;
};

// The gradients, null where they are not wanted.
template <class T>
struct Gradients {
  T *d_t_starts, *d_t_ends, *d_w;  // [P]
};

template <bool long_rays, class T>
void gradients_of(const RaySamples& ray, accumulator<T> d_loss, const T* t_starts, const T* t_ends,
                  const T* w, const Gradients<T>& out, Kept<accumulator<T>>* kept) {
  using A = accumulator<T>;
  constexpr int N = kLanes<A>;
  LeftPass<T, long_rays> pass{ray, t_starts, t_ends, w};
  int64_t k = 0;
  for (auto* here = kept; k < ray.n; k += N, ++here) {
    pass.step(k);
    here->w = pass.w0;
    here->gap = pass.gap;
    here->left = pass.left;
    here->d_w = pass.spread_left + A(2) / 3 * (pass.w0 * pass.width);
  }
  RightScan<A, long_rays> weight, spread;
  for (k -= N; k >= 0; k -= N) {
    const Kept<A>& here = kept[k / N];
    const auto [right, right_or_here] = weight.add(here.w);
    const vec<A> balance = here.left - right, third = A(1) / 3 * here.w;
    if (out.d_t_starts) ray.store(out.d_t_starts, k, d_loss * (here.w * (balance - third)));
    if (out.d_t_ends) ray.store(out.d_t_ends, k, d_loss * (here.w * (balance + third)));
    if (out.d_w) {
      const vec<A> spread_right = spread.add(here.gap * right_or_here).before;
      ray.store(out.d_w, k, d_loss * (here.d_w + spread_right));
    }
  }
}

template <class T>
void gradients_of_few(const RaySamples& ray, accumulator<T> d_loss, const T* t_starts,
                      const T* t_ends, const T* w, const Gradients<T>& out) {
  using A = accumulator<T>;
  A gap[kFew], left[kFew], d_w[kFew], weight = 0, spread = 0;
  for (int64_t i = 0; i < ray.n; ++i) {
    const int64_t k = ray.begin + i;
    const A start = widen(t_starts[k]), end = widen(t_ends[k]), w0 = widen(w[k]);
    gap[i] = i > 0 ? (start - widen(t_starts[k - 1])) + (end - widen(t_ends[k - 1])) : A(0);
    left[i] = weight;
    spread += gap[i] * weight;
    d_w[i] = spread + A(2) / 3 * (w0 * (end - start));
    weight += w0;
  }
  A right = 0, spread_right = 0;
  for (int64_t i = ray.n - 1; i >= 0; --i) {
    const int64_t k = ray.begin + i;
    const A w0 = widen(w[k]), balance = left[i] - right, third = A(1) / 3 * w0;
    if (out.d_t_starts) out.d_t_starts[k] = narrow<T>(d_loss * (w0 * (balance - third)));
    if (out.d_t_ends) out.d_t_ends[k] = narrow<T>(d_loss * (w0 * (balance + third)));
    if (out.d_w) out.d_w[k] = narrow<T>(d_loss * (d_w[i] + spread_right));
    right += w0;
    spread_right += gap[i] * right;
  }
}

// Rays first..last.
template <class T>
RAYFUSE_KERNEL void gradients(int64_t first, int64_t last,
                              const accumulator<T>* d_loss,  // [R]
                              const T* t_starts,             // [P]
                              const T* t_ends,               // [P]
                              const T* w,                    // [P]
                              const int64_t* offsets,        // [R+1]
                              const Gradients<T>& out) {
  using A = accumulator<T>;
  std::vector<Kept<A>> kept;
  for (int64_t r = first; r < last; ++r) {
    const RaySamples ray = RaySamples::of(offsets, r, last);
    if (ray.n <= kFew) {
      gradients_of_few(ray, d_loss[r], t_starts, t_ends, w, out);
      continue;
    }
    const int64_t blocks = ray.registers<A>();
    if (blocks > static_cast<int64_t>(kept.size())) kept.resize(blocks);
    if (is_long<A>(ray.n)) {
      gradients_of<true>(ray, d_loss[r], t_starts, t_ends, w, out, kept.data());
    } else {
      gradients_of<false>(ray, d_loss[r], t_starts, t_ends, w, out, kept.data());
    }
  }
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& t_starts, const Tensor& t_ends, const Tensor& w, const Tensor& offsets) {
  const PackedRays rays("packed_distortion_loss", offsets, w.numel());
  Tensor loss = empty(w, {rays.R}, accumulator_dtype(t_starts));
  dispatch(t_starts, [&](auto type) {
    using T = decltype(type);
    const T *t_starts_ptr = data<T>(t_starts), *t_ends_ptr = data<T>(t_ends), *w_ptr = data<T>(w);
    auto* loss_ptr = mutable_data<accumulator<T>>(loss);
    rays.for_each_piece([=](int64_t first, int64_t last) {
      losses(first, last, t_starts_ptr, t_ends_ptr, w_ptr, rays.offsets, loss_ptr);
    });
  });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& t_starts,
                                       const Tensor& t_ends, const Tensor& w, const Tensor& offsets,
                                       int64_t needs) {
  const PackedRays rays("packed_distortion_loss", offsets, w.numel());
  Tensor d_t_starts = empty_gradient(t_starts, needs, 0),
         d_t_ends = empty_gradient(t_ends, needs, 1), d_w = empty_gradient(w, needs, 2);
  dispatch(t_starts, [&](auto type) {
    using T = decltype(type);
    const auto* d_loss_ptr = data<accumulator<T>>(d_loss);
    const T *t_starts_ptr = data<T>(t_starts), *t_ends_ptr = data<T>(t_ends), *w_ptr = data<T>(w);
    const Gradients<T> out{mutable_data<T>(d_t_starts), mutable_data<T>(d_t_ends),
                           mutable_data<T>(d_w)};
    rays.for_each_piece([=](int64_t first, int64_t last) {
      gradients(first, last, d_loss_ptr, t_starts_ptr, t_ends_ptr, w_ptr, rays.offsets, out);
    });
  });
  return {d_t_starts, d_t_ends, d_w};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_distortion_loss", TORCH_BOX(&fwd));
  m.impl("packed_distortion_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
