// The step from tensors to the arguments of composite_rays and its packed form on a GPU, included
// after the kernels of a file.
#pragma once

#include "compositing.h"
#include "registration.h"

namespace rayfuse {

using MaybeTensor = std::optional<Tensor>;

// The element types: f's may be half of the others'.
template <class Call>
void dispatch_pair(const Tensor& w, const MaybeTensor& f, const Call& call) {
  dispatch(w, [&](auto type) {
    if constexpr (std::is_same_v<decltype(type), float>) {
      if (f && is_half(*f)) {
        if (f->scalar_type() == ScalarType::Half) return call(type, half{});
        return call(type, bfloat16{});
      }
    }
    call(type, type);
  });
}

inline Options options_of(const MaybeTensor& f, const MaybeTensor& background, int64_t depth,
                          bool density, bool last_sample) {
  const int64_t C = f ? f->size(-1) : background ? background->size(-1) : 0;
  const int few = f && C <= kFewChannels ? static_cast<int>(C) : 0;
  return {C, static_cast<Depth>(depth), density, last_sample, few, 0, 0, 0};
}

}  // namespace rayfuse
