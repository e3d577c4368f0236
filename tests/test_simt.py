"""The host executor: it finds every planted bug, counts right, and passes what is right."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rayfuse
import simt

pytestmark = pytest.mark.skipif(simt.reason() is not None, reason=str(simt.reason()))

BUGS = Path(__file__).with_name("simt_bugs.cu")
# kernel -> what is found, whatever the order of threads; the statements that the reports name
PLANTED = {
    "missing_barrier": ("race", ["staged[threadIdx.x] = x", "= staged[kThreads - 1"]),
    "missing_warp_barrier": ("race", ["staged[threadIdx.x] = x", "staged[threadIdx.x ^ 1]"]),
    "divergent_barrier": ("divergent barrier", ["< 40) __syncthreads()"]),
    "two_barriers": ("divergent barrier", ["__syncthreads();", "__syncthreads();"]),
    "read_past_the_end": ("access out of bounds", ["x[threadIdx.x + 1]"]),
    "write_past_the_end": ("access out of bounds", ["y[threadIdx.x + 1]"]),
    "write_to_input": ("access out of bounds", ["const_cast"]),
    "misaligned_vector": ("misaligned access", ["float4"]),
    "uninitialised": ("uninitialised read", ["= staged[threadIdx.x]"]),
    "past_dynamic_memory": ("access out of bounds", ["staged[threadIdx.x + 1] = x"]),
    "past_static_memory": ("access out of bounds", ["staged[next] = x"]),
    "wrong_mask": ("warp call with a wrong mask", ["__shfl_xor_sync(kAllLanes, sum, 1)"]),
    "lane_outside_mask": ("warp call with a wrong mask", ["__shfl_xor_sync(0xffff"]),
    "shared_race": ("race", ["sum += x", "sum += x"]),
}


def run_kernel(name, x=None):
    return getattr(torch.ops.rayfuse_simt_bugs, name)(torch.rand(64) if x is None else x)


@pytest.fixture
def executor():
    module = simt.load()
    module.reset()
    yield module
    module.seed(0)
    module.reset()


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_found_and_named(executor, bug):
    kind, statements = PLANTED[bug]
    lines = BUGS.read_text().splitlines()
    for seed in range(12):
        executor.seed(seed)
        with pytest.raises(RuntimeError, match=f"{bug}_kernel: .* in block 0: thread [0-9]+ "):
            run_kernel(bug)
        texts = [text for found, text in executor.take_reports() if found == kind]
        assert texts, f"no {kind} with seed {seed}"
        for text in texts:
            named = [lines[int(n) - 1] for n in re.findall(r"simt_bugs\.cu:(\d+)", text)]
            assert len(named) >= len(statements) or kind == "uninitialised read", text
            assert any(s in line for s in statements for line in named), text


def test_every_bug_of_the_file_is_planted_here():
    kernels = set(re.findall(r"void (\w+)_kernel\(", BUGS.read_text()))
    assert kernels == {*PLANTED, "clean", "strided"}


def test_kernel_without_a_bug_is_clean_in_every_order(executor):
    x = torch.rand(64)
    flipped = x.flip(0).view(2, 32).sum(1, keepdim=True).expand(2, 32).flatten()
    for seed in range(24):
        executor.seed(seed)
        torch.testing.assert_close(run_kernel("clean", x), flipped)
    assert executor.take_reports() == []


def test_counters_see_what_a_launch_moves(executor):
    run_kernel("clean")
    counters = executor.counters()["clean_kernel"]
    assert counters == {
        "launches": 1,
        "blocks": 1,
        "threads": 64,
        "dynamic_bytes": 256,
        "barriers": 1,
        "warp_calls": 10,
        "loads": 64,
        "stores": 64,
        "load_bytes": 256,
        "store_bytes": 256,
        "requests": 4,
        "sectors": 16,
        "ideal_sectors": 16,
    }


def test_strided_load_shows_in_the_sectors(executor):
    run_kernel("strided")
    counters = executor.counters()["strided_kernel"]
    assert counters["load_bytes"] == 256
    # a warp's 32 values lie in 8 sectors instead of 4, for loads; stores are dense
    assert counters["sectors"] == 2 * 8 + 2 * 4
    assert counters["ideal_sectors"] == 16


def test_failed_launch_leaves_the_next_one_alone(executor):
    for _ in range(3):
        with pytest.raises(RuntimeError):
            run_kernel("divergent_barrier")
        run_kernel("clean")


def test_simt_is_never_the_default():
    rayfuse.distortion_loss(torch.tensor([0.0, 1.0]), torch.ones(1))
    assert rayfuse.last_backend() == "cpu"
    assert "simt" not in rayfuse.distortion_loss.op.kernels.available("cpu")


def test_simt_is_a_reason_where_the_tests_have_not_loaded_it():
    code = "import rayfuse; print(rayfuse.backends()['simt'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "host executor of the CUDA kernels is not loaded" in done.stdout


def run_sanitized(code):
    return subprocess.run(
        [sys.executable, "-c", f"import simt; simt.load({str(simt.build('sanitized'))!r});{code}"],
        cwd=Path(__file__).parent,
        env=simt.sanitized_environment(),
        capture_output=True,
        text=True,
    )


# the build takes half a minute an op
sanitized = pytest.mark.slow


@sanitized
@pytest.mark.parametrize(
    "kernel, found",
    [
        ("clean", ""),
        ("read_past_the_end", "heap-buffer-overflow"),
        ("past_static_memory", "index 64 out of bounds"),
    ],
)
def test_sanitized_build_finds_what_the_compiler_watches(kernel, found):
    code = f"import torch; torch.ops.rayfuse_simt_bugs.{kernel}(torch.rand(64)); print('ran')"
    done = run_sanitized(code)
    assert ("ran" in done.stdout) == (not found), done.stderr
    assert found in done.stderr


@sanitized
def test_ops_run_clean_in_the_sanitized_build():
    done = run_sanitized("import simt_sanitized; simt_sanitized.run_all(); print('ran')")
    assert "ran" in done.stdout, done.stderr
    assert "runtime error" not in done.stderr
