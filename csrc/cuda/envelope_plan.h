// The launch of kernels over envelopes, included after the kernels of a file.
#pragma once

#include "envelope.h"
#include "registration.h"

namespace rayfuse {

// The launch of a kernel over envelopes: a few threads own a ray, or a warp, where several rays fit
// on chip, a block a longer one.
template <class T>
struct EnvelopePlan {
  int threads;
  RayBlocks blocks;

  EnvelopePlan(const Tensor& like, int64_t R, int64_t S, int64_t E, bool blurs = false) {
    constexpr int64_t kMostBlocks = 1024;
    const auto bytes_of = [&](int rays) {
      return EnvelopeArrays<T>(Arena{nullptr}, blurs, rays, S, E).bytes;
    };
    // as many rays as fit, of so many threads
    const auto most_rays = [&](int threads) {
      const int whole_warps = threads < kWarp ? kWarp / threads : 1;
      int rays = kBlock / threads;
      while (rays > 0 && bytes_of(rays) > kArenaBytes) rays -= whole_warps;
      return rays;
    };
    const int of_few = std::max(S, E) <= 128 ? most_rays(kFew) : 0, of_warps = most_rays(kWarp);
    threads = of_few >= 12 ? kFew : of_warps >= 4 ? kWarp : kBlock;
    const int rays = threads == kFew ? of_few : threads == kWarp ? of_warps : 1;
    blocks = {R, static_cast<int>(S), static_cast<int>(E), rays, blurs, nullptr, bytes_of(rays)};
    count_ = (R + rays - 1) / rays;
    if (blocks.bytes > kArenaBytes) {
      count_ = std::min(count_, kMostBlocks);
      memory_ = empty(like, {static_cast<int64_t>(count_ * blocks.bytes) / 8},
                      aoti_torch_dtype_float64());
      blocks.global = static_cast<unsigned char*>(memory_.mutable_data_ptr());
    }
  }
  Grid grid(cudaStream_t stream) const {
    return {count_, blocks.rays * threads, blocks.global ? 0 : blocks.bytes, stream};
  }
  // The kernel for the threads that a ray has.
  template <class Kernel>
  Kernel pick(Kernel few, Kernel warp, Kernel block) const {
    return threads == kFew ? few : threads == kWarp ? warp : block;
  }

 private:
  int64_t count_;
  Tensor memory_;
};

}  // namespace rayfuse
