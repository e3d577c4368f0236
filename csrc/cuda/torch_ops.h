// Ops of torch between kernels, by its stable C interface.
#pragma once

#include "../common.h"

#include <array>

namespace rayfuse {

// Sorted values and where they were, those that are equal in their order.
inline std::array<Tensor, 2> sort(const Tensor& x) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(x), from(std::optional<bool>(true)), from(int64_t{0}),
                                    from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// Running sums of integers.
inline Tensor cumsum(const Tensor& x) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 3> stack{from(x), from(int64_t{0}),
                                    from(std::optional<ScalarType>(ScalarType::Long))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// The last of some integers, for which the host waits; 0 where there is none.
inline int64_t last_of(const Tensor& x) {
  if (x.numel() == 0) return 0;
  Tensor all = x;
  const Tensor last = torch::stable::narrow(all, 0, x.numel() - 1, 1);
  int64_t value;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_item_int64(last.get(), &value));
  return value;
}

}  // namespace rayfuse
