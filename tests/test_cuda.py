"""The CUDA kernels and their library, without a GPU: compiled, taken apart, counted, loaded.

Quick: two ops are compiled; of the others the figures' fingerprints say that they compiled as they
stand here (test_gpu_code.py). The slow tests compile every op.
"""

import functools
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import cuda_code
import gpu_figures
import rayfuse
import simt
from rayfuse import backend
from rayfuse.ops import STEMS
from test_distortion_loss import TestDistortionLoss as Distortion
from test_gpu_code import COMPILED, assert_committed
from test_library import build_wheel, one_op, source, undefined_symbols  # noqa: F401

needs_nvcc = pytest.mark.skipif(cuda_code.reason() is not None, reason=str(cuda_code.reason()))
needs_simt = pytest.mark.skipif(simt.reason() is not None, reason=str(simt.reason()))
each_op = pytest.mark.parametrize("stem", STEMS)
# one of those that docs/gpu has figures of
ARCH = "80"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Op -> its kernels compiled for one GPU: the object file, and the figures of the kernels."""

    @functools.cache
    def compile(stem):
        path = tmp_path_factory.mktemp("objects") / f"{stem}.o"
        return path, cuda_code.compiled(stem, ARCH, path)

    return compile


@needs_nvcc
@pytest.mark.parametrize(
    "stem", [pytest.param(s, marks=() if s in COMPILED else pytest.mark.slow) for s in STEMS]
)
def test_kernels_compile_without_a_warning_to_what_the_figures_say(stem, compiled):
    path, rows = compiled(stem)
    assert {row["kernel"].partition("<")[0] for row in rows} >= {
        f"{stem}_fwd_kernel",
        f"{stem}_bwd_kernel",
    }
    assert gpu_figures.unexplained_spills(stem, rows) == []
    assert_committed(stem, "cuda", "codes", rows, cuda_code.version())
    # and the fingerprint is of all that the compiler read
    words = Path(f"{path}.d").read_text().replace("\\\n", " ").split()
    read = {Path(word).resolve() for word in words if not word.endswith(":")}
    ours = {path for path in read if path.is_relative_to(cuda_code.ROOT / "csrc")}
    assert ours == gpu_figures.included(cuda_code.source(stem))


@needs_nvcc
@each_op
def test_launches_are_what_the_figures_say(stem):
    sizes = gpu_figures.contract(stem).gpu_sizes[0]
    rows = cuda_code.launches(stem, torch.float32, sizes)
    assert_committed(stem, "cuda", "launches", rows, cuda_code.version())


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


def assert_needs_only_torchs_c_interface(binary):
    names = undefined_symbols(binary)
    of_torch = {n for n in names if n.startswith(("aoti_torch_", "torch_"))}
    assert "aoti_torch_get_current_cuda_stream" in of_torch
    # the rest is of the C and C++ libraries: no Python, no at:: or c10::, no dynamic CUDA
    others = [n for n in names if n not in of_torch]
    assert not [n for n in others if n.startswith(("Py", "_Py", "cuda", "cu", "__cuda"))]
    assert not [n for n in others if n.startswith("_Z") and ("2at" in n or "3c10" in n)]


@needs_nvcc
@pytest.mark.parametrize(
    "stems",
    [
        pytest.param(COMPILED, id="of_two_ops"),
        pytest.param(STEMS, id="of_all_ops", marks=pytest.mark.slow),
    ],
)
def test_library_needs_only_torchs_c_interface_and_one_cuda_function(stems, compiled, tmp_path):
    library = tmp_path / "librayfuse_cuda.so"
    cuda_code.link([compiled(stem)[0] for stem in stems], library)
    assert_needs_only_torchs_c_interface(library)

    # it loads where this function exists: here in a library of a test, elsewhere in torch's own
    stub = tmp_path / "stub.so"
    code = "int aoti_torch_get_current_cuda_stream(int i, void** s) { return i + (s != 0); }"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", stub], input=code, text=True, check=True
    )
    ops = [name for stem in stems for name in (stem, f"{stem}_bwd")]
    code = (
        "import ctypes, sys, torch, rayfuse;"
        f"ctypes.CDLL({str(stub)!r}, ctypes.RTLD_GLOBAL);"
        f"torch.ops.load_library({str(library)!r});"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        f"print([op for op in {ops} if not has(f'rayfuse_cuda::{{op}}', 'CUDA')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@needs_nvcc
def test_wheel_with_cuda_holds_its_library(one_op, tmp_path):  # noqa: F811
    wheel, _ = build_wheel(one_op, RAYFUSE_CUDA=ARCH)
    name = "rayfuse/lib/librayfuse_cuda.so"
    library = zipfile.ZipFile(wheel).extract(name, tmp_path)
    assert_needs_only_torchs_c_interface(library)
    exported = subprocess.run(
        ["nm", "-DC", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert "rayfuse" not in exported
    assert "cuda" not in exported


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
