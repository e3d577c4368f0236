// What every registration needs of torch, through its stable C interface alone: allocation, the
// choice of element type, the thread pool. Kernels do not include this file.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace rayfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_half(const Tensor& x) {
  return x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16;
}

// Fresh memory costs a page fault every 4 KiB, more time than most kernels take to fill it: writing
// 12.6 MB of it took 1.9 ms, 0.8 ms with huge pages, 0.06 ms if it was not fresh (2 threads).
inline void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  if (bytes < int64_t{4} << 20) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  // a hint: where it is refused nothing is lost
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// An uninitialised contiguous tensor on the device of `like`. Straight to the allocator: the
// dispatcher costs several times as much.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) {
    strides[i] = stride;
  }
  int32_t device_type;
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                                                         dtype, device_type,
                                                         like.get_device_index(), &out));
  const Tensor tensor(out);
  if (device_type == aoti_torch_device_type_cpu()) {
    prefer_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  }
  return tensor;
}

inline int32_t dtype_of(const Tensor& x) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

// The dtype that sums of x, and losses, have.
inline int32_t accumulator_dtype(const Tensor& x) {
  return is_half(x) ? aoti_torch_dtype_float32() : dtype_of(x);
}

// All sizes but the last `trailing` ones.
inline std::vector<int64_t> leading_sizes(const Tensor& x, int trailing) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end() - trailing};
}

// How many rays x holds.
inline int64_t count_rays(const Tensor& x, int trailing) {
  int64_t rays = 1;
  for (const int64_t size : leading_sizes(x, trailing)) rays *= size;
  return rays;
}

// The gradient of x, uninitialised, or an empty tensor where bit `i` of `needs` is not set.
inline Tensor empty_gradient(const Tensor& x, int64_t needs, int i) {
  const auto sizes = x.sizes();
  return needs >> i & 1 ? empty(x, {sizes.begin(), sizes.end()}, dtype_of(x))
                        : empty(x, {0}, dtype_of(x));
}
// Of an input that may be absent; `like` is one that is not.
inline Tensor empty_gradient(const std::optional<Tensor>& x, const Tensor& like, int64_t needs,
                             int i) {
  return x ? empty_gradient(*x, needs, i) : empty(like, {0}, dtype_of(like));
}

// Calls f with a value of the element type of x; the engine has checked that it is one of these.
// half and bfloat16 are what the kernels, included before, call them.
template <class F>
void dispatch(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(half{});
    case ScalarType::BFloat16:
      return f(bfloat16{});
    default:
      return f(float{});
  }
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
// Null for a tensor that is absent.
template <class T>
const T* data(const std::optional<Tensor>& x) {
  return x ? data<T>(*x) : nullptr;
}

// Null for an empty tensor.
template <class T>
T* mutable_data(const Tensor& x) {
  return x.numel() ? static_cast<T*>(x.mutable_data_ptr()) : nullptr;
}

}  // namespace rayfuse
