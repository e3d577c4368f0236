// The step from tensors to kernels on a GPU, included after the kernels of a file.
#pragma once

#include "rays.h"
#include "../common.h"

#include <torch/csrc/stable/accelerator.h>

// csrc/simt builds the same files in a namespace of its own, on the CPU's dispatch key.
#define RAYFUSE_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(RAYFUSE_NAMESPACE, RAYFUSE_DISPATCH_KEY, m)

namespace rayfuse {

// The device of a tensor, the current one for as long as this object lives.
class Device {
 public:
  explicit Device(const Tensor& x) : index_(x.get_device_index()), guard_(index_) {}

  // torch's current stream there.
  cudaStream_t stream() const {
    void* stream;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace rayfuse
