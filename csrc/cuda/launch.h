// The one way to start a kernel: plain C++, so that csrc/simt can compile the file as well.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace rayfuse {

// All dynamic shared memory has this name and type; kernels cut it into arrays.
extern __shared__ __align__(16) unsigned char shared_memory[];

// What every device gives a block without being asked.
constexpr size_t kSharedBytes = 48 << 10;

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
  cudaStream_t stream;
};

// Starts kernel(args...) unless there is nothing to do.
template <class... P>
void launch(const Grid& grid, void (*kernel)(P...), std::type_identity_t<P>... args) {
  if (grid.blocks == 0) return;
  if (grid.blocks >= int64_t{1} << 31) throw std::runtime_error("more than 2^31 - 1 blocks");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = grid.stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace rayfuse
