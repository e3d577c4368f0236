"""Backends and element types to test, and the summary of which backends ran."""

import importlib.util
import os
from collections import Counter

import pytest
import torch

import rayfuse
import simt
from rayfuse import backend

# every instruction set of the CPU library is a backend of its own here
BACKENDS = ("ref", *(f"cpu.{isa}" for isa in backend.ISAS), "cuda", "simt", "triton")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# without a GPU triton's kernels are interpreted: asked for before anything imports triton
if not (torch.cuda.is_available() or torch.xpu.is_available()):
    os.environ.setdefault("TRITON_INTERPRET", "1")
if backend.interpreting() and importlib.util.find_spec("triton"):
    importlib.import_module("strict_interpreter").install()
# GPU kernels that run on the CPU here: as many rays as elsewhere would take minutes
EMULATED = {"simt", "triton"} if backend.interpreting() else {"simt"}
if simt.reason() is None:
    simt.load()

# where the quick suite tests the engine, which is the same for all: once, and on a GPU
ENGINE_BACKENDS = {f"cpu.{backend.isas()[-1]}" if backend.isas() else "ref", "cuda", "triton"}
ENGINE_BACKENDS -= EMULATED

_ran: Counter[str] = Counter()


def slow_tests_run(config):
    return "slow" in (config.option.markexpr or "")


@pytest.fixture(scope="session")
def thorough(request):
    """Whether all cases are wanted of a test that the quick suite runs with some."""
    return slow_tests_run(request.config)


def pytest_collection_modifyitems(config, items):
    if slow_tests_run(config):
        return
    for item in items:
        elsewhere = "engine" in item.keywords and not (
            item.cls.engine_on_every_backend
            or item.callspec.params["forced_backend"] in ENGINE_BACKENDS
        )
        if elsewhere or "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run by `make test-all`"))


@pytest.fixture(params=[name for name in BACKENDS if backend.reason(name) is None])
def forced_backend(request, record_property):
    """Each backend that can run here in turn, forced; test_backend.py skips the others by name."""
    record_property("backend", request.param)
    with rayfuse.use_backend(request.param):
        yield request.param


def pytest_runtest_logreport(report):
    # the reports of other processes arrive here too
    if report.when == "call" and report.passed:
        _ran.update(value for name, value in report.user_properties if name == "backend")


def device_of(name):
    """The device whose tensors a backend is tested with here."""
    if name in EMULATED or name not in ("cuda", "triton"):
        return "cpu"
    return "cuda" if name == "cuda" or torch.cuda.is_available() else "xpu"


@pytest.fixture
def device(forced_backend):
    return device_of(forced_backend)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("backends")
    for name in BACKENDS:
        ran = f"{_ran[name]} tests" if _ran[name] else "none of these tests"
        available = "available, emulated on the CPU" if name in EMULATED else "available"
        terminalreporter.write_line(f"{name:14} {ran:22} {backend.reason(name) or available}")
