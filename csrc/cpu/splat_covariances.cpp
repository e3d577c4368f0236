// Covariances of splats: R diag(e)^2 R^T with R the rotation by a quaternion and e the extents, or
// one by them. One thread owns kLanes splats at a time, a splat a lane.
// Backward, with G the gradient plus its transpose and B = R^T G R: d_e_j = B_jj e_j, and turning
// about the splat's own axes x, y, z adds B_yz (e_y^2 - e_z^2), ... to the loss. docs/splats.md
#include "rows.h"
#include "triples.h"
#include "../math/splat_covariances.h"

#include <limits>

namespace rayfuse {
namespace {

// Splats n .. n + count.
template <class A>
struct Splats {
  vec<A> q[4], turn, e[3];
  Matrix<vec<A>> R;

  template <class T>
  Splats(const T* quats, const T* scales, bool inverse, int64_t n, int count) {
    Rows<const T>{quats + 4 * n, 4, count}.load_to(q, 4);
    const vec<A> length2 = q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3];
    turn = length2 < std::numeric_limits<A>::min() ? vec<A>{} : 2 / length2;
    R = rotation(q, turn);
    const Triples<A> s = by_component(load_triples(scales + 3 * n, count));
    for (int j = 0; j < 3; ++j) {
      e[j] = !inverse ? s.part[j] : s.part[j] == 0 ? vec<A>{} : 1 / s.part[j];
    }
  }
};

// Splats begin..end.
template <class T, class A>
RAYFUSE_KERNEL void covariances(int64_t begin, int64_t end, bool inverse, bool triu,
                                const T* quats,    // [R, 4]
                                const T* scales,   // [R, 3]
                                A* covariances) {  // [R, 6 or 9]
  const int values = matrix_values(triu);
  for (int64_t n = begin; n < end; n += kLanes<A>) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes<A>, end - n));
    const Splats<A> splats(quats, scales, inverse, n, count);
    vec<A> out[matrix_values(false)];
    write_covariance(splats.R, splats.e, triu, out);
    Rows<A>{covariances + values * n, values, count}.store_from(out, values);
  }
}

// Splats begin..end.
template <class T, class A>
RAYFUSE_KERNEL void gradients(int64_t begin, int64_t end, bool inverse, bool triu,
                              const A* d_covariances,  // [R, 6 or 9]
                              const T* quats,          // [R, 4]
                              const T* scales,         // [R, 3]
                              T* d_quats,              // [R, 4] or null
                              T* d_scales) {           // [R, 3] or null
  const int values = matrix_values(triu);
  for (int64_t n = begin; n < end; n += kLanes<A>) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes<A>, end - n));
    const Splats<A> splats(quats, scales, inverse, n, count);
    vec<A> g[matrix_values(false)];
    Rows<const A>{d_covariances + values * n, values, count}.load_to(g, values);
    const Matrix<vec<A>> along = along_axes(splats.R, triu, g);
    if (d_quats) {
      vec<A> d_q[4];
      write_d_quaternion(along, splats.e, splats.q, splats.turn, d_q);
      Rows<T>{d_quats + 4 * n, 4, count}.store_from(d_q, 4);
    }
    if (d_scales) {
      vec<A> d_e[3];
      for (int j = 0; j < 3; ++j) {
        const vec<A> change = along.at[j][j] * splats.e[j];
        d_e[j] = inverse ? -change * splats.e[j] * splats.e[j] : change;
      }
      store_triples(d_scales + 3 * n, by_vector<A>(d_e[0], d_e[1], d_e[2]), count);
    }
  }
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

// Calls f(first splat, last splat + 1) on torch's threads, the first one a multiple of kLanes.
template <class A, class F>
void for_splats(int64_t splats, const F& f) {
  constexpr int64_t N = kLanes<A>;
  torch::stable::parallel_for(
      0, (splats + N - 1) / N, (1 << 11) / N,
      [&](int64_t begin, int64_t end) { f(begin * N, std::min(end * N, splats)); });
}

Tensor fwd(const Tensor& quats, const Tensor& scales, bool inverse, bool triu) {
  std::vector<int64_t> sizes = leading_sizes(quats, 1);
  sizes.push_back(matrix_values(triu));
  Tensor out = empty(quats, sizes, accumulator_dtype(quats));
  dispatch(quats, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const T *quats_ptr = data<T>(quats), *scales_ptr = data<T>(scales);
    A* const to = mutable_data<A>(out);
    for_splats<A>(count_rays(quats, 1), [=](int64_t begin, int64_t end) {
      covariances(begin, end, inverse, triu, quats_ptr, scales_ptr, to);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> bwd(const Tensor& d_covariances, const Tensor& quats,
                               const Tensor& scales, bool inverse, bool triu, int64_t needs) {
  Tensor d_quats = empty_gradient(quats, needs, 0), d_scales = empty_gradient(scales, needs, 1);
  dispatch(quats, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const A* const g = data<A>(d_covariances);
    const T *quats_ptr = data<T>(quats), *scales_ptr = data<T>(scales);
    T *d_quats_ptr = mutable_data<T>(d_quats), *d_scales_ptr = mutable_data<T>(d_scales);
    for_splats<A>(count_rays(quats, 1), [=](int64_t begin, int64_t end) {
      gradients(begin, end, inverse, triu, g, quats_ptr, scales_ptr, d_quats_ptr, d_scales_ptr);
    });
  });
  return {d_quats, d_scales};
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("splat_covariances", TORCH_BOX(&fwd));
  m.impl("splat_covariances_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
