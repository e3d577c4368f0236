// Kernels with one bug each, all of which the host executor must name (test_simt.py), and one
// without.
#include "launch.h"
#include "rays.h"

namespace rayfuse {
namespace {

constexpr int kThreads = 64;

__global__ void clean_kernel(int64_t n, const float* x, float* y) {
  __shared__ float staged[kThreads];
  const int i = threadIdx.x;
  staged[i] = i < n ? x[i] : 0;
  __syncthreads();
  float sum = staged[kThreads - 1 - i];
  for (int places = 16; places; places /= 2) sum += __shfl_xor_sync(kAllLanes, sum, places);
  if (i < n) y[i] = sum;
}

__global__ void missing_barrier_kernel(int64_t, const float* x, float* y) {
  __shared__ float staged[kThreads];
  staged[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = staged[kThreads - 1 - threadIdx.x];
}

__global__ void missing_warp_barrier_kernel(int64_t, const float* x, float* y) {
  __shared__ float staged[kThreads];
  staged[threadIdx.x] = x[threadIdx.x];
  // a shuffle orders no memory
  const float other = __shfl_xor_sync(kAllLanes, x[threadIdx.x], 1);
  y[threadIdx.x] = staged[threadIdx.x ^ 1] + other;
}

__global__ void divergent_barrier_kernel(int64_t, const float* x, float* y) {
  if (threadIdx.x < 40) __syncthreads();
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void two_barriers_kernel(int64_t, const float* x, float* y) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void read_past_the_end_kernel(int64_t, const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x + 1];
}

__global__ void write_past_the_end_kernel(int64_t, const float* x, float* y) {
  y[threadIdx.x + 1] = x[threadIdx.x];
}

__global__ void write_to_input_kernel(int64_t, const float* x, float*) {
  const_cast<float*>(x)[threadIdx.x] = 0;
}

__global__ void misaligned_vector_kernel(int64_t, const float* x, float* y) {
  if (threadIdx.x == 3) *reinterpret_cast<float4*>(y) = *reinterpret_cast<const float4*>(x + 1);
}

__global__ void uninitialised_kernel(int64_t, const float* x, float* y) {
  __shared__ float staged[kThreads];
  if (threadIdx.x < 63) staged[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = staged[threadIdx.x];
}

__global__ void past_dynamic_memory_kernel(int64_t, const float* x, float* y) {
  float* staged = reinterpret_cast<float*>(shared_memory);
  staged[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = staged[threadIdx.x + 1];
}

__global__ void past_static_memory_kernel(int64_t n, const float* x, float* y) {
  __shared__ float staged[kThreads];
  const int next = threadIdx.x + (n == kThreads);
  staged[next] = x[threadIdx.x];
  y[threadIdx.x] = staged[next];
}

__global__ void wrong_mask_kernel(int64_t, const float* x, float* y) {
  float sum = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) sum += __shfl_xor_sync(kAllLanes, sum, 1);
  y[threadIdx.x] = sum;
}

__global__ void lane_outside_mask_kernel(int64_t, const float* x, float* y) {
  float sum = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) sum += __shfl_xor_sync(0xffff, sum, 16);
  y[threadIdx.x] = sum;
}

__global__ void shared_race_kernel(int64_t, const float* x, float* y) {
  __shared__ float sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  sum += x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = sum;
}

__global__ void strided_kernel(int64_t, const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x % 8 * 8 + threadIdx.x / 8];
}

}  // namespace
}  // namespace rayfuse

#include "registration.h"

namespace rayfuse {
namespace {

template <void (*kernel)(int64_t, const float*, float*)>
Tensor run(const Tensor& x) {
  const Device device(x);
  Tensor y = empty(x, {x.numel()}, dtype_of(x));
  launch({1, kThreads, kThreads * sizeof(float), device.stream()}, kernel, x.numel(),
         data<float>(x), mutable_data<float>(y));
  return y;
}

}  // namespace

#define RAYFUSE_FOR_EACH_BUG(f)                                                            \
  f(clean) f(missing_barrier) f(missing_warp_barrier) f(divergent_barrier) f(two_barriers) \
      f(read_past_the_end) f(write_past_the_end) f(write_to_input) f(misaligned_vector)    \
          f(uninitialised) f(past_dynamic_memory) f(past_static_memory) f(wrong_mask)      \
              f(lane_outside_mask) f(shared_race) f(strided)

#define RAYFUSE_DEFINE(name) m.def(#name "(Tensor x) -> Tensor");
#define RAYFUSE_IMPLEMENT(name) m.impl(#name, TORCH_BOX(&run<name##_kernel>));
STABLE_TORCH_LIBRARY(rayfuse_simt_bugs, m){
    RAYFUSE_FOR_EACH_BUG(RAYFUSE_DEFINE)} STABLE_TORCH_LIBRARY_IMPL(rayfuse_simt_bugs, CPU, m) {
  RAYFUSE_FOR_EACH_BUG(RAYFUSE_IMPLEMENT)
}

}  // namespace rayfuse
