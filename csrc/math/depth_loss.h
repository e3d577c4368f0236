// The forms of a loss of a measured depth, on the CPU and in CUDA.
#pragma once

#include <cstdint>
#include <type_traits>

namespace rayfuse {

// By their places among the choices of the op.
enum class DepthForm : int64_t { ds_nerf, urban, urban_mass };

// Calls f with the form as a constant that templates can take.
template <class F>
void as_form(int64_t form, const F& f) {
  switch (DepthForm{form}) {
    case DepthForm::ds_nerf:
      return f(std::integral_constant<DepthForm, DepthForm::ds_nerf>());
    case DepthForm::urban:
      return f(std::integral_constant<DepthForm, DepthForm::urban>());
    case DepthForm::urban_mass:
      return f(std::integral_constant<DepthForm, DepthForm::urban_mass>());
  }
}

}  // namespace rayfuse
