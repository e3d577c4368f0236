"""What compilers made of the GPU kernels, for GPUs that are not there: docs/gpu is true and clean.

Quick: the figures are of this tree by their fingerprints, and those of two ops are made again here
in part. Slow: all of them.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cuda_code
import gpu_figures
import rayfuse
from rayfuse.ops import STEMS

each_op = pytest.mark.parametrize("stem", STEMS)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
# what the quick tests compile: dense rays and packed ones
COMPILED = ("distortion_loss", "packed_ray_weights")
TARGETS = {
    "triton": gpu_figures.TRITON_TARGETS,
    "cuda": [f"sm_{arch}" for arch in gpu_figures.ARCHS],
}


@each_op
@pytest.mark.parametrize("backend", TARGETS)
def test_figures_are_of_this_tree(stem, backend):
    made_from = gpu_figures.read(stem).get(backend, {}).get("from")
    stale = f"docs/gpu/{stem}.json is stale: run `make gpu-code`"
    assert made_from == gpu_figures.fingerprint(stem, backend), stale


def test_page_says_what_the_figures_say():
    assert gpu_figures.PAGE.read_text() == gpu_figures.page(), "run `make gpu-code`"


@each_op
@pytest.mark.parametrize("backend", TARGETS)
def test_every_kernel_was_compiled_for_every_target_and_none_spills(stem, backend):
    rows = gpu_figures.read(stem)[backend]["codes"]
    for direction in ("fwd", "bwd"):
        name = f"{stem}_{direction}_kernel"
        targets = {row["target"] for row in rows if row["kernel"].partition("<")[0] == name}
        assert targets == set(TARGETS[backend])
    assert gpu_figures.unexplained_spills(stem, rows) == []


@each_op
def test_every_kernel_was_compiled_at_every_size_and_type(stem):
    contract, figures = gpu_figures.contract(stem), gpu_figures.read(stem)
    labels = {
        gpu_figures.label(dtype, sizes)
        for dtype in gpu_figures.TYPES
        for sizes in contract.gpu_sizes
    }
    assert labels, f"{contract.__name__} has no gpu_sizes"
    assert {row["inputs"] for row in figures["triton"]["codes"]} == labels
    assert {row["inputs"] for row in figures["cuda"]["launches"]} == labels


@each_op
def test_no_index_of_a_program_overflows(stem):
    assert all(row["wide_index"] for row in gpu_figures.read(stem)["triton"]["codes"])


@pytest.mark.parametrize("inputs, bits", [("fp32, S = 128", 128), ("fp32, S = 100", 32)])
def test_aligned_rows_are_loaded_128_bits_at_a_time(inputs, bits):
    loads = {
        row["load"]
        for row in gpu_figures.read("distortion_loss")["triton"]["codes"]
        if row["inputs"] == inputs and row["target"].startswith("sm_")
    }
    assert loads == {bits}


def test_fingerprint_is_of_all_that_decides(monkeypatch):
    kernels = gpu_figures.ROOT / gpu_figures.KERNELS["triton"].format("distortion_loss")
    names = {path.name for path in gpu_figures.included(kernels)}
    assert names == {"distortion_loss.py", "common.py"}
    before = gpu_figures.fingerprint("distortion_loss", "triton")
    assert before == gpu_figures.fingerprint("distortion_loss", "triton")
    read, files = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: files.append(path.name) or read(path))
    monkeypatch.setattr(gpu_figures.contract("distortion_loss"), "gpu_sizes", ({"S": 64},))
    assert before != gpu_figures.fingerprint("distortion_loss", "triton")
    assert {*files} == {*names, "gpu_code.py", "gpu_figures.py"}
    files.clear()
    gpu_figures.fingerprint("distortion_loss", "cuda")
    assert {"rays.h", "accumulator.h", "cuda_code.py", "simt.py", "executor.cpp"} <= {*files}


@each_op
def test_every_cuda_kernel_moves_rows_128_bits_at_a_time(stem):
    if not any(array.leading for array in getattr(rayfuse, stem).op.signature.inputs):
        pytest.skip("no rows: packed rays begin anywhere")
    for row in gpu_figures.read(stem)["cuda"]["codes"]:
        if row["kernel"].startswith("project_gaussians_bwd_cameras_kernel"):
            continue  # it adds up columns: neighbours read neighbours
        # of features a thread owns four channels of any type, so that halves add up like floats
        features = stem in ("render_features", "feature_distillation_loss")
        width = 64 if features and re.search("half|bfloat16", row["kernel"]) else 128
        assert row["load"] >= width, row
        assert row["store"] >= width or "_fwd_" in row["kernel"], row


def measured(part, stems=STEMS):
    """Another process: this one interprets triton's kernels."""
    code = f"import gpu_code; gpu_code.STEMS = {tuple(stems)}; gpu_code.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--json", part],
        cwd=gpu_figures.ROOT / "tests",
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_committed(stem, backend, kind, rows, by):
    """The figures have these rows, unless another compiler made them."""
    figures = gpu_figures.read(stem)[backend]
    if figures["by"] != by:
        pytest.skip(f"docs/gpu/{stem}.json was made by {figures['by']}, here is {by}")
    assert [row for row in rows if row not in figures[kind]] == []


@needs_triton
def test_triton_kernels_compile_to_what_the_figures_say():
    found = measured("quick", COMPILED)
    assert found["triton"].keys() == {*COMPILED}
    for stem, figures in found["triton"].items():
        assert gpu_figures.unexplained_spills(stem, figures["codes"]) == []
        assert_committed(stem, "triton", "codes", figures["codes"], figures["by"])
    # and a kernel that was given too few registers shows its spills
    assert [row["target"] for row in found["starved"]] == ["sm_90", "gfx942"]
    assert all(row["spills"] and row["stack"] for row in found["starved"])


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(cuda_code.reason() is not None, reason=str(cuda_code.reason()))
def test_every_figure_is_what_is_measured_here():
    for backend, of_ops in measured("all").items():
        for stem, figures in of_ops.items():
            committed = gpu_figures.read(stem)[backend]
            for kind in figures.keys() - {"by"}:
                assert_committed(stem, backend, kind, figures[kind], figures["by"])
                assert len(figures[kind]) == len(committed[kind])


@needs_triton
def test_only_the_compiler_of_nvidia_is_asked_to_bound_registers(monkeypatch):
    from rayfuse.triton_kernels.common import bounded

    x = torch.zeros(())
    assert bounded(96, x) == {"maxnreg": 96}
    # to other compilers the option is an error
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert bounded(96, x) == {}


def gpu_sh(*arguments):
    """bench/gpu.sh where no GPU is seen."""
    return subprocess.run(
        [gpu_figures.ROOT / "bench" / "gpu.sh", *arguments],
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def test_measuring_without_a_gpu_stops_with_one_line():
    done = gpu_sh()
    assert done.returncode == 1
    assert done.stderr.startswith("bench/gpu.sh: torch sees no CUDA GPU")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(
    importlib.util.find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed"
)
def test_measuring_on_a_gpu_is_rehearsed_from_the_first_test_to_the_page():
    done = gpu_sh("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    page = done.stdout.partition("# Results on rehearsal")[2]
    assert "No number on this page is a result." in " ".join(page.split())
    assert "Measured on: gpu none: a rehearsal" in page
    for stem in STEMS:
        for backend in ("simt", "triton"):
            assert f"| `{stem}` | {backend} | 1 | 0 | 0 |" in page
        assert f"## `{stem}`\n" in page
    assert page.rstrip().endswith("rehearsed, no result: all is well")
