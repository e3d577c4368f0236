// The Python module of the executor, and the parts of torch's C interface that it stands in for.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include "executor.h"

// The linker sends the kernels' calls of torch's functions here (-Wl,--wrap): the memory that an op
// takes from its tensors is all that its kernels may touch.
extern "C" {
AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle, const void**);
AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle, void**);

#pragma GCC visibility push(hidden)
static size_t bytes_of(AtenTensorHandle tensor) {
  int64_t count = 0;
  int32_t dtype = 0;
  aoti_torch_get_numel(tensor, &count);
  aoti_torch_get_dtype(tensor, &dtype);
  return count * aoti_torch_dtype_element_size(dtype);
}

AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** out) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, out);
  simt::allow(*out, bytes_of(tensor), false);
  return error;
}
AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** out) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, out);
  simt::allow(*out, bytes_of(tensor), true);
  return error;
}
// an op holds the guard of a device for as long as it runs
AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* out) {
  *out = nullptr;
  simt::forbid_all();
  return 0;
}
AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle) {
  simt::forbid_all();
  return 0;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** out) {
  *out = nullptr;
  return 0;
}
#pragma GCC visibility pop
}

namespace py = pybind11;

PYBIND11_MODULE(rayfuse_simt, m) {
  m.def("seed", &simt::seed, "Draw the orders of blocks and threads from this seed.");
  m.def(
      "counters",
      [] {
        py::dict all;
        for (const auto& [kernel, c] : simt::counters()) {
          py::dict one;
          one["launches"] = c.launches, one["blocks"] = c.blocks, one["threads"] = c.threads;
          one["dynamic_bytes"] = c.dynamic_bytes;
          one["barriers"] = c.barriers, one["warp_calls"] = c.warp_calls;
          one["loads"] = c.loads, one["stores"] = c.stores;
          one["load_bytes"] = c.load_bytes, one["store_bytes"] = c.store_bytes;
          one["requests"] = c.requests, one["sectors"] = c.sectors;
          one["ideal_sectors"] = c.ideal_sectors;
          all[py::str(kernel)] = one;
        }
        return all;
      },
      "What each kernel did since the last reset, by its name.");
  m.def("reset", [] { simt::counters().clear(), simt::take_reports(); });
  m.def(
      "take_reports",
      [] {
        std::vector<std::pair<std::string, std::string>> all;
        for (const auto& report : simt::take_reports()) all.emplace_back(report.kind, report.text);
        return all;
      },
      "(kind, text) of all that was found since the last call.");
}
