// Distortion loss: L = sum_j w_j (spread_j + 1/3 w_j dt_j), spread_j = sum_{k<=j} gap_k left_k with
// gap_k = t_{k+1} - t_{k-1} and left_k, right_k the weight on either side of sample k.
// One thread owns a few rays. Forward: one pass from the left. Backward: the same pass, which keeps
// what the way back needs in cache, and the loss where both are made at once, then one from the
// right: d_w_j = spread_j + sum_{k>j} gap_k (w_k + right_k) + 2/3 w_j dt_j, d_t_j = (w_{j-1} + w_j)
// (left_j - 2/3 w_{j-1} - 1/3 w_j - right_j). Derivation: docs/distortion.md.
#include "rays.h"

#include <vector>

namespace rayfuse {
namespace {

// The pass from the left, a block at a time.
template <class T, bool long_rays>
struct LeftPass {
  using A = accumulator<T>;

  Rays<const T> t, w;
  int64_t S;
  LeftSum<A, long_rays> weight = {}, spread = {};
  // before the first edge any finite value will do: no weight lies there
  Delay<A> t0_of{t.broadcast_at(0)}, t_before_of{t.broadcast_at(0)};
  Block<A> w0 = {}, left = {}, gap = {}, width = {}, spread_left = {};

  void step(int64_t k) {
    t.prefetch_next(k);
    w.prefetch_next(k);
    w0 = w.load_at(k, S - k);
    const Block<A> t1 = t.load_at(k + 1, S - k);
    const Block<A> t0 = t0_of(t1);
    gap = t1 - t_before_of(t0);
    width = t1 - t0;
    left = weight.add(w0).first;
    spread_left = spread.add(gap * left).second;
  }

  // Of the loss, what the samples of this block add.
  vec<A> of_loss() const { return sum_columns(w0 * (spread_left + A(1) / 3 * (w0 * width))); }
};

// Rays begin..end.
template <bool long_rays, class T>
RAYFUSE_KERNEL void losses(int64_t begin, int64_t end, int64_t S,
                           const T* t,              // [R, S+1]
                           const T* w,              // [R, S]
                           accumulator<T>* loss) {  // [R]
  using A = accumulator<T>;
  for (int64_t r = begin; r < end; r += kRays<A>) {
    const int count = std::min<int64_t>(kRays<A>, end - r);
    LeftPass<T, long_rays> pass{{t + r * (S + 1), S + 1, count}, {w + r * S, S, count}, S};
    LevelledSum<A, long_rays> total;
    for (int64_t k = 0; k < S; k += kLanes<A>) {
      pass.step(k);
      total.add(pass.of_loss());
    }
    store(loss + r, sum_samples<A>(total.total()), count);
  }
}

// What the pass from the left leaves for the way back.
template <class A>
struct Kept {
  Block<A> w, gap, d_w;       // d_w as far as it depends on the left
  Block<A> neighbours, pull;  // the two factors of d_t, the second one likewise
};

// Rays begin..end.
template <bool long_rays, bool with_loss, bool with_d_t, class T>
RAYFUSE_KERNEL void gradients(int64_t begin, int64_t end, int64_t S,
                              const accumulator<T>* d_loss,  // [R]
                              const T* t,                    // [R, S+1]
                              const T* w,                    // [R, S]
                              accumulator<T>* loss,          // [R]
                              T* d_t,                        // [R, S+1]
                              T* d_w) {                      // [R, S] or null
  using A = accumulator<T>;
  constexpr int N = kLanes<A>;
  const int64_t blocks = (S + N - 1) / N;
  std::vector<Kept<A>> kept(blocks);
  for (int64_t r = begin; r < end; r += kRays<A>) {
    const int count = std::min<int64_t>(kRays<A>, end - r);
    LeftPass<T, long_rays> pass{{t + r * (S + 1), S + 1, count}, {w + r * S, S, count}, S};
    const Rays<T> d_t_rays{d_t + r * (S + 1), S + 1, count}, d_w_rays{d_w + r * S, S, count};
    LevelledSum<A, long_rays> total;
    Delay<A> w_before_of{vec<A>{}};
    for (int64_t i = 0; i < blocks; ++i) {
      if (with_d_t) d_t_rays.prefetch_for_store(i * N);
      if (d_w) d_w_rays.prefetch_for_store(i * N);
      pass.step(i * N);
      if (with_loss) total.add(pass.of_loss());
      pass.w0.store_to(kept[i].w);
      pass.gap.store_to(kept[i].gap);
      (pass.spread_left + A(2) / 3 * (pass.w0 * pass.width)).store_to(kept[i].d_w);
      if constexpr (with_d_t) {
        const Block<A> w_before = w_before_of(pass.w0);
        (w_before + pass.w0).store_to(kept[i].neighbours);
        (pass.left - A(2) / 3 * w_before - A(1) / 3 * pass.w0).store_to(kept[i].pull);
      }
    }
    if (with_loss) store(loss + r, sum_samples<A>(total.total()), count);
    for (int i = 0; with_d_t && i < count; ++i) {
      const A w_last = S ? widen(w[(r + i) * S + S - 1]) : A(0);
      const A pull = pass.weight.total(i) - A(2) / 3 * w_last;
      d_t[(r + i) * (S + 1) + S] = narrow<T>(d_loss[r + i] * w_last * pull);
    }

    const vec<A> d_loss_here = Rays<const A>{d_loss + r, 1, count}.broadcast_at(0);
    const auto scale = each_column<A>([&](int) { return d_loss_here; });
    RightSum<A, long_rays> weight, spread;
    for (int64_t i = blocks - 1; i >= 0; --i) {
      const auto [right, right_or_here] = weight.add(kept[i].w);
      const int64_t k = i * N;
      if constexpr (with_d_t) {
        const Block<A> pull = kept[i].pull - right;
        d_t_rays.store_at(k, S - k, scale * (kept[i].neighbours * pull));
      }
      if (d_w) {
        const Block<A> spread_right = spread.add(kept[i].gap * right_or_here).first;
        d_w_rays.store_at(k, S - k, scale * (kept[i].d_w + spread_right));
      }
    }
  }
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& t, const Tensor& w) {
  const int64_t S = w.size(-1);
  const auto leading = leading_sizes(w, 1);
  Tensor loss = empty(t, leading, accumulator_dtype(t));
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    const T *t_ptr = data<T>(t), *w_ptr = data<T>(w);
    auto* loss_ptr = mutable_data<accumulator<T>>(loss);
    for_rays<accumulator<T>>(loss.numel(), S, [=](int64_t begin, int64_t end) {
      as_constant(is_long<accumulator<T>>(S), [=](auto long_rays) {
        losses<long_rays>(begin, end, S, t_ptr, w_ptr, loss_ptr);
      });
    });
  });
  return loss;
}

// The gradients, and losses where there is a tensor for them.
std::tuple<Tensor, Tensor> gradients(const Tensor& d_loss, const Tensor& t, const Tensor& w,
                                     const std::optional<Tensor>& loss, int64_t needs) {
  const int64_t S = w.size(-1);
  Tensor d_t = empty_gradient(t, needs, 0), d_w = empty_gradient(w, needs, 1);
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const auto* d_loss_ptr = data<A>(d_loss);
    const T *t_ptr = data<T>(t), *w_ptr = data<T>(w);
    A* loss_ptr = loss ? mutable_data<A>(*loss) : nullptr;
    T *d_t_ptr = mutable_data<T>(d_t), *d_w_ptr = mutable_data<T>(d_w);
    for_rays<A>(d_loss.numel(), S, [=](int64_t begin, int64_t end) {
      as_constant(is_long<A>(S), [=](auto long_rays) {
        as_constant(loss_ptr != nullptr, [=](auto with_loss) {
          as_constant(d_t_ptr != nullptr, [=](auto with_d_t) {
            gradients<long_rays, with_loss, with_d_t>(begin, end, S, d_loss_ptr, t_ptr, w_ptr,
                                                      loss_ptr, d_t_ptr, d_w_ptr);
          });
        });
      });
    });
  });
  return {d_t, d_w};
}

std::tuple<Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& t, const Tensor& w,
                               int64_t needs) {
  return gradients(d_loss, t, w, std::nullopt, needs);
}

std::tuple<Tensor, Tensor, Tensor> fwd_bwd(double d_loss, const Tensor& t, const Tensor& w,
                                           int64_t needs) {
  const auto rays = leading_sizes(w, 1);
  Tensor loss = empty(t, rays, accumulator_dtype(t));
  const auto [d_t, d_w] = gradients(full(t, rays, d_loss), t, w, loss, needs);
  return {sum_of_rays(loss), d_t, d_w};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("distortion_loss", TORCH_BOX(&fwd));
  m.impl("distortion_loss_bwd", TORCH_BOX(&bwd));
  m.impl("distortion_loss_fwd_bwd", TORCH_BOX(&fwd_bwd));
}

}  // namespace rayfuse
