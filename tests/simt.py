"""Builds the host executor with all CUDA kernels, as a Python module in build/simt.

`load()` imports it, which registers the ops of backend `simt`. A process that loads the build with
AddressSanitizer and UndefinedBehaviorSanitizer needs `sanitized_environment`.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TORCH = Path(torch.__file__).parent
STABLE_ABI_TARGET = "0x020a000000000000"  # torch 2.10
FLAGS = (
    "-std=c++20 -g -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas"
    " -fno-strict-aliasing"
)
# thread: a call before each access, which the executor answers itself; scalar replacement would
# split the 16-byte ones
KERNELS = {
    "watched": "-O1 -fsanitize=thread,bounds -fno-tree-sra",
    "sanitized": "-O1 -fsanitize=address,undefined",
}
EXECUTOR = {"watched": "-O2", "sanitized": "-O1 -fsanitize=address"}
LINK = {"watched": "", "sanitized": "-fsanitize=address,undefined"}
WRAPPED = (
    "torch_get_const_data_ptr",
    "torch_get_mutable_data_ptr",
    "aoti_torch_create_device_guard",
    "aoti_torch_delete_device_guard",
)
NINJA = """\
rule compile
  command = $cxx -x c++ $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared $flags $in -L$torch/lib -ltorch_cpu -ldl -o $out
"""


def reason():
    """Why the executor cannot be built here, or None."""
    if os.environ.get("RAYFUSE_SIMT") == "0":
        return "the host executor was switched off (RAYFUSE_SIMT=0)"
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return "the host executor's fibers are written for Linux on x86-64"
    for tool in ("g++", "addr2line"):
        if shutil.which(tool) is None:
            return f"the host executor needs {tool}"
    if importlib.util.find_spec("pybind11") is None:
        return "the host executor needs pybind11"
    return None


def build(variant="watched"):
    """The path of the module, built if any of its sources has changed."""
    import pybind11
    from ninja import BIN_DIR

    folder = ROOT / "build" / "simt" / variant
    folder.mkdir(parents=True, exist_ok=True)
    simt = ROOT / "csrc" / "simt"
    torch_flags = f"-isystem $torch/include -DUSE_CUDA -DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}"
    kernel_flags = (
        f"{FLAGS} {KERNELS[variant]} -fno-extern-tls-init -I{simt}/include -I{ROOT}/csrc/cuda"
        f" {torch_flags} -DRAYFUSE_NAMESPACE=rayfuse_simt -DRAYFUSE_DISPATCH_KEY=CPU"
    )
    executor_flags = f"{FLAGS} {EXECUTOR[variant]} -I{simt}/include"
    module_flags = (
        f"{executor_flags} {torch_flags} -isystem {pybind11.get_include()}"
        f" -isystem {sysconfig.get_path('include')}"
    )
    # of an inline function that several files hold the linker takes the first: the executor must
    # not get one that calls it back
    sources = [
        (simt / "executor.cpp", executor_flags),
        (simt / "module.cpp", module_flags),
        *((path, kernel_flags) for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))),
        (ROOT / "tests" / "simt_bugs.cu", kernel_flags),
    ]
    lines = ["cxx = g++", f"torch = {TORCH}", NINJA]
    objects = []
    for source, flags in sources:
        objects.append(f"{source.stem}.o")
        lines += [f"build {objects[-1]}: compile {source}", f"  flags = {flags}"]
    module = folder / "rayfuse_simt.so"
    wraps = " ".join(f"-Wl,--wrap={name}" for name in WRAPPED)
    link = f"{LINK[variant]} {wraps} -Wl,-Bsymbolic"
    lines += [f"build {module}: link {' '.join(objects)}", f"  flags = {link}"]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [str(Path(BIN_DIR) / "ninja"), "-C", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the host executor did not compile:\n{done.stdout}{done.stderr}")
    return module


def load(path=None):
    """The module, imported once: its ops are then in torch.ops.rayfuse_simt."""
    if "rayfuse_simt" not in sys.modules:
        spec = importlib.util.spec_from_file_location("rayfuse_simt", path or build())
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["rayfuse_simt"] = module
    return sys.modules["rayfuse_simt"]


def sanitized_environment():
    """The environment of a process that loads the sanitized build."""
    library = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    # Python and torch leave much behind at the end
    return {
        **os.environ,
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
