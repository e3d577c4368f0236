// Losses of Ref-NeRF on normals: orientation = sum_i w_i o_i^2 with o_i = max(0, n_i . d), and
// predicted = sum_i w_i (1 - n_i . p_i), p the predicted normals. A warp owns a ray, a block a long
// one; a block reads its rays as one piece, from where threads take 3-vectors one by one. One pass
// over memory forward, one backward. With g the gradients of the two losses:
// d_w_i = g_o o_i^2 + g_p (1 - n_i . p_i), d_n_i = 2 g_o w_i o_i d - g_p w_i p_i,
// d_p_i = -g_p w_i n_i, d_d = sum_i 2 g_o w_i o_i n_i.
// Verbin et al., Ref-NeRF (2022); docs/normals.md.
#include "samples.h"

namespace rayfuse {
namespace {

template <class A>
struct Vector3 {
  A x, y, z;

  __device__ Vector3(A x, A y, A z) : x(x), y(y), z(z) {}
  __device__ explicit Vector3(const A* p) : x(p[0]), y(p[1]), z(p[2]) {}

  __device__ A dot(const Vector3& v) const { return x * v.x + y * v.y + z * v.z; }
  __device__ void store(A* p) const { p[0] = x, p[1] = y, p[2] = z; }
  __device__ friend Vector3 operator*(A a, const Vector3& v) { return {a * v.x, a * v.y, a * v.z}; }
  __device__ friend Vector3 operator+(const Vector3& u, const Vector3& v) {
    return {u.x + v.x, u.y + v.y, u.z + v.z};
  }
};

// o, where a NaN of n . d stands for of_nan
template <class A>
__device__ A away_from_camera(A dot, A of_nan) {
  return dot > 0 ? dot : dot <= 0 ? A(0) : of_nan;
}

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, 1)
    normal_losses_fwd_kernel(int64_t R, int64_t S, int rays_per_block, int tile,
                             accumulator<T> of_nan,
                             const T* __restrict__ w,                        // [R, S]
                             const T* __restrict__ n,                        // [R, S, 3]
                             const T* __restrict__ n_pred,                   // or null
                             const T* __restrict__ d,                        // [R, 3] or null
                             accumulator<T>* __restrict__ orientation_loss,  // [R]
                             accumulator<T>* __restrict__ predicted_normal_loss) {  // [R]
  using A = accumulator<T>;
  constexpr int kTeams = kBlock / kWarp;
  const Team<kThreads> team;
  Piece<T> piece(R, S, rays_per_block, tile);
  const int thread = threadIdx.x;
  __shared__ A directions[3 * kTeams], losses[2][kTeams];
  if (d && thread < 3 * piece.rays) directions[thread] = widen(d[3 * piece.ray + thread]);
  A orientation = 0, predicted = 0;
  for (int64_t first = 0; first < S; first += tile) {
    piece.go_to(first);
    const int64_t own = int64_t{team.index} * S;
    const A* const w_here = piece.load(w, 1) + own;
    const A* const n_here = piece.load(n, 3) + 3 * own;
    const A* const p_here = n_pred ? piece.load(n_pred, 3) + 3 * own : nullptr;
    __syncthreads();
    for (int k = team.rank; k < piece.count_for(team.index); k += kThreads) {
      const Vector3<A> normal(n_here + 3 * k);
      if (d) {
        const A away =
            away_from_camera(normal.dot(Vector3<A>(directions + 3 * team.index)), of_nan);
        orientation += w_here[k] * (away * away);
      }
      if (n_pred) predicted += w_here[k] * (1 - normal.dot(Vector3<A>(p_here + 3 * k)));
    }
    __syncthreads();
  }
  orientation = team.sum(orientation);
  predicted = team.sum(predicted);
  if (team.rank == 0) losses[0][team.index] = orientation, losses[1][team.index] = predicted;
  __syncthreads();
  if (thread < piece.rays) {
    orientation_loss[piece.ray + thread] = losses[0][thread];
    predicted_normal_loss[piece.ray + thread] = losses[1][thread];
  }
}

template <int kThreads, class T>
__global__ void __launch_bounds__(kBlock, 1) normal_losses_bwd_kernel(
    int64_t R, int64_t S, int rays_per_block, int tile, accumulator<T> of_nan,
    const accumulator<T>* __restrict__ d_orientation_loss,       // [R] or null
    const accumulator<T>* __restrict__ d_predicted_normal_loss,  // likewise
    const T* __restrict__ w,                                     // [R, S]
    const T* __restrict__ n,                                     // [R, S, 3]
    const T* __restrict__ n_pred,                                // [R, S, 3] or null
    const T* __restrict__ d,                                     // [R, 3] or null
    T* d_w,                                                      // [R, S] or null
    T* d_n,                                                      // [R, S, 3] or null
    T* d_n_pred,                                                 // [R, S, 3] or null
    T* d_d) {                                                    // [R, 3] or null
  using A = accumulator<T>;
  constexpr int kTeams = kBlock / kWarp;
  const Team<kThreads> team;
  Piece<T> piece(R, S, rays_per_block, tile);
  const int thread = threadIdx.x;
  const bool orientation = d && d_orientation_loss, predicted = n_pred && d_predicted_normal_loss;
  __shared__ A directions[3 * kTeams], scales[2][kTeams];
  if (thread < 3 * kTeams) {
    const bool exists = orientation && thread < 3 * piece.rays;
    directions[thread] = exists ? widen(d[3 * piece.ray + thread]) : A(0);
  }
  if (thread < kTeams) {
    const bool exists = thread < piece.rays;
    scales[0][thread] = orientation && exists ? d_orientation_loss[piece.ray + thread] : A(0);
    scales[1][thread] = predicted && exists ? d_predicted_normal_loss[piece.ray + thread] : A(0);
  }
  Vector3<A> d_direction(0, 0, 0);
  for (int64_t first = 0; first < S; first += tile) {
    piece.go_to(first);
    const int64_t own = int64_t{team.index} * S;
    const A* const w_here = piece.load(w, 1) + own;
    const A* const n_here = piece.load(n, 3) + 3 * own;
    const A* const p_here = predicted ? piece.load(n_pred, 3) + 3 * own : nullptr;
    A* const d_w_here = d_w ? piece.room(d_w, 1) : nullptr;
    A* const d_n_here = d_n ? piece.room(d_n, 3) : nullptr;
    A* const d_p_here = d_n_pred ? piece.room(d_n_pred, 3) : nullptr;
    __syncthreads();
    const Vector3<A> direction(directions + 3 * team.index);
    const A g_o = scales[0][team.index], g_p = scales[1][team.index];
    for (int k = team.rank; k < piece.count_for(team.index); k += kThreads) {
      const Vector3<A> normal(n_here + 3 * k), zero(0, 0, 0);
      const Vector3<A> prediction = predicted ? Vector3<A>(p_here + 3 * k) : zero;
      const A w_k = w_here[k], pull = -g_p * w_k;
      const A away = orientation ? away_from_camera(normal.dot(direction), of_nan) : A(0);
      const A turn = 2 * g_o * w_k * away;
      // selected, as what is multiplied with may be NaN where a NaN was dropped
      const bool turns = away != 0;
      if (d_w) {
        const A apart = predicted ? 1 - normal.dot(prediction) : A(0);
        d_w_here[own + k] = g_o * (away * away) + g_p * apart;
      }
      if (d_n) {
        const Vector3<A> d_normal = (turns ? turn * direction : zero) + pull * prediction;
        d_normal.store(d_n_here + 3 * (own + k));
      }
      if (d_n_pred) (predicted ? pull * normal : zero).store(d_p_here + 3 * (own + k));
      if (d_d && turns) d_direction = d_direction + turn * normal;
    }
    __syncthreads();
    if (d_w) piece.store(d_w, d_w_here, 1);
    if (d_n) piece.store(d_n, d_n_here, 3);
    if (d_n_pred) piece.store(d_n_pred, d_p_here, 3);
    __syncthreads();
  }
  if (d_d) {
    const Vector3<A> total(team.sum(d_direction.x), team.sum(d_direction.y),
                           team.sum(d_direction.z));
    __syncthreads();
    if (team.rank == 0) total.store(directions + 3 * team.index);
    __syncthreads();
    if (thread < 3 * piece.rays) d_d[3 * piece.ray + thread] = narrow<T>(directions[thread]);
  }
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

#include <limits>

namespace rayfuse {
namespace {

// What stands for a NaN of n . d, by the choice of `nan`.
template <class A>
A of_nan(int64_t nan) {
  return nan == 0 ? A(0) : std::numeric_limits<A>::quiet_NaN();
}

std::tuple<Tensor, Tensor> fwd(const Tensor& w, const Tensor& n,
                               const std::optional<Tensor>& n_pred, const std::optional<Tensor>& d,
                               int64_t nan) {
  const Device device(w);
  const int64_t R = count_rays(w, 1), S = w.size(-1);
  const auto leading = leading_sizes(w, 1);
  Tensor orientation_loss = empty(w, leading, accumulator_dtype(w));
  Tensor predicted_normal_loss = empty(w, leading, accumulator_dtype(w));
  dispatch(w, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const SamplePlan<T> plan(R, S, 3, 7, device.stream());
    launch(plan.grid,
           plan.warps ? normal_losses_fwd_kernel<kWarp, T> : normal_losses_fwd_kernel<kBlock, T>, R,
           S, plan.rays_per_block, plan.tile, of_nan<A>(nan), data<T>(w), data<T>(n),
           data<T>(n_pred), data<T>(d), mutable_data<A>(orientation_loss),
           mutable_data<A>(predicted_normal_loss));
  });
  return {orientation_loss, predicted_normal_loss};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(const std::optional<Tensor>& d_orientation_loss,
                                               const std::optional<Tensor>& d_predicted_normal_loss,
                                               const Tensor& w, const Tensor& n,
                                               const std::optional<Tensor>& n_pred,
                                               const std::optional<Tensor>& d, int64_t nan,
                                               int64_t needs) {
  const Device device(w);
  const int64_t R = count_rays(w, 1), S = w.size(-1);
  Tensor d_w = empty_gradient(w, needs, 0), d_n = empty_gradient(n, needs, 1);
  Tensor d_n_pred = empty_gradient(n_pred, w, needs, 2), d_d = empty_gradient(d, w, needs, 3);
  dispatch(w, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const SamplePlan<T> plan(R, S, 6, 14, device.stream());
    launch(plan.grid,
           plan.warps ? normal_losses_bwd_kernel<kWarp, T> : normal_losses_bwd_kernel<kBlock, T>, R,
           S, plan.rays_per_block, plan.tile, of_nan<A>(nan), data<A>(d_orientation_loss),
           data<A>(d_predicted_normal_loss), data<T>(w), data<T>(n), data<T>(n_pred), data<T>(d),
           mutable_data<T>(d_w), mutable_data<T>(d_n), mutable_data<T>(d_n_pred),
           mutable_data<T>(d_d));
  });
  return {d_w, d_n, d_n_pred, d_d};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("normal_losses", TORCH_BOX(&fwd));
  m.impl("normal_losses_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
