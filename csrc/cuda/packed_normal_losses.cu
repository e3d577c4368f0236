// Losses of Ref-NeRF on normals of packed rays: orientation = sum_i w_i o_i^2 with
// o_i = max(0, n_i . d), and predicted = sum_i w_i (1 - n_i . p_i), p the predicted normals. A warp
// owns a ray, a block a long one, a thread a sample of each tile, whose 3-vectors pass through
// shared memory. One pass over memory forward, one backward. With g the gradients of the two
// losses: d_w_i = g_o o_i^2 + g_p (1 - n_i . p_i), d_n_i = 2 g_o w_i o_i d - g_p w_i p_i, d_p_i =
// -g_p w_i n_i, d_d = sum_i 2 g_o w_i o_i n_i. Verbin et al., Ref-NeRF (2022); docs/normals.md.
#include "launch.h"
#include "levelled_sum.h"
#include "packed.h"

namespace rayfuse {
namespace {

template <class A>
struct Vector3 {
  A x, y, z;

  __device__ A dot(const Vector3& v) const { return x * v.x + y * v.y + z * v.z; }
  __device__ friend Vector3 operator*(A a, const Vector3& v) { return {a * v.x, a * v.y, a * v.z}; }
  __device__ friend Vector3 operator+(const Vector3& u, const Vector3& v) {
    return {u.x + v.x, u.y + v.y, u.z + v.z};
  }
};

template <class T>
__device__ Vector3<accumulator<T>> vector_at(const T* p) {
  return {widen(p[0]), widen(p[1]), widen(p[2])};
}

// A 3-vector for each sample of a team's tile, between memory and threads: a warp asks for whole
// sectors, and takes the vectors from shared memory, where a stride of 3 meets no bank twice.
template <int kThreads, class T>
class Vectors {
 public:
  using A = accumulator<T>;

  // Number i of those that a kernel keeps.
  __device__ Vectors(const Team<kThreads>& team, const PackedRay& ray, int i)
      : team_(team),
        ray_(ray),
        chip_(reinterpret_cast<A*>(shared_memory) + 3 * (kBlock * i + kThreads * team.index)) {}

  static constexpr size_t bytes(int number) { return number * 3 * kBlock * sizeof(A); }

  // For all threads: puts those of the samples from `first` on in place.
  __device__ void load(const T* from, int64_t first) const {
    for_own(first, [&](int i, int64_t at) { chip_[i] = widen(from[at]); });
  }
  __device__ void store(T* to, int64_t first) const {
    for_own(first, [&](int i, int64_t at) { to[at] = narrow<T>(chip_[i]); });
  }
  // That of the thread's sample.
  __device__ Vector3<A> get() const {
    const A* const p = chip_ + 3 * team_.rank;
    return {p[0], p[1], p[2]};
  }
  __device__ void set(const Vector3<A>& v) const {
    A* const p = chip_ + 3 * team_.rank;
    p[0] = v.x, p[1] = v.y, p[2] = v.z;
  }

 private:
  // Calls f(place on chip, place in memory) for the components that belong to the ray.
  template <class F>
  __device__ void for_own(int64_t first, const F& f) const {
#pragma unroll
    for (int i = team_.rank; i < 3 * kThreads; i += kThreads) {
      const int64_t at = 3 * first + i;
      if (3 * ray_.begin <= at && at < 3 * ray_.end) f(i, at);
    }
  }

  const Team<kThreads>& team_;
  const PackedRay& ray_;
  A* const chip_;
};

template <class T>
struct Inputs {
  using A = accumulator<T>;

  const T *w, *n;   // [P], [P, 3]
  const T* n_pred;  // [P, 3] or null
  const T* d;       // [R, 3] or null
  A of_nan;

  // o, where a NaN of n . d stands for of_nan
  __device__ A away(const Vector3<A>& normal, const Vector3<A>& direction) const {
    const A dot = normal.dot(direction);
    return dot > 0 ? dot : dot <= 0 ? A(0) : of_nan;
  }
};

template <class T>
__global__ void __launch_bounds__(kBlock, kResidentBlocks<T>)
    packed_normal_losses_fwd_kernel(int64_t R, int64_t P, Inputs<T> in,
                                    const int64_t* __restrict__ offsets,                   // [R+1]
                                    accumulator<T>* __restrict__ orientation_loss,         // [R]
                                    accumulator<T>* __restrict__ predicted_normal_loss) {  // [R]
  using A = accumulator<T>;
  for_each_packed_ray(offsets, R, P, [&]<int kThreads>(const Team<kThreads>& team, PackedRay ray) {
    const Vectors<kThreads, T> normals(team, ray, 0), predictions(team, ray, 1);
    const Vector3<A> direction = in.d ? vector_at(in.d + 3 * ray.index) : Vector3<A>{};
    LevelledSum<A> orientation, predicted;
    for (int64_t first = first_tile(ray.begin); first < ray.end; first += kThreads) {
      // the tile before was read
      sync(team);
      normals.load(in.n, first);
      if (in.n_pred) predictions.load(in.n_pred, first);
      sync(team);
      const int64_t k = first + team.rank;
      if (!ray.has(k)) continue;
      const Vector3<A> normal = normals.get();
      const A w_k = widen(in.w[k]);
      if (in.d) {
        const A away = in.away(normal, direction);
        orientation.add(w_k * (away * away));
      }
      if (in.n_pred) predicted.add(w_k * (1 - normal.dot(predictions.get())));
    }
    const A orientation_sum = team.sum(orientation.total()), sum = team.sum(predicted.total());
    if (team.rank == 0) {
      orientation_loss[ray.index] = orientation_sum;
      predicted_normal_loss[ray.index] = sum;
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kBlock, kResidentBlocks<T>) packed_normal_losses_bwd_kernel(
    int64_t R, int64_t P, Inputs<T> in,
    const accumulator<T>* __restrict__ d_orientation_loss,       // [R] or null
    const accumulator<T>* __restrict__ d_predicted_normal_loss,  // likewise
    const int64_t* __restrict__ offsets,                         // [R+1]
    T* d_w,                                                      // [P] or null
    T* d_n,                                                      // [P, 3] or null
    T* d_n_pred,                                                 // [P, 3] or null
    T* d_d) {                                                    // [R, 3] or null
  using A = accumulator<T>;
  const bool orientation = in.d && d_orientation_loss;
  const bool predicted = in.n_pred && d_predicted_normal_loss;
  for_each_stray_sample(offsets, R, P, [&](int64_t k) {
    if (d_w) d_w[k] = narrow<T>(0);
    for (int c = 0; c < 3; ++c) {
      if (d_n) d_n[3 * k + c] = narrow<T>(0);
      if (d_n_pred) d_n_pred[3 * k + c] = narrow<T>(0);
    }
  });
  for_each_packed_ray(offsets, R, P, [&]<int kThreads>(const Team<kThreads>& team, PackedRay ray) {
    const Vectors<kThreads, T> normals(team, ray, 0), predictions(team, ray, 1);
    const Vector3<A> zero{};
    const Vector3<A> direction = orientation ? vector_at(in.d + 3 * ray.index) : zero;
    const A g_o = orientation ? d_orientation_loss[ray.index] : A(0);
    const A g_p = predicted ? d_predicted_normal_loss[ray.index] : A(0);
    LevelledSum<A> d_x, d_y, d_z;
    for (int64_t first = first_tile(ray.begin); first < ray.end; first += kThreads) {
      sync(team);
      normals.load(in.n, first);
      if (predicted) predictions.load(in.n_pred, first);
      sync(team);
      const int64_t k = first + team.rank;
      if (ray.has(k)) {
        const Vector3<A> normal = normals.get(), prediction = predicted ? predictions.get() : zero;
        const A w_k = widen(in.w[k]), pull = -g_p * w_k;
        const A away = orientation ? in.away(normal, direction) : A(0);
        const A turn = 2 * g_o * w_k * away;
        // selected, as what is multiplied with may be NaN where a NaN was dropped
        const bool turns = away != 0;
        if (d_w) {
          const A apart = predicted ? 1 - normal.dot(prediction) : A(0);
          d_w[k] = narrow<T>(g_o * (away * away) + g_p * apart);
        }
        // the gradients take the places of what they are of
        normals.set((turns ? turn * direction : zero) + pull * prediction);
        predictions.set(predicted ? pull * normal : zero);
        if (turns) d_x.add(turn * normal.x), d_y.add(turn * normal.y), d_z.add(turn * normal.z);
      }
      sync(team);
      if (d_n) normals.store(d_n, first);
      if (d_n_pred) predictions.store(d_n_pred, first);
    }
    if (d_d) {
      const Vector3<A> sum{team.sum(d_x.total()), team.sum(d_y.total()), team.sum(d_z.total())};
      if (team.rank < 3) {
        const A own = team.rank == 0 ? sum.x : team.rank == 1 ? sum.y : sum.z;
        d_d[3 * ray.index + team.rank] = narrow<T>(own);
      }
    }
  });
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

#include <limits>

namespace rayfuse {
namespace {

template <class T>
Inputs<T> inputs(const Tensor& w, const Tensor& n, const std::optional<Tensor>& n_pred,
                 const std::optional<Tensor>& d, int64_t nan) {
  using A = accumulator<T>;
  // what stands for a NaN of n . d, by the choice of `nan`
  const A of_nan = nan == 0 ? A(0) : std::numeric_limits<A>::quiet_NaN();
  return {data<T>(w), data<T>(n), data<T>(n_pred), data<T>(d), of_nan};
}

std::tuple<Tensor, Tensor> fwd(const Tensor& w, const Tensor& n, const Tensor& offsets,
                               const std::optional<Tensor>& n_pred, const std::optional<Tensor>& d,
                               int64_t nan) {
  const Device device(w);
  const int64_t R = offsets.numel() - 1, P = w.numel();
  Tensor orientation_loss = empty(w, {R}, accumulator_dtype(w));
  Tensor predicted_normal_loss = empty(w, {R}, accumulator_dtype(w));
  dispatch(w, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    launch({packed_blocks(R), kBlock, Vectors<kWarp, T>::bytes(2), device.stream()},
           packed_normal_losses_fwd_kernel<T>, R, P, inputs<T>(w, n, n_pred, d, nan),
           data<int64_t>(offsets), mutable_data<A>(orientation_loss),
           mutable_data<A>(predicted_normal_loss));
  });
  return {orientation_loss, predicted_normal_loss};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(const std::optional<Tensor>& d_orientation_loss,
                                               const std::optional<Tensor>& d_predicted_normal_loss,
                                               const Tensor& w, const Tensor& n,
                                               const Tensor& offsets,
                                               const std::optional<Tensor>& n_pred,
                                               const std::optional<Tensor>& d, int64_t nan,
                                               int64_t needs) {
  const Device device(w);
  const int64_t R = offsets.numel() - 1, P = w.numel();
  Tensor d_w = empty_gradient(w, needs, 0), d_n = empty_gradient(n, needs, 1);
  Tensor d_n_pred = empty_gradient(n_pred, w, needs, 2), d_d = empty_gradient(d, w, needs, 3);
  dispatch(w, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    // one block at least, for samples of no ray
    launch({std::max<int64_t>(packed_blocks(R), 1), kBlock, Vectors<kWarp, T>::bytes(2),
            device.stream()},
           packed_normal_losses_bwd_kernel<T>, R, P, inputs<T>(w, n, n_pred, d, nan),
           data<A>(d_orientation_loss), data<A>(d_predicted_normal_loss), data<int64_t>(offsets),
           mutable_data<T>(d_w), mutable_data<T>(d_n), mutable_data<T>(d_n_pred),
           mutable_data<T>(d_d));
  });
  return {d_w, d_n, d_n_pred, d_d};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("packed_normal_losses", TORCH_BOX(&fwd));
  m.impl("packed_normal_losses_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
