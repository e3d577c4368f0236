// The launch of kernels over envelopes, included after the kernels of a file.
#pragma once

#include "envelope.h"
#include "registration.h"

namespace rayfuse {

// The launch of a kernel over envelopes: a warp owns a ray where several fit on chip, a block a
// longer one.
template <class T>
struct EnvelopePlan {
  bool warps;
  RayBlocks blocks;

  EnvelopePlan(const Tensor& like, int64_t R, int64_t S, int64_t E) {
    constexpr int kMostRays = kBlock / kWarp;
    constexpr int64_t kMostBlocks = 1024;
    const auto bytes_of = [&](int rays) {
      return EnvelopeArrays<T>(Arena{nullptr}, rays, S, E).bytes;
    };
    int rays = kMostRays;
    while (rays > 1 && bytes_of(rays) > kArenaBytes) --rays;
    warps = rays >= kMostRays / 2;
    if (!warps) rays = 1;
    blocks = {R, static_cast<int>(S), static_cast<int>(E), rays, nullptr, bytes_of(rays)};
    count_ = (R + rays - 1) / rays;
    if (blocks.bytes > kArenaBytes) {
      count_ = std::min(count_, kMostBlocks);
      memory_ = empty(like, {static_cast<int64_t>(count_ * blocks.bytes) / 8},
                      aoti_torch_dtype_float64());
      blocks.global = static_cast<unsigned char*>(memory_.mutable_data_ptr());
    }
  }
  Grid grid(cudaStream_t stream) const {
    return {count_, warps ? blocks.rays * kWarp : kBlock, blocks.global ? 0 : blocks.bytes, stream};
  }

 private:
  int64_t count_;
  Tensor memory_;
};

}  // namespace rayfuse
