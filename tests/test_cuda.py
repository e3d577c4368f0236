"""The CUDA kernels and their library, without a GPU: compiled, taken apart, counted, loaded."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

import cuda_code
import rayfuse
import simt
from contract import Contract
from rayfuse import backend
from rayfuse.ops import STEMS
from test_distortion_loss import TestDistortionLoss as Distortion
from test_library import build_wheel, source, undefined_symbols  # noqa: F401

needs_nvcc = pytest.mark.skipif(cuda_code.reason() is not None, reason=str(cuda_code.reason()))
needs_simt = pytest.mark.skipif(simt.reason() is not None, reason=str(simt.reason()))


@needs_nvcc
@pytest.mark.parametrize("arch", cuda_code.ARCHS)
@pytest.mark.parametrize("path", cuda_code.sources(), ids=lambda path: path.stem)
def test_kernels_compile_without_warnings_and_spills(path, arch):
    kernels = cuda_code.compiled(path, arch)
    assert {name.split("<")[0] for name in kernels} == {
        f"{path.stem}_fwd_kernel",
        f"{path.stem}_bwd_kernel",
    }
    for name, resources in kernels.items():
        assert (resources.spills, resources.stack) == (0, 0), name


@needs_nvcc
@pytest.mark.skipif(cuda_code.disassembler() is None, reason="no cuobjdump (triton has one)")
@pytest.mark.parametrize("path", cuda_code.sources(), ids=lambda path: path.stem)
def test_every_kernel_loads_and_stores_128_bits_at_a_time(path):
    for name, resources in cuda_code.compiled(path, "80").items():
        assert resources.load == 128, name
        assert resources.store == 128 or "_fwd_" in name, name


@needs_simt
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("S", [32, 33, 39, 47, 100, 128, 257, 511, 512, 1279, 65536])
def test_memory_moves_once_and_in_whole_sectors(S, dtype):
    suite, rays = Distortion(), 16 if S < 60000 else 2
    t, w = suite.inputs((rays,), dtype, S=S)
    counters = cuda_code.moved(suite, dtype, {"S": S}, rays)
    assert len(counters) == 2
    per_ray = rays * (8 if dtype == torch.float64 else 4)
    inputs = t.nbytes + w.nbytes
    for kernel, found in counters.items():
        assert found["launches"] == 1
        assert found["sectors"] <= 1.1 * found["ideal_sectors"], kernel
        read, written = (inputs, per_ray) if "_fwd_" in kernel else (inputs + per_ray, inputs)
        # long rays are read twice by the backward, with a few values around each tile
        passes = 2 if S > 60000 and "_bwd_" in kernel else 1
        assert read <= found["load_bytes"] <= 1.01 * passes * read, kernel
        assert written <= found["store_bytes"] <= 1.01 * written, kernel
        # and no sector moves twice, wherever rays begin
        assert 32 * found["sectors"] <= 1.1 * (found["load_bytes"] + found["store_bytes"]), kernel


@needs_nvcc
@needs_simt
@pytest.mark.skipif(cuda_code.disassembler() is None, reason="no cuobjdump (triton has one)")
def test_page_says_what_nvcc_and_the_executor_say():
    page = (cuda_code.ROOT / "docs" / "gpu.md").read_text()
    section = "## cuda" + page.partition("## cuda")[2]
    written_by = re.search(r"nvcc (\d+\.\d+\.\d+)", section).group(1)
    if written_by != cuda_code.version():
        pytest.skip(f"the page was written with nvcc {written_by}, here is {cuda_code.version()}")
    for stem in STEMS:
        importlib.import_module(f"test_{stem}")
    contracts = [contract() for contract in Contract.__subclasses__()]
    assert section == cuda_code.section(contracts), "docs/gpu.md is stale: run `make gpu-code`"


@needs_nvcc
def test_library_needs_only_torchs_c_interface_and_one_cuda_function(source, tmp_path):  # noqa: F811
    wheel, _ = build_wheel(source, RAYFUSE_CUDA="80")
    name = "rayfuse/lib/librayfuse_cuda.so"
    library = zipfile.ZipFile(wheel).extract(name, tmp_path)
    names = undefined_symbols(library)
    of_torch = {n for n in names if n.startswith(("aoti_torch_", "torch_"))}
    assert "aoti_torch_get_current_cuda_stream" in of_torch
    # the rest is of the C and C++ libraries: no Python, no at:: or c10::, no dynamic CUDA
    others = [n for n in names if n not in of_torch]
    assert not [n for n in others if n.startswith(("Py", "_Py", "cuda", "cu", "__cuda"))]
    assert not [n for n in others if n.startswith("_Z") and ("2at" in n or "3c10" in n)]
    exported = subprocess.run(
        ["nm", "-DC", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert "rayfuse" not in exported
    assert "cuda" not in exported

    # it loads where this function exists: here in a library of a test, elsewhere in torch's own
    stub = tmp_path / "stub.so"
    code = "int aoti_torch_get_current_cuda_stream(int i, void** s) { return i + (s != 0); }"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", stub], input=code, text=True, check=True
    )
    code = (
        "import ctypes, sys, torch, rayfuse;"
        f"ctypes.CDLL({str(stub)!r}, ctypes.RTLD_GLOBAL);"
        f"torch.ops.load_library({library!r});"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "ops = ('distortion_loss', 'distortion_loss_bwd');"
        "print([has(f'rayfuse_cuda::{op}', 'CUDA') for op in ops])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[True, True]", done.stderr


def test_library_that_was_asked_for_without_nvcc_is_an_error(source, tmp_path):  # noqa: F811
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"],
        cwd=source,
        env={**os.environ, "RAYFUSE_CUDA": "1", "PATH": _path_without_nvcc(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "RAYFUSE_CUDA is set, but nvcc was not found" in done.stderr


def _path_without_nvcc(folder):
    """A folder of links to what a build needs."""
    for tool in ("g++", "ld", "as", "sh"):
        (folder / tool).symlink_to(shutil.which(tool))
    return str(folder)


def test_cuda_is_a_reason_where_torch_sees_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU")
    assert rayfuse.backends()["cuda"] == "torch sees no CUDA GPU"
    assert backend.library_path("cuda").name == "librayfuse_cuda.so"
