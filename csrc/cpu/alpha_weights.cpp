// Weights from opacities: w_i = T_i a_i, T_{i+1} = T_i (1 - a_i).
// One thread owns a few rays. Forward: one pass from the left. Backward: the same pass, which keeps
// T in cache, then one from the right that divides by nothing, so that a = 1 is exact:
// d_a_i = T_i (d_w_i - B_i), B_i = d_w_{i+1} a_{i+1} + d_T_{i+1} + (1 - a_{i+1}) B_{i+1},
// which starts from the gradient of the last T. docs/compositing.md
#include "rays.h"

#include <vector>

namespace rayfuse {
namespace {

template <class A>
vec<A> ones() {
  return 1 - vec<A>{};
}

// A running product over blocks that come in order from the left.
template <class A>
class LeftProduct {
 public:
  // Takes a block; returns the products before each of its samples.
  Block<A> take(const Block<A>& x) {
    constexpr int K = kRays<A>, kLast = kLanes<A> - K;
    Block<A> inside = x;
    for (int j = 1; j < K; ++j) inside.column[j] *= inside.column[j - 1];
    const vec<A> here = repeat_lane<kLast>(product_) * inclusive_lanes<K>(inside.column[K - 1]);
    const vec<A> before = window<kLast>(product_, here);
    product_ = here;
    return each_column<A>([&](int j) { return j ? before * inside.column[j - 1] : before; });
  }
  // The product of everything, of ray r.
  A total(int r) const { return product_[kLanes<A> - kRays<A> + r]; }

 private:
  template <int places>
  static vec<A> inclusive_lanes(vec<A> x) {
    if constexpr (places < kLanes<A>) {
      return inclusive_lanes<2 * places>(x * window<kLanes<A> - places>(ones<A>(), x));
    }
    return x;
  }
  vec<A> product_ = ones<A>();
};

// y_i = b_i + a_i y_{i+1} over blocks that come in order from the right.
template <class A>
class RightChain {
 public:
  explicit RightChain(vec<A> last) : y_(last) {}

  // Takes a block; returns what comes into each of its samples, y_{i+1}.
  Block<A> take(Block<A> a, Block<A> b) {
    constexpr int K = kRays<A>;
    for (int j = K - 2; j >= 0; --j) {
      b.column[j] += a.column[j] * b.column[j + 1];
      a.column[j] *= a.column[j + 1];
    }
    const vec<A> last = repeat_lane<0>(y_);
    y_ = inclusive_lanes<K>(a.column[0], b.column[0], last);
    const vec<A> after = window<K>(y_, last);
    return each_column<A>(
        [&](int j) { return j < K - 1 ? b.column[j + 1] + a.column[j + 1] * after : after; });
  }

 private:
  template <int places>
  static vec<A> inclusive_lanes(vec<A> a, vec<A> b, vec<A> last) {
    if constexpr (places < kLanes<A>) {
      b += a * shift_down<places>(b);
      return inclusive_lanes<2 * places>(a * window<places>(a, ones<A>()), b, last);
    }
    return b + a * last;
  }
  vec<A> y_;
};

// Rays begin..end.
template <class T>
RAYFUSE_KERNEL void weights(int64_t begin, int64_t end, int64_t S,
                            const T* alpha,                   // [R, S]
                            accumulator<T>* w,                // [R, S]
                            accumulator<T>* transmittance) {  // [R, S+1]
  using A = accumulator<T>;
  for (int64_t r = begin; r < end; r += kRays<A>) {
    const int count = std::min<int64_t>(kRays<A>, end - r);
    const Rays<const T> alpha_rays{alpha + r * S, S, count};
    const Rays<A> w_rays{w + r * S, S, count};
    const Rays<A> light_rays{transmittance + r * (S + 1), S + 1, count};
    LeftProduct<A> product;
    for (int64_t k = 0; k < S; k += kLanes<A>) {
      w_rays.prefetch_for_store(k);
      light_rays.prefetch_for_store(k);
      alpha_rays.prefetch_next(k);
      const Block<A> alpha_here = alpha_rays.load_at(k, S - k);
      const Block<A> light =
          product.take(each_column<A>([&](int j) { return 1 - alpha_here.column[j]; }));
      w_rays.store_at(k, S - k, light * alpha_here);
      light_rays.store_at(k, S - k, light);
    }
    for (int i = 0; i < count; ++i) light_rays[i][S] = product.total(i);
  }
}

// Rays begin..end.
template <class T>
RAYFUSE_KERNEL void gradients(int64_t begin, int64_t end, int64_t S,
                              const accumulator<T>* d_w,              // [R, S] or null
                              const accumulator<T>* d_transmittance,  // [R, S+1] or null
                              const T* alpha,                         // [R, S]
                              T* d_alpha) {                           // [R, S]
  using A = accumulator<T>;
  constexpr int N = kLanes<A>;
  struct Kept {
    Block<A> alpha, passing, light;
  };
  const int64_t blocks = (S + N - 1) / N;
  std::vector<Kept> kept(blocks);
  for (int64_t r = begin; r < end; r += kRays<A>) {
    const int count = std::min<int64_t>(kRays<A>, end - r);
    const Rays<const T> alpha_rays{alpha + r * S, S, count};
    const Rays<T> d_alpha_rays{d_alpha + r * S, S, count};
    LeftProduct<A> product;
    for (int64_t i = 0; i < blocks; ++i) {
      d_alpha_rays.prefetch_for_store(i * N);
      alpha_rays.prefetch_next(i * N);
      const Block<A> alpha_here = alpha_rays.load_at(i * N, S - i * N);
      const auto passing = each_column<A>([&](int j) { return 1 - alpha_here.column[j]; });
      alpha_here.store_to(kept[i].alpha);
      passing.store_to(kept[i].passing);
      product.take(passing).store_to(kept[i].light);
    }
    const Rays<const A> d_w_rays{d_w + r * S, S, count};
    const Rays<const A> d_light_rays{d_transmittance + r * (S + 1), S + 1, count};
    RightChain<A> chain(d_transmittance ? d_light_rays.broadcast_at(S) : vec<A>{});
    for (int64_t i = blocks - 1; i >= 0; --i) {
      const int64_t k = i * N;
      const Block<A> d_w_here = d_w ? d_w_rays.load_at(k, S - k) : Block<A>{};
      const Block<A> d_light = d_transmittance ? d_light_rays.load_at(k, S - k) : Block<A>{};
      const Block<A> later = chain.take(kept[i].passing, d_w_here * kept[i].alpha + d_light);
      d_alpha_rays.store_at(k, S - k, kept[i].light * (d_w_here - later));
    }
  }
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

std::tuple<Tensor, Tensor> fwd(const Tensor& alpha) {
  const int64_t S = alpha.size(-1);
  auto sizes = leading_sizes(alpha, 1);
  sizes.push_back(S);
  Tensor w = empty(alpha, sizes, accumulator_dtype(alpha));
  sizes.back() = S + 1;
  Tensor transmittance = empty(alpha, sizes, accumulator_dtype(alpha));
  dispatch(alpha, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const T* alpha_ptr = data<T>(alpha);
    A *w_ptr = mutable_data<A>(w), *transmittance_ptr = mutable_data<A>(transmittance);
    for_rays<A>(transmittance.numel() / (S + 1), S, [=](int64_t begin, int64_t end) {
      weights(begin, end, S, alpha_ptr, w_ptr, transmittance_ptr);
    });
  });
  return {w, transmittance};
}

Tensor bwd(std::optional<Tensor> d_w, std::optional<Tensor> d_transmittance, const Tensor& alpha,
           int64_t needs) {
  const int64_t S = alpha.size(-1);
  Tensor d_alpha = empty_gradient(alpha, needs, 0);
  if (d_alpha.numel() == 0) return d_alpha;
  dispatch(alpha, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const A* d_w_ptr = d_w ? data<A>(*d_w) : nullptr;
    const A* d_transmittance_ptr = d_transmittance ? data<A>(*d_transmittance) : nullptr;
    const T* alpha_ptr = data<T>(alpha);
    T* d_alpha_ptr = mutable_data<T>(d_alpha);
    for_rays<A>(alpha.numel() / S, S, [=](int64_t begin, int64_t end) {
      gradients(begin, end, S, d_w_ptr, d_transmittance_ptr, alpha_ptr, d_alpha_ptr);
    });
  });
  return d_alpha;
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("alpha_weights", TORCH_BOX(&fwd));
  m.impl("alpha_weights_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
