// Feature distillation: loss = mean_c (F_c - target_c)^2 with the rendering F = sum_s w_s f_s.
// One thread owns a few rays. Forward: one pass over f. Backward: one for F, which gives
// g = d_loss 2/C (F - target), and one for d_w_s = <g, f_s>, d_f_s = w_s g while the ray's f is
// still in cache (147 KB at 48 samples of 768 channels); d_target = -g.
#include "ray_features.h"

namespace rayfuse {
namespace {

// Rays begin..end of R.
template <class T>
RAYFUSE_KERNEL void losses(int64_t begin, int64_t end, int64_t R, int64_t S, int64_t C,
                           RowReader<accumulator<T>> w,       // [R, S]
                           const T* f,                        // [R, S, C]
                           RowReader<accumulator<T>> target,  // [R, C]
                           accumulator<T>* loss) {            // [R]
  using A = accumulator<T>;
  RayFeatures<T> ray(S, C, f + R * S * C);
  Padded<A> target_r(C);
  for (int64_t r = begin; r < end; ++r) {
    w(r, S, ray.w);
    target(r, C, target_r);
    ray.add_up(f + r * S * C);
    Block<A> total = {};
    for_registers<A>(C, [&](int64_t c, auto n) {
      const vec<A> off = load(ray.sum + c, n) - load(target_r + c, n);
      total.column[0] += off * off;
    });
    loss[r] = sum_samples<A>(sum_columns(transpose(total)))[0] / static_cast<A>(C);
  }
}

// Likewise.
template <bool with_d_w, bool with_d_f, class T>
RAYFUSE_KERNEL void gradients(int64_t begin, int64_t end, int64_t R, int64_t S, int64_t C,
                              bool past_cache,
                              const accumulator<T>* d_loss,          // [R]
                              RowReader<accumulator<T>> w,           // [R, S]
                              const T* f,                            // [R, S, C]
                              RowReader<accumulator<T>> target,      // [R, C]
                              RowWriter<accumulator<T>> d_w,         // [R, S]
                              T* d_f,                                // [R, S, C]
                              RowWriter<accumulator<T>> d_target) {  // [R, C]
  using A = accumulator<T>;
  RayFeatures<T> ray(S, C, f + R * S * C, d_f + end * S * C, past_cache);
  Padded<A> g(C), d_target_r(C);
  for (int64_t r = begin; r < end; ++r) {
    w(r, S, ray.w);
    target(r, C, g);
    ray.add_up(f + r * S * C);
    const A scale = 2 * d_loss[r] / static_cast<A>(C);
    for_registers<A>(C, [&](int64_t c, auto n) {
      const vec<A> g_c = scale * (load(ray.sum + c, n) - load(g + c, n));
      store(g + c, g_c, n);
      store(d_target_r + c, -g_c, n);
    });
    ray.template spread<with_d_w, with_d_f>(g, f + r * S * C, d_f + r * S * C);
    d_w(r, S, ray.d_w);
    d_target(r, C, d_target_r);
  }
}

}  // namespace
}  // namespace rayfuse

#include "large_memory.h"
#include "ray_features_registration.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& w, const Tensor& f, const Tensor& target) {
  const int64_t S = f.size(-2), C = f.size(-1);
  Tensor loss = empty(w, leading_sizes(w, 1), accumulator_dtype(w));
  const int64_t R = loss.numel();
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const auto w_rows = rows<A>(w), target_rows = rows<A>(target);
    const T* f_ptr = data<T>(f);
    A* loss_ptr = mutable_data<A>(loss);
    for_rays<A>(R, S * C, [=](int64_t begin, int64_t end) {
      losses(begin, end, R, S, C, w_rows, f_ptr, target_rows, loss_ptr);
    });
  });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& d_loss, const Tensor& w, const Tensor& f,
                                       const Tensor& target, int64_t needs) {
  const int64_t S = f.size(-2), C = f.size(-1), R = d_loss.numel();
  Tensor d_w = empty_gradient(w, needs, 0), d_f = large_gradient(f, needs, 1),
         d_target = empty_gradient(target, needs, 2);
  dispatch(f, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const A* d_loss_ptr = data<A>(d_loss);
    const auto w_rows = rows<A>(w), target_rows = rows<A>(target);
    const T* f_ptr = data<T>(f);
    const auto d_w_rows = mutable_rows<A>(d_w), d_target_rows = mutable_rows<A>(d_target);
    T* d_f_ptr = mutable_data<T>(d_f);
    const bool past_cache = is_large(d_f);
    for_rays<A>(R, S * C, [=](int64_t begin, int64_t end) {
      as_constant(d_w_rows.data != nullptr, [=](auto with_d_w) {
        as_constant(d_f_ptr != nullptr, [=](auto with_d_f) {
          gradients<with_d_w, with_d_f>(begin, end, R, S, C, past_cache, d_loss_ptr, w_rows, f_ptr,
                                        target_rows, d_w_rows, d_f_ptr, d_target_rows);
        });
      });
    });
  });
  return {d_w, d_f, d_target};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("feature_distillation_loss", TORCH_BOX(&fwd));
  m.impl("feature_distillation_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
