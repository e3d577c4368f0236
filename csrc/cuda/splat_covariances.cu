// Covariances of splats, the formulas of csrc/cpu/splat_covariances.cpp: R diag(e)^2 R^T with R the
// rotation by a quaternion and e the extents, or one by them. A thread owns a splat; a block reads
// and writes its splats as one piece of memory. docs/splats.md
#include <cfloat>
#include <initializer_list>
#include <type_traits>

#include "launch.h"
#include "rays.h"
#include "../math/splat_covariances.h"

namespace rayfuse {
namespace {

// Splats of a block.
constexpr int kSplats = 128;

// An array of R rows, and those of a block on chip.
template <class T>
class Rows {
 public:
  using Value = std::remove_const_t<T>;
  using A = accumulator<Value>;

  // Takes room for kSplats rows from `chip`.
  __device__ Rows(T* array, int values, int64_t first, int count, A*& chip)
      : array_(array + first * values),
        chip_(on_chip<Value>(chip, array_)),
        size_(count * values),
        values_(values) {
    chip += chip_size<Value>(kSplats * values);
  }
  __device__ A* operator[](int i) const { return chip_ + i * values_; }
  __device__ void load() const { rayfuse::load(array_, chip_, size_); }
  __device__ void store() const { rayfuse::store(array_, chip_, size_); }

 private:
  T* const array_;
  A* const chip_;
  const int size_, values_;
};

// What arrays of T with these numbers of values a splat take on chip.
template <class T>
constexpr size_t chip_bytes(std::initializer_list<int> values) {
  size_t bytes = 0;
  for (const int n : values) bytes += chip_size<T>(kSplats * n) * sizeof(accumulator<T>);
  return bytes;
}

template <class A>
struct Splat {
  const A* const q;
  A turn = 0, e[3];
  Matrix<A> R;

  __device__ Splat(const A* q, const A* s, bool inverse) : q(q) {
    const A length2 = q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3];
    if (!(length2 < (sizeof(A) == 8 ? A(DBL_MIN) : A(FLT_MIN)))) turn = 2 / length2;
    R = rotation(q, turn);
    for (int j = 0; j < 3; ++j) e[j] = !inverse ? s[j] : s[j] == 0 ? A(0) : 1 / s[j];
  }
};

template <class T>
__global__ void __launch_bounds__(kSplats, 8)
    splat_covariances_fwd_kernel(int64_t R, bool inverse, bool triu,
                                 const T* quats,               // [R, 4]
                                 const T* scales,              // [R, 3]
                                 accumulator<T>* covariances)  // [R, 6 or 9]
{
  using A = accumulator<T>;
  const int64_t first = int64_t{blockIdx.x} * kSplats;
  const int count = static_cast<int>(min(R - first, int64_t{kSplats})), i = threadIdx.x;
  A* chip = reinterpret_cast<A*>(shared_memory);
  const Rows<const T> q(quats, 4, first, count, chip), s(scales, 3, first, count, chip);
  const Rows<A> out(covariances, matrix_values(triu), first, count, chip);
  q.load(), s.load();
  __syncthreads();
  if (i < count) {
    const Splat<A> splat(q[i], s[i], inverse);
    write_covariance(splat.R, splat.e, triu, out[i]);
  }
  __syncthreads();
  out.store();
}

// Without a bound half precision spills, and with the same one double does.
template <class T>
__global__ void __launch_bounds__(kSplats, sizeof(T) == 8 ? 4 : 8)
    splat_covariances_bwd_kernel(int64_t R, bool inverse, bool triu,
                                 const accumulator<T>* d_covariances,  // [R, 6 or 9]
                                 const T* quats,                       // [R, 4]
                                 const T* scales,                      // [R, 3]
                                 T* d_quats,                           // [R, 4] or null
                                 T* d_scales)                          // [R, 3] or null
{
  using A = accumulator<T>;
  const int64_t first = int64_t{blockIdx.x} * kSplats;
  const int count = static_cast<int>(min(R - first, int64_t{kSplats})), i = threadIdx.x;
  A* chip = reinterpret_cast<A*>(shared_memory);
  const Rows<const T> q(quats, 4, first, count, chip), s(scales, 3, first, count, chip);
  const Rows<const A> g(d_covariances, matrix_values(triu), first, count, chip);
  const Rows<T> d_q(d_quats, 4, first, count, chip), d_s(d_scales, 3, first, count, chip);
  q.load(), s.load(), g.load();
  __syncthreads();
  if (i < count) {
    const Splat<A> splat(q[i], s[i], inverse);
    const Matrix<A> along = along_axes(splat.R, triu, g[i]);
    write_d_quaternion(along, splat.e, splat.q, splat.turn, d_q[i]);
    for (int j = 0; j < 3; ++j) {
      const A change = along.at[j][j] * splat.e[j];
      d_s[i][j] = inverse ? -change * splat.e[j] * splat.e[j] : change;
    }
  }
  __syncthreads();
  if (d_quats) d_q.store();
  if (d_scales) d_s.store();
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

Tensor fwd(const Tensor& quats, const Tensor& scales, bool inverse, bool triu) {
  const Device device(quats);
  const int64_t R = count_rays(quats, 1);
  std::vector<int64_t> sizes = leading_sizes(quats, 1);
  sizes.push_back(matrix_values(triu));
  Tensor covariances = empty(quats, sizes, accumulator_dtype(quats));
  dispatch(quats, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const size_t on_chip = chip_bytes<T>({4, 3}) + chip_bytes<A>({matrix_values(triu)});
    launch({(R + kSplats - 1) / kSplats, kSplats, on_chip, device.stream()},
           splat_covariances_fwd_kernel<T>, R, inverse, triu, data<T>(quats), data<T>(scales),
           mutable_data<A>(covariances));
  });
  return covariances;
}

std::tuple<Tensor, Tensor> bwd(const Tensor& d_covariances, const Tensor& quats,
                               const Tensor& scales, bool inverse, bool triu, int64_t needs) {
  const Device device(quats);
  const int64_t R = count_rays(quats, 1);
  Tensor d_quats = empty_gradient(quats, needs, 0), d_scales = empty_gradient(scales, needs, 1);
  dispatch(quats, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const size_t on_chip = chip_bytes<T>({4, 3, 4, 3}) + chip_bytes<A>({matrix_values(triu)});
    launch({(R + kSplats - 1) / kSplats, kSplats, on_chip, device.stream()},
           splat_covariances_bwd_kernel<T>, R, inverse, triu, data<A>(d_covariances),
           data<T>(quats), data<T>(scales), mutable_data<T>(d_quats), mutable_data<T>(d_scales));
  });
  return {d_quats, d_scales};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("splat_covariances", TORCH_BOX(&fwd));
  m.impl("splat_covariances_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
