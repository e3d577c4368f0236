"""Builds the CPU libraries, one per instruction set, through ninja.

They use torch's stable ABI and hold no Python symbol, so that one wheel serves every Python and
every torch from 2.10 on. Without a C++ compiler, or without torch to build against, rayfuse
installs without them and runs on its PyTorch references.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, setup
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

NINJA = """\
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = c++ $out
rule link
  command = $cxx -shared -Wl,-z,defs $in -L$torch/lib -ltorch_cpu -o $out
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
    libraries = []
    for isa, isa_flags in ISAS.items():
        flags = (
            f"{FLAGS} {os.environ.get('CXXFLAGS', '')} {isa_flags} -isystem $torch/include"
            f" -DTORCH_TARGET_VERSION={STABLE_ABI_TARGET} -DRAYFUSE_NAMESPACE=rayfuse_cpu_{isa}"
        )
        objects = []
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            objects.append(f"{source.stem}.{isa}.o")
            lines += [f"build {objects[-1]}: compile {source}", f"  flags = {flags}"]
        libraries.append(folder.resolve() / f"librayfuse_cpu.{isa}.so")
        lines.append(f"build {libraries[-1]}: link {' '.join(objects)}")
    (work / "build.ninja").write_text("\n".join(lines) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run([ninja(), "-C", str(work)]).returncode:
        # not an exception: an editable install would swallow it and go on without the library
        sys.exit("rayfuse: the CPU library did not compile")
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
    packages=[
        "rayfuse",
        "rayfuse.ops",
        "rayfuse.train",
        "rayfuse.triton_kernels",
    ],
    package_data={"rayfuse.train": ["*.j2"]},
)
