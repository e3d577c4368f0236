// Gaussians in space as splats in images; the formulas stand in csrc/math/project_gaussians.h.
// A thread owns a Gaussian and shows it to all cameras of its batch; a block moves the rows of its
// Gaussians as one piece of memory, past shared memory. Every Gaussian is read once, and every
// output written once. Backward: the sums of a block for a camera go to a row, and a second kernel
// adds up the rows of a camera in order.
#include <cmath>

#include "launch.h"
#include "rays.h"

namespace rayfuse {

template <class A>
__device__ A root_of(A x) {
  return sqrt(x);
}
template <class A>
__device__ A log_of(A x) {
  return log(x);
}
template <class A>
__device__ A ceil_of(A x) {
  return ceil(x);
}

}  // namespace rayfuse

#include "../math/project_gaussians.h"

namespace rayfuse {
namespace {

// Gaussians of a block.
constexpr int kRows = 128;
constexpr int kWarps = kRows / kWarp;
// Values of the widest row.
constexpr int kWidest = 6;

template <class T>
constexpr size_t kChipBytes = sizeof(accumulator<T>) * chip_size<T>(kWidest * kRows);

// Which Gaussians a block has.
struct Rows {
  int64_t batch, first;
  int count;

  __device__ Rows(int64_t N) {
    const int64_t blocks = (N + kRows - 1) / kRows;
    batch = blockIdx.x / blocks;
    first = blockIdx.x % blocks * kRows;
    count = static_cast<int>(min(N - first, int64_t{kRows}));
  }
  __device__ bool exist() const { return static_cast<int>(threadIdx.x) < count; }

  // This thread's of the block's rows at p; 0 where there is none.
  template <int width, class T, class A>
  __device__ void load(const T* p, A (&row)[width]) const {
    A* const chip = on_chip(reinterpret_cast<A*>(shared_memory), p);
    __syncthreads();
    rayfuse::load(p, chip, count * width);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < width; ++j) row[j] = exist() ? chip[threadIdx.x * width + j] : A(0);
  }
  template <int width, class T, class A>
  __device__ void store(T* p, const A (&row)[width]) const {
    A* const chip = on_chip(reinterpret_cast<A*>(shared_memory), p);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < width; ++j) chip[threadIdx.x * width + j] = row[j];
    __syncthreads();
    rayfuse::store(p, chip, count * width);
  }
};

template <bool covars, class T>
__device__ auto load_shape(const Gaussians<T>& in, const Rows& rows, int64_t g) {
  using A = accumulator<T>;
  if constexpr (covars) {
    A covar[6];
    rows.load(in.covars + 6 * g, covar);
    return Covariance<A, A>(covar);
  } else {
    A quat[4], scale[3];
    rows.load(in.quats + 4 * g, quat);
    rows.load(in.scales + 3 * g, scale);
    return Ellipsoid<A, A>(quat, scale);
  }
}

template <bool covars, class T>
__global__ void __launch_bounds__(kRows)
    project_gaussians_fwd_kernel(Gaussians<T> in, Projections<accumulator<T>> out) {
  using A = accumulator<T>;
  const Rows rows(in.N);
  const int64_t g = rows.batch * in.N + rows.first;
  A mean[3], opacity[1] = {};
  rows.load(in.means + 3 * g, mean);
  const auto shape = load_shape<covars>(in, rows, g);
  if (in.opacities) rows.load(in.opacities + g, opacity);
  for (int64_t c = 0; c < in.C; ++c) {
    const int64_t of_camera = rows.batch * in.C + c, at = of_camera * in.N + rows.first;
    const Splat<A, A, decltype(shape)> splat(in, Camera<A>(in, of_camera), mean, shape, opacity[0]);
    const auto store = [&]<int width>(A* p, const A(&values)[width]) {
      A row[width];
#pragma unroll
      for (int j = 0; j < width; ++j) row[j] = splat.if_visible(values[j]);
      rows.store(p, row);
    };
    store(out.means2d + 2 * at, splat.mean2d);
    store(out.depths + at, {splat.depth});
    store(out.conics + 3 * at, splat.conic);
    store(out.radii + 2 * at, splat.radius);
    store(out.compensations + at, {splat.compensation});
  }
}

template <bool covars, class T>
// at fewer registers than four blocks leave, loads that are under way spill (sm_75, sm_80)
__global__ void __launch_bounds__(kRows, 16 / sizeof(accumulator<T>))
    project_gaussians_bwd_kernel(Gaussians<T> in, ProjectionGradients<accumulator<T>> d,
                                 GaussianGradients<T> out,
                                 accumulator<T>* __restrict__ d_poses) {  // [blocks, C, kPose]
  using A = accumulator<T>;
  __shared__ A of_warps[kWarps][kPose];
  const Rows rows(in.N);
  const int64_t g = rows.batch * in.N + rows.first;
  A mean[3], opacity[1] = {};
  rows.load(in.means + 3 * g, mean);
  const auto shape = load_shape<covars>(in, rows, g);
  if (in.opacities) rows.load(in.opacities + g, opacity);
  A d_mean[3] = {}, N[6] = {};
  bool met = false;
  for (int64_t c = 0; c < in.C; ++c) {
    const int64_t of_camera = rows.batch * in.C + c, at = of_camera * in.N + rows.first;
    A d_mean2d[2] = {}, d_depth[1] = {}, d_conic[3] = {}, d_compensation[1] = {};
    if (d.means2d) rows.load(d.means2d + 2 * at, d_mean2d);
    if (d.depths) rows.load(d.depths + at, d_depth);
    if (d.conics) rows.load(d.conics + 3 * at, d_conic);
    if (d.compensations) rows.load(d.compensations + at, d_compensation);
    const Camera<A> camera(in, of_camera);
    const Splat<A, A, decltype(shape)> splat(in, camera, mean, shape, opacity[0]);
    A d_pose[kPose];
    splat.gradients(in, camera, mean, d_mean2d, d_depth[0], d_conic, d_compensation[0], d_mean, N,
                    d_pose);
    met |= splat.visible;
    if (!out.viewmats) continue;
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int k = 0; k < kPose; ++k) {
      A sum = rows.exist() ? d_pose[k] : A(0);
#pragma unroll
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
        sum += __shfl_xor_sync(kAllLanes, sum, lanes);
      if (lane == 0) of_warps[threadIdx.x / kWarp][k] = sum;
    }
    __syncthreads();
    if (threadIdx.x < kPose) {
      A sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += of_warps[w][threadIdx.x];
      d_poses[(int64_t{blockIdx.x} * in.C + c) * kPose + threadIdx.x] = sum;
    }
    __syncthreads();
  }
  if (out.means) rows.store(out.means + 3 * g, d_mean);
  if constexpr (covars) {
    A d_covar[6];
    shape.gradients(N, d_covar);
    if (out.covars) rows.store(out.covars + 6 * g, d_covar);
  } else {
    A d_quat[4] = {}, d_scale[3] = {};
    if (met) shape.gradients(N, d_quat, d_scale);
    if (out.quats) rows.store(out.quats + 4 * g, d_quat);
    if (out.scales) rows.store(out.scales + 3 * g, d_scale);
  }
}

// A block owns a camera: some threads a value of its gradient each, and others of them the rows
// that follow in turn.
constexpr int kTurns = 16;

template <class T>
__global__ void __launch_bounds__(16 * kTurns)
    project_gaussians_bwd_cameras_kernel(int64_t blocks, int64_t C,
                                         const accumulator<T>* __restrict__ d_poses,
                                         T* __restrict__ d_viewmats) {  // [B, C, 4, 4]
  __shared__ double sums[kTurns][16];
  const int k = threadIdx.x % 16, turn = threadIdx.x / 16;
  const int64_t batch = blockIdx.x / C, c = blockIdx.x % C;
  double sum = 0;
  for (int64_t i = turn; k < kPose && i < blocks; i += kTurns) {
    sum += d_poses[((batch * blocks + i) * C + c) * kPose + k];
  }
  sums[turn][k] = sum;
  __syncthreads();
  if (turn > 0) return;
  for (int i = 1; i < kTurns; ++i) sum += sums[i][k];
  d_viewmats[16 * int64_t{blockIdx.x} + k] = narrow<T>(static_cast<accumulator<T>>(sum));
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"
#include "../projection.h"

namespace rayfuse {
namespace {

template <class F>
void as_constant(bool flag, const F& f) {
  if (flag) {
    f(std::true_type());
  } else {
    f(std::false_type());
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fwd(
    const Tensor& means, const Tensor& viewmats, const Tensor& Ks, const MaybeTensor& quats,
    const MaybeTensor& scales, const MaybeTensor& covars, const MaybeTensor& opacities,
    int64_t image_width, int64_t image_height, double eps2d, double near_plane, double far_plane,
    double radius_clip, bool compensate, int64_t camera_model) {
  const Device device(means);
  const ProjectionCall call{means,      viewmats,  Ks,          quats,        scales,
                            covars,     opacities, image_width, image_height, eps2d,
                            near_plane, far_plane, radius_clip, compensate,   camera_model};
  const ProjectionOutputs out(call);
  dispatch(means, [&](auto type) {
    using T = decltype(type);
    const auto in = call.gaussians<T>();
    const int64_t blocks = in.B * ((in.N + kRows - 1) / kRows);
    as_constant(in.covars != nullptr, [&](auto given) {
      launch({blocks, kRows, kChipBytes<T>, device.stream()},
             project_gaussians_fwd_kernel<given, T>, in, out.projections<accumulator<T>>());
    });
  });
  return out.tensors();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
    const MaybeTensor& d_means2d, const MaybeTensor& d_depths, const MaybeTensor& d_conics,
    const MaybeTensor&, const MaybeTensor& d_compensations, const Tensor& means,
    const Tensor& viewmats, const Tensor& Ks, const MaybeTensor& quats, const MaybeTensor& scales,
    const MaybeTensor& covars, const MaybeTensor& opacities, int64_t image_width,
    int64_t image_height, double eps2d, double near_plane, double far_plane, double radius_clip,
    bool compensate, int64_t camera_model, int64_t needs) {
  const Device device(means);
  const ProjectionCall call{means,      viewmats,  Ks,          quats,        scales,
                            covars,     opacities, image_width, image_height, eps2d,
                            near_plane, far_plane, radius_clip, compensate,   camera_model};
  const ProjectionResults results(call, needs);
  dispatch(means, [&](auto type) {
    using T = decltype(type);
    using A = accumulator<T>;
    const auto in = call.gaussians<T>();
    const ProjectionGradients<A> d{data<A>(d_means2d), data<A>(d_depths), data<A>(d_conics),
                                   data<A>(d_compensations)};
    const auto out = results.gradients<T>();
    const int64_t blocks = (in.N + kRows - 1) / kRows;
    const Tensor d_poses =
        empty(means, {out.viewmats ? in.B * blocks * in.C : 0, kPose}, accumulator_dtype(means));
    as_constant(in.covars != nullptr, [&](auto given) {
      launch({in.B * blocks, kRows, kChipBytes<T>, device.stream()},
             project_gaussians_bwd_kernel<given, T>, in, d, out, mutable_data<A>(d_poses));
    });
    if (out.viewmats) {
      launch({in.B * in.C, 16 * kTurns, 0, device.stream()},
             project_gaussians_bwd_cameras_kernel<T>, blocks, in.C, data<A>(d_poses), out.viewmats);
    }
  });
  return results.tensors();
}

}  // namespace

RAYFUSE_REGISTER(m) {
  m.impl("project_gaussians", TORCH_BOX(&fwd));
  m.impl("project_gaussians_bwd", TORCH_BOX(&bwd));
}

}  // namespace rayfuse
