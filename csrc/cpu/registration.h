// The step from tensors to kernels on the CPU, included after the kernels of a file.
#pragma once

#include "rays.h"
#include "../common.h"

#include <stdexcept>
#include <string>

// Every instruction set has a namespace of its own, so that all can be loaded at once.
#define RAYFUSE_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(RAYFUSE_NAMESPACE, CPU, m)

namespace rayfuse {

// Calls f(first ray, last ray + 1) on torch's threads, the first one a multiple of kRays. A thread
// starts for at least 2^14 samples: below that waking it costs more than it saves.
template <class A, class F>
void for_rays(int64_t rays, int64_t samples_per_ray, const F& f) {
  constexpr int64_t K = kRays<A>;
  const int64_t grain = (1 << 14) / K / std::max<int64_t>(samples_per_ray, 1);
  torch::stable::parallel_for(
      0, (rays + K - 1) / K, std::max<int64_t>(grain, 1),
      [&](int64_t begin, int64_t end) { f(begin * K, std::min(end * K, rays)); });
}

// A sum x for each of these rays.
inline Tensor full(const Tensor& like, const std::vector<int64_t>& rays, double x) {
  const Tensor tensor = empty(like, rays, accumulator_dtype(like));
  dispatch(like, [&](auto type) {
    using A = accumulator<decltype(type)>;
    std::fill_n(mutable_data<A>(tensor), tensor.numel(), static_cast<A>(x));
  });
  return tensor;
}

// The sum over all rays, in one order whatever the number of threads.
inline Tensor sum_of_rays(const Tensor& x) {
  const Tensor sum = empty(x, {}, dtype_of(x));
  dispatch(x, [&](auto type) {
    using A = accumulator<decltype(type)>;
    const A* const rays = data<A>(x);
    double sums[8] = {};
    const int64_t R = x.numel(), whole = R / 8 * 8;
    for (int64_t r = 0; r < whole; r += 8) {
      for (int i = 0; i < 8; ++i) sums[i] += rays[r + i];
    }
    for (int64_t r = whole; r < R; ++r) sums[0] += rays[r];
    double total = 0;
    for (const double part : sums) total += part;
    *mutable_data<A>(sum) = static_cast<A>(total);
  });
  return sum;
}

// R rays of S samples each, for kernels that take packed ones as well.
class DenseRays {
 public:
  const int64_t R;

  DenseRays(int64_t R, int64_t S) : R(R), S_(S) {}

  int64_t begin(int64_t r) const { return r * S_; }

  template <class F>
  void for_each_piece(int64_t values, const F& f) const {
    for_rays<float>(R, S_ * values, f);
  }

 private:
  const int64_t S_;
};

// R packed rays with P samples, and how threads share them.
class PackedRays {
 public:
  const int64_t* const offsets;  // [R+1]
  const int64_t R;

  // Here a look at all offsets costs no synchronisation, and wrong ones would lead out of bounds.
  PackedRays(const std::string& op, const Tensor& offsets_, int64_t P,
             const std::string& name = "offsets")
      : offsets(data<int64_t>(offsets_)), R(offsets_.numel() - 1) {
    bool rising = offsets[0] == 0 && offsets[R] == P;
    for (int64_t r = 0; r < R; ++r) rising &= offsets[r] <= offsets[r + 1];
    for (int64_t i = 0; !rising; ++i) {
      const int64_t least = i ? offsets[i - 1] : 0, got = offsets[i];
      if (got < least || got > P || (i == 0 && got != 0) || (i == R && got != P)) {
        throw std::runtime_error(op + ": " + name +
                                 " must rise from 0 to the number of samples, got " +
                                 std::to_string(got) + " at [" + std::to_string(i) + "]");
      }
    }
  }

  int64_t begin(int64_t r) const { return offsets[r]; }

  // Calls f(first ray, last ray + 1) on torch's threads, for about as much work each; rays are not
  // divided.
  template <class F>
  void for_each_piece(const F& f) const {
    for_each_piece(1, f);
  }
  // The same where a sample has so many values.
  template <class F>
  void for_each_piece(int64_t values, const F& f) const {
    torch::stable::parallel_for(
        0, work_before(R, values), 1 << 14,
        [&](int64_t begin, int64_t end) { f(first_from(begin, values), first_from(end, values)); });
  }

 private:
  // A ray costs as much as this many values before it has any.
  static constexpr int64_t kRayWork = 32;

  int64_t work_before(int64_t r, int64_t values) const {
    return offsets[r] * values + r * kRayWork;
  }

  // The first ray that begins at or after so much work.
  int64_t first_from(int64_t work, int64_t values) const {
    int64_t begin = 0, end = R;
    while (begin < end) {
      const int64_t r = begin + (end - begin) / 2;
      if (work_before(r, values) < work) {
        begin = r + 1;
      } else {
        end = r;
      }
    }
    return begin;
  }
};

}  // namespace rayfuse
