"""Every Triton kernel compiled for GPUs that are not there: what the compilers made of it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayfuse.ops import STEMS

SCRIPT = Path(__file__).parent / "gpu_code.py"
PAGE = Path(__file__).parent.parent / "docs" / "gpu.md"
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.fixture(scope="module")
def found():
    """Another process: this one interprets."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--json"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_of_every_op_compiles_for_every_target(found):
    compiled = {(code["kernel"], code["target"]) for code in found["codes"]}
    for stem in STEMS:
        for kernel in (f"{stem}_fwd_kernel", f"{stem}_bwd_kernel"):
            assert {target for name, target in compiled if name == kernel} == TARGETS


def test_no_kernel_spills(found):
    assert [code for code in found["codes"] if code["spills"] or code["stack"]] == []


def test_spills_would_be_seen(found):
    """A kernel that was given too few registers."""
    assert [code["target"] for code in found["starved"]] == ["sm_90", "gfx942"]
    assert all(code["spills"] and code["stack"] for code in found["starved"])


def test_no_index_of_a_program_overflows(found):
    assert all(code["wide_index"] for code in found["codes"])


@pytest.mark.parametrize("inputs, bits", [("fp32, S = 128", 128), ("fp32, S = 100", 32)])
def test_aligned_rows_are_loaded_128_bits_at_a_time(found, inputs, bits):
    loads = {
        code["load"]
        for code in found["codes"]
        if code["inputs"] == inputs and code["target"].startswith("sm_")
    }
    assert loads == {bits}


def test_page_says_what_the_compilers_say(found):
    before_cuda = PAGE.read_text().partition("\n## cuda")[0]
    assert before_cuda == found["page"], "docs/gpu.md is stale: run `make gpu-code`"
