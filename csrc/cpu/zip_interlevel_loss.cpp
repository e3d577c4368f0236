// Zip-NeRF's interlevel loss: L = 1/E sum_k r_k u_k with r_k = max(0, w_blur_k - w_env_k) and
// u_k = r_k / (w_env_k + eps). The weight up to x, blurred by a box of half-width p, is
// (I(x + p) - I(x - p)) / 2p, I the integral of the weight up to a place: a parabola in each
// sample. One thread owns a ray. It searches the ends of every parabola among the envelope's edges
// and fills those between, in double. Backward: the same pass, d_w_env_k = -u_k (2 + u_k) d_loss /
// E. Source: Zip-NeRF, section 4; derivation: docs/interlevel.md.
#include "envelope.h"
#include "uncovered.h"

namespace rayfuse {
namespace {

// The blurred weights of a ray in the bins of its envelope.
template <class T>
class Blur {
 public:
  using A = accumulator<T>;

  Blur(int64_t S, int64_t E, double pulse_width)
      : S_(S),
        E_(E),
        pulse_width_(pulse_width),
        t_(S + 1),
        begins_(S + 1 + Sorted<double>::kPadding),
        in_nodes_(S + 1 + Sorted<double>::kPadding),
        pieces_(S + 1),
        env_edges_(E + 1),
        sums_{std::vector<double>(E + 2 + kLanes<double>),
              std::vector<double>(E + 2 + kLanes<double>)},
        w_blur_(E) {}

  const A* operator()(const T* t, const T* w, const T* t_env) {
    bool sorted = true;
    double before = 0, integral = 0;
    for (int64_t i = 0; i <= S_; ++i) {
      const double width = i < S_ ? double{widen(t[i + 1])} - widen(t[i]) : 0;
      const double w_i = i < S_ ? widen(w[i]) : 0;
      sorted &= width >= 0;
      t_[i] = widen(t[i]);
      pieces_[i] = {before, integral, width > 0 ? w_i / width / 2 : 0};
      integral += (before + w_i / 2) * width;
      before += w_i;
    }
    double* const edges = env_edges_.values();
    for (int64_t k = 0; k <= E_; ++k) edges[k] = widen(t_env[k]);
    for (int64_t k = 0; k < E_; ++k) sorted &= edges[k] <= edges[k + 1];
    sorted &= edges[E_] == edges[E_];
    double *const above = sums_[0].data(), *const below = sums_[1].data();
    if (sorted) {
      // the pieces read a register too far
      env_edges_.finish();
      fill(pulse_width_, above);
      fill(-pulse_width_, below);
    } else {
      for (int64_t k = 0; k <= E_; ++k) {
        above[k] = integral_until(edges[k] + pulse_width_);
        below[k] = integral_until(edges[k] - pulse_width_);
      }
    }
    A* const w_blur = w_blur_.data();
    const double scale = 1 / (2 * pulse_width_);
    for (int64_t k = 0; k < E_; ++k) {
      w_blur[k] = static_cast<A>((above[k + 1] - below[k + 1] - (above[k] - below[k])) * scale);
    }
    return w_blur;
  }

 private:
  // A sample's share of I at x: integral + d (before + curve d), d = x - t_i.
  struct Piece {
    double before, integral, curve;
  };

  // I at all edges of the envelope moved by `shift`. What is written too far is overwritten.
  void fill(double shift, double* to) {
    const double* const edges = env_edges_.values();
    for (int64_t i = 0; i <= S_; ++i) begins_[i] = t_[i] - shift;
    env_edges_.count_in_nodes(begins_.data(), S_ + 1, in_nodes_.data());
    int64_t k = 0, next = env_edges_.count(in_nodes_[0], begins_[0]);
    for (; k < next; k += kLanes<double>) store(to + k, vec<double>{});
    for (int64_t i = 0; i <= S_; ++i) {
      k = next;
      next = i < S_ ? env_edges_.count(in_nodes_[i + 1], begins_[i + 1]) : E_ + 1;
      const Piece piece = pieces_[i];
      do {
        const vec<double> d = load(edges + k) - broadcast(begins_[i]);
        store(to + k, broadcast(piece.integral) +
                          d * (broadcast(piece.before) + broadcast(piece.curve) * d));
        k += kLanes<double>;
      } while (k < next);
    }
  }
  // The same at one place, for edges that are not in order.
  double integral_until(double x) const {
    const int64_t i = std::upper_bound(t_.begin(), t_.end(), x) - t_.begin() - 1;
    if (i < 0 && x == x) return 0;
    const double d = x - t_[std::max<int64_t>(i, 0)];
    const Piece& piece = pieces_[std::max<int64_t>(i, 0)];
    return piece.integral + d * (piece.before + piece.curve * d);
  }

  int64_t S_, E_;
  double pulse_width_;
  std::vector<double> t_, begins_;
  std::vector<int64_t> in_nodes_;
  std::vector<Piece> pieces_;
  Sorted<double> env_edges_;
  std::vector<double> sums_[2];
  std::vector<A> w_blur_;
};

// Rays begin..end.
template <class T>
RAYFUSE_KERNEL void losses(int64_t begin, int64_t end, int64_t S, int64_t E, double pulse_width,
                           accumulator<T> eps,
                           const T* t,              // [R, S+1]
                           const T* w,              // [R, S]
                           const T* t_env,          // [R, E+1]
                           const T* w_env,          // [R, E]
                           accumulator<T>* loss) {  // [R]
  using A = accumulator<T>;
  Blur<T> blur(S, E, pulse_width);
  for (int64_t r = begin; r < end; ++r) {
    const A* const w_blur = blur(t + r * (S + 1), w + r * S, t_env + r * (E + 1));
    using Sums = doubles<kLanes<A>>;
    Sums sums = {};
    for (int64_t k = 0; k < E; k += kLanes<A>) {
      const int64_t n = std::min<int64_t>(kLanes<A>, E - k);
      const vec<A> w_here = load(w_env + r * E + k, n);
      const Uncovered<A> here(load(w_blur + k, n), w_here, w_here, eps);
      sums += __builtin_convertvector(here.r * here.u, Sums);
    }
    double total = 0;
    for (int i = 0; i < kLanes<A>; ++i) total += sums[i];
    loss[r] = static_cast<A>(total / std::max<int64_t>(E, 1));
  }
}

// Rays begin..end.
template <class T>
RAYFUSE_KERNEL void gradients(int64_t begin, int64_t end, int64_t S, int64_t E, double pulse_width,
                              accumulator<T> eps,
                              const accumulator<T>* d_loss,  // [R]
                              const T* t,                    // [R, S+1]
                              const T* w,                    // [R, S]
                              const T* t_env,                // [R, E+1]
                              const T* w_env,                // [R, E]
                              T* d_w_env) {                  // [R, E]
  using A = accumulator<T>;
  Blur<T> blur(S, E, pulse_width);
  for (int64_t r = begin; r < end; ++r) {
    const A* const w_blur = blur(t + r * (S + 1), w + r * S, t_env + r * (E + 1));
    const A scale = -d_loss[r] / std::max<int64_t>(E, 1);
    for (int64_t k = 0; k < E; k += kLanes<A>) {
      const int64_t n = std::min<int64_t>(kLanes<A>, E - k);
      const vec<A> w_here = load(w_env + r * E + k, n);
      const Uncovered<A> here(load(w_blur + k, n), w_here, w_here, eps);
      store(d_w_env + r * E + k, scale * (here.u * (2 + here.u)), n);
    }
  }
}

}  // namespace
}  // namespace rayfuse

#include "large_memory.h"
#include "registration.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& t, const Tensor& w, const Tensor& t_env, const Tensor& w_env,
           double pulse_width, double eps) {
  const int64_t S = w.size(-1), E = w_env.size(-1);
  Tensor loss = empty(t, leading_sizes(w, 1), accumulator_dtype(t));
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const T *t_ptr = data<T>(t), *w_ptr = data<T>(w);
    const T *t_env_ptr = data<T>(t_env), *w_env_ptr = data<T>(w_env);
    A* loss_ptr = mutable_data<A>(loss);
    for_rays<A>(loss.numel(), S + E, [=](int64_t begin, int64_t end) {
      losses(begin, end, S, E, pulse_width, static_cast<A>(eps), t_ptr, w_ptr, t_env_ptr, w_env_ptr,
             loss_ptr);
    });
  });
  return loss;
}

Tensor bwd(const Tensor& d_loss, const Tensor& t, const Tensor& w, const Tensor& t_env,
           const Tensor& w_env, double pulse_width, double eps, int64_t needs) {
  const int64_t S = w.size(-1), E = w_env.size(-1);
  Tensor d_w_env = large_gradient(w_env, needs, 0);
  if (d_w_env.numel() == 0) return d_w_env;
  dispatch(t, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const A* d_loss_ptr = data<A>(d_loss);
    const T *t_ptr = data<T>(t), *w_ptr = data<T>(w);
    const T *t_env_ptr = data<T>(t_env), *w_env_ptr = data<T>(w_env);
    T* d_w_env_ptr = mutable_data<T>(d_w_env);
    for_rays<A>(d_loss.numel(), S + E, [=](int64_t begin, int64_t end) {
      gradients(begin, end, S, E, pulse_width, static_cast<A>(eps), d_loss_ptr, t_ptr, w_ptr,
                t_env_ptr, w_env_ptr, d_w_env_ptr);
    });
  });
  return d_w_env;
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("zip_interlevel_loss", TORCH_BOX(&fwd));
  m.impl("zip_interlevel_loss_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
