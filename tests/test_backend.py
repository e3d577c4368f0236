"""The choice of a backend: forcing one, the reasons, the environment, and what is not there."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import types

import pytest
import torch

import rayfuse
from conftest import BACKENDS
from rayfuse import backend

ARGS = torch.tensor([0.0, 0.5, 1.0]), torch.ones(2)


def run_python(code, **environment):
    """A fresh process: what is decided at import and at first use."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


LAST = (
    "import torch, rayfuse;"
    "rayfuse.distortion_loss(torch.tensor([0.0, 1.0]), torch.ones(1));"
    "print(rayfuse.last_backend(), rayfuse.backend.library_namespace('cpu'))"
)


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_is_tested_here(name):
    """One skip, with its reason, for each backend that no contract runs on."""
    if backend.reason(name):
        pytest.skip(f"{name} is not tested here: {backend.reason(name)}")
    assert name in (*rayfuse.backends(), *(f"cpu.{isa}" for isa in backend.isas()))


def test_this_machine_runs_the_cpu_library():
    """Without it half of this suite would test the reference against itself."""
    assert rayfuse.backends()["cpu"] == "available"
    assert backend.isas()[0] == "baseline"


def test_default_order_takes_the_library_first():
    rayfuse.distortion_loss(*ARGS)
    assert rayfuse.last_backend() == "cpu"


def test_use_backend_restores_what_was_before():
    with rayfuse.use_backend("ref"):
        with rayfuse.use_backend("cpu"):
            rayfuse.distortion_loss(*ARGS)
            assert rayfuse.last_backend() == "cpu"
        rayfuse.distortion_loss(*ARGS)
        assert rayfuse.last_backend() == "ref"
    rayfuse.distortion_loss(*ARGS)
    assert rayfuse.last_backend() == "cpu"


def test_use_backend_is_a_setter_of_this_thread_alone():
    before = rayfuse.use_backend("ref")
    try:
        seen = []

        def other():
            rayfuse.distortion_loss(*ARGS)
            seen.append(rayfuse.last_backend())

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        rayfuse.distortion_loss(*ARGS)
        assert (seen, rayfuse.last_backend()) == (["cpu"], "ref")
    finally:
        before.__exit__()


def test_unknown_backend_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"use_backend: name must be one of ref, cpu, .*'gpu'"):
        rayfuse.use_backend("gpu")


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_forced_backend_that_cannot_run_raises_and_never_falls_through(name):
    code = "import torch, rayfuse;rayfuse.distortion_loss(torch.tensor([0.0, 1.0]), torch.ones(1));"
    # triton runs on these tensors where it interprets its kernels, as in this process
    error = run_python(code, RAYFUSE_BACKEND=name, TRITON_INTERPRET="0").stderr
    message = f"distortion_loss: backend '{name}' is not available on cpu: .*; available: cpu, ref"
    assert re.search(f"rayfuse.backend.BackendError: {message}", error), error


def test_triton_launches_on_the_device_of_its_tensors(monkeypatch):
    """Not on the current one, which triton takes by itself."""
    current = []

    @contextlib.contextmanager
    def on(device):
        current.append(device)
        yield
        current.pop()

    module = types.SimpleNamespace(device=on)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    kernel = backend._on_its_device(lambda x: [*current])
    assert kernel(torch.empty(0, device="meta")) == [torch.device("meta")]
    assert kernel(torch.empty(0)) == []


def test_environment_forces_a_backend():
    assert run_python(LAST, RAYFUSE_BACKEND="ref").stdout.startswith("ref ")


def test_environment_with_an_unknown_backend_fails_at_import():
    error = run_python("import rayfuse", RAYFUSE_BACKEND="gpu").stderr
    assert "RAYFUSE_BACKEND must be one of ref, cpu" in error


@pytest.mark.parametrize("isa", backend.isas())
def test_environment_forces_an_instruction_set(isa):
    assert run_python(LAST, RAYFUSE_ISA=isa).stdout.split() == ["cpu", f"rayfuse_cpu_{isa}"]


def test_instruction_set_that_is_not_there_is_a_reason_not_a_crash():
    out = run_python("import rayfuse; print(rayfuse.backends()['cpu'])", RAYFUSE_ISA="mmx").stdout
    assert out.startswith("instruction set 'mmx' is not in this build or processor (usable: ")


def test_processor_without_avx_gets_the_baseline():
    assert run_python(LAST, ATEN_CPU_CAPABILITY="default").stdout.split() == [
        "cpu",
        "rayfuse_cpu_baseline",
    ]


def library_folder(path):
    return (
        "import pathlib; from rayfuse import backend;"
        f"backend.LIBRARY_FOLDER = pathlib.Path({str(path)!r});"
    )


def test_without_the_library_every_op_runs_on_its_reference(tmp_path):
    out = run_python(library_folder(tmp_path) + LAST + "; print(rayfuse.backends()['cpu'])").stdout
    assert re.match(r"ref .*\nno library in .*: there was no C\+\+ compiler", out)


def test_library_that_does_not_load_is_a_reason(tmp_path):
    (tmp_path / "librayfuse_cpu.baseline.so").write_text("not a library")
    out = run_python(library_folder(tmp_path) + LAST + "; print(rayfuse.backends()['cpu'])").stdout
    assert out.startswith("ref ")
    assert "librayfuse_cpu.baseline.so does not load: " in out


def test_import_takes_torch_alone():
    """Extras must not be needed, nor loaded, by `import rayfuse`."""
    code = (
        "import sys, torch; before = {m.partition('.')[0] for m in sys.modules};"
        "import rayfuse; after = {m.partition('.')[0] for m in sys.modules};"
        "print(sorted(after - before - set(sys.stdlib_module_names)))"
    )
    assert run_python(code).stdout.strip() in (
        "['rayfuse']",
        "['__editable___rayfuse_0_1_0_finder', 'rayfuse']",
    )


def test_shapes_that_never_repeat_do_not_fill_the_memory():
    spec = rayfuse.distortion_loss.op
    for S in range(1, 1100):
        spec._check_once([torch.empty(S + 1), torch.empty(S)])
    assert 0 < len(spec._passed) <= 1024


def test_debug_by_environment():
    code = "import torch, rayfuse;rayfuse.distortion_loss(torch.tensor([1.0, 0.0]), torch.ones(1))"
    assert "t must be finite and not decrease" in run_python(code, RAYFUSE_DEBUG="1").stderr
    assert run_python(code).returncode == 0
