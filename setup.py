"""Builds the CPU libraries, one per instruction set, and the CUDA library, through ninja.

They use torch's stable ABI and hold no Python symbol, so that one wheel serves every Python and
every torch from 2.10 on. Without a C++ compiler, or without torch to build against, rayfuse
installs without them and runs on its PyTorch references.

RAYFUSE_ISAS=native builds the library of this processor alone, in a third of the time;
RAYFUSE_ISAS=baseline,avx2 builds these.
RAYFUSE_CUDA=1 builds the CUDA library too (half a minute an op), with nvcc from the machine or from
PyPI and any torch, one without CUDA included; RAYFUSE_CUDA=80,90 builds it for these GPUs alone.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
STABLE_ABI_TARGET = "0x020a000000000000"  # torch 2.10
ISAS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS |= {
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c",
    }
# g++ 12 calls the undefined operands in its own AVX-512 header uninitialised
FLAGS = (
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra"
    " -Wno-uninitialized -Wno-maybe-uninitialized"
)
# one of each major version: a GPU runs code of a lower minor version of its own, and newer ones PTX
CUDA_ARCHS = ("75", "80", "90", "100", "120")
CUDA_FLAGS = (
    "-std=c++20 -O3 -Werror all-warnings -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
    # torch declares its CUDA functions under this name alone
    " -DUSE_CUDA -DRAYFUSE_NAMESPACE=rayfuse_cuda -DRAYFUSE_DISPATCH_KEY=CUDA"
)

NINJA = """\
rule precompile
  command = mkdir -p torch.h.gch && $cxx $flags -x c++-header $in -o $out
  description = c++ $out
rule compile
  command = $cxx $flags -include torch.h -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = c++ $out
rule link
  command = $cxx -shared -Wl,-z,defs $in -L$torch/lib -ltorch_cpu -o $out
  description = link $out
rule compile_cuda
  command = $nvcc $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = nvcc $out
# torch's CUDA functions are found when the library is loaded, where torch has CUDA
rule link_cuda
  command = $nvcc -shared -cudart static -Xlinker --exclude-libs=ALL $in -L$torch/lib $
    -ltorch_cpu -o $out
  description = link $out
"""


def torch_folder() -> Path | None:
    """Where torch is installed: an isolated build cannot import it, but can read its files."""
    folders = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    found = (Path(folder) / "torch" for folder in folders if folder)
    return next((torch for torch in found if (torch / "include/torch").is_dir()), None)


def compiler() -> str | None:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((cxx for cxx in candidates if shutil.which(shlex.split(cxx)[0])), None)


def isas_to_build(cxx: str) -> list[str]:
    """The instruction sets that were asked for, all by default."""
    wanted = os.environ.get("RAYFUSE_ISAS", "")
    if wanted != "native":
        isas = wanted.split(",") if wanted else [*ISAS]
        if unknown := set(isas) - set(ISAS):
            names = ", ".join(["native", *ISAS])
            sys.exit(f"rayfuse: RAYFUSE_ISAS must be some of {names}, got {unknown.pop()!r}")
        return isas

    def macros(flags: str) -> set[str]:
        command = [*shlex.split(cxx), *flags.split(), "-dM", "-E", "-x", "c++", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return set(re.findall(r"#define (__[A-Z0-9_]+__) 1$", said, re.M))

    here = macros("-march=native")
    return [isa for isa, flags in ISAS.items() if macros(flags) <= here][-1:]


def nvcc() -> str | None:
    """CUDA's compiler: on the path, in CUDA_HOME, or installed from PyPI (nvidia-cuda-nvcc)."""
    home = os.environ.get("CUDA_HOME")
    found = [path for folder in sys.path for path in Path(folder).glob("nvidia/cu*/bin/nvcc")]
    candidates = ["nvcc", *([f"{home}/bin/nvcc"] if home else []), *map(str, found)]
    return next(filter(None, map(shutil.which, candidates)), None)


def cuda_targets(nvcc: str) -> str:
    """What to compile for: what was asked for, or all that this nvcc knows, and PTX of the last."""
    wanted = os.environ["RAYFUSE_CUDA"]
    said = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = said.stdout.split()
    archs = CUDA_ARCHS if wanted == "1" else wanted.split(",")
    archs = [arch for arch in archs if f"compute_{arch}" in known]
    if not archs:
        sys.exit(f"rayfuse: RAYFUSE_CUDA={wanted}, but {nvcc} knows only {' '.join(known)}")
    codes = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*codes, f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"])


def cuda_lines(library: Path) -> list[str]:
    """The part of build.ninja that makes the CUDA library."""
    compiler = nvcc()
    if compiler is None:
        sys.exit("rayfuse: RAYFUSE_CUDA is set, but nvcc was not found (PyPI: nvidia-cuda-nvcc)")
    flags = (
        f"{CUDA_FLAGS} {cuda_targets(compiler)} -isystem $torch/include"
        f" -DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}"
    )
    lines, objects = [f"nvcc = {compiler}"], []
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        objects.append(f"{source.stem}.cuda.o")
        lines += [f"build {objects[-1]}: compile_cuda {source}", f"  flags = {flags}"]
    return [*lines, f"build {library}: link_cuda {' '.join(objects)}"]


def ninja() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return "ninja"
    return str(Path(BIN_DIR) / "ninja")


def build_libraries(folder: Path) -> list[Path]:
    """Build every library into a folder; none, and one message, where that is not possible."""
    cxx, torch = compiler(), torch_folder()
    if cxx is None or torch is None:
        missing = "a C++ compiler (g++ or clang++)" if cxx is None else "torch>=2.10"
        print(
            f"rayfuse: {missing} was not found, so the CPU library is left out and every op runs"
            " on its PyTorch reference. Install it and install rayfuse again.",
            file=sys.stderr,
        )
        return []
    work = ROOT / "build" / "ninja"
    work.mkdir(parents=True, exist_ok=True)
    lines = [f"cxx = {cxx}", f"torch = {torch}", NINJA]
    libraries: list[Path] = []
    wanted = isas_to_build(cxx)
    for isa, isa_flags in ISAS.items():
        flags = (
            f"{FLAGS} {os.environ.get('CXXFLAGS', '')} {isa_flags} -isystem $torch/include"
            f" -DTORCH_TARGET_VERSION={STABLE_ABI_TARGET} -DRAYFUSE_NAMESPACE=rayfuse_cpu_{isa}"
        )
        # half the time of a small op goes into torch's headers
        lines += [f"build torch.h.gch/{isa}: precompile torch.h", f"  flags = {flags}"]
        objects = []
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            objects.append(f"{source.stem}.{isa}.o")
            lines += [f"build {objects[-1]}: compile {source} | torch.h.gch/{isa}"]
            lines += [f"  flags = {flags}"]
        library = folder.resolve() / f"librayfuse_cpu.{isa}.so"
        lines.append(f"build {library}: link {' '.join(objects)}")
        if isa in wanted:
            libraries.append(library)
    if os.environ.get("RAYFUSE_CUDA", "0") != "0":
        libraries.append(folder.resolve() / "librayfuse_cuda.so")
        lines += cuda_lines(libraries[-1])
    of_torch = re.findall(r"#include <torch/.*>\n", (ROOT / "csrc/common.h").read_text())
    header, text = work / "torch.h", "".join(of_torch)
    if not header.exists() or header.read_text() != text:
        header.write_text(text)
    (work / "build.ninja").write_text("\n".join(lines) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run([ninja(), "-C", work, *libraries]).returncode:
        # not an exception: an editable install would swallow it and go on without the library
        sys.exit("rayfuse: a library did not compile")
    return libraries


class BuildWithLibraries(build_py):
    libraries: list[Path] = []

    def run(self) -> None:
        super().run()
        base = ROOT / "python" if self.editable_mode else Path(self.build_lib)
        self.libraries = build_libraries(base / "rayfuse" / "lib")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *map(str, self.libraries)]


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return compiler() is not None and torch_folder() is not None


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": AnyPythonWheel},
    package_dir={"": "python", "rayfuse.triton_kernels": "triton_kernels"},
    packages=[*find_packages("python"), "rayfuse.triton_kernels"],
    package_data={"rayfuse.train": ["*.j2"]},
)
