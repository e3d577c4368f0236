"""`rayfuse doctor`: one screen that says what runs here, and why the rest does not."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import rayfuse

from . import backend


def main() -> int:
    """Print the report; 0 if the CPU library runs, 1 if only the references do."""
    for title, rows in _sections():
        print(title)
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"  {name:{width}}  {value}")
    return 0 if backend.reason("cpu") is None else 1


def _sections() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    yield (
        "versions",
        [
            ("rayfuse", f"{rayfuse.__version__} in {Path(rayfuse.__file__).parent}"),
            ("python", f"{platform.python_version()} at {sys.executable}"),
            ("torch", f"{torch.__version__}, built for {_built_for()}"),
            ("triton", _version("triton")),
        ],
    )
    yield (
        "processor",
        [
            ("model", _model()),
            ("torch uses", torch.backends.cpu.get_cpu_capability()),
            ("rayfuse uses", backend.isa() or "no instruction set: the library is not there"),
            ("threads", str(torch.get_num_threads())),
        ],
    )
    yield "backends", [*rayfuse.backends().items()]
    libraries = sorted(backend.LIBRARY_FOLDER.glob("*.so"))
    yield (
        f"libraries in {backend.LIBRARY_FOLDER}",
        [(path.name, f"{path.stat().st_size / 1024:.0f} KiB") for path in libraries]
        or [("none", "every op runs on its PyTorch reference")],
    )
    yield "GPU", [("toolkit", _toolkit()), ("device", _device())]


def _built_for() -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"HIP {torch.version.hip}" if torch.version.hip else "CPU"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _toolkit() -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "no nvcc on the path (needed only to build the CUDA library)"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    return f"CUDA {found.group(1) if found else 'of unknown version'} at {nvcc}"


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "torch.cuda.is_available() is False"
