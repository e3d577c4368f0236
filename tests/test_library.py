"""The libraries as files: what they need, their names, and an install without a compiler."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rayfuse import backend

ROOT = Path(__file__).parent.parent
LIBRARIES = [backend.library_path("cpu", isa) for isa in backend.isas()]


def undefined_symbols(library):
    out = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return [line.split()[-1].partition("@")[0] for line in out.stdout.splitlines()]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_library_needs_only_torchs_stable_c_interface(library):
    names = undefined_symbols(library)
    of_torch = [n for n in names if re.match(r"(aoti_)?torch_", n)]
    of_cxx = [n for n in names if re.match(r"_Z|__cxa|__gxx|_Unwind", n)]
    of_libc = set(names) - set(of_torch) - set(of_cxx)
    assert of_torch, "the check has lost its object"
    # at::, c10::, torch:: and pybind11:: mangle to names that carry these words
    assert not [n for n in of_cxx if re.search(r"2at|3c10|5torch|8pybind11", n)]
    assert not [n for n in of_libc if n.startswith(("Py", "_Py", "GOMP", "omp_"))]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_library_exports_nothing_of_its_own(library):
    """Two libraries in one process must not find each other's functions."""
    out = subprocess.run(
        ["nm", "-DC", "--defined-only", library], capture_output=True, text=True, check=True
    )
    ours = {line.split()[-1] for line in out.stdout.splitlines() if "rayfuse" in line}
    # it is called by name, of each library in turn
    assert ours == {"rayfuse_release_memory"}


def test_baseline_library_holds_no_avx():
    out = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", backend.library_path("cpu", "baseline")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "movups" in out.stdout
    assert "ymm" not in out.stdout
    assert "zmm" not in out.stdout


@pytest.mark.parametrize("isa", backend.isas())
def test_exp_log_and_erf_are_right_to_a_unit_and_a_half(isa, tmp_path, monkeypatch):
    """On a grid of all bit patterns, around all powers of two, and where the formulas change."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    build = runpy.run_path(str(ROOT / "setup.py"))
    flags = f"{build['FLAGS']} {build['ISAS'][isa]}".split()
    program = tmp_path / "explog"
    subprocess.run(
        [build["compiler"](), *flags, ROOT / "tests/explog.cpp", "-o", program], check=True
    )
    said = subprocess.run([program, "2999"], capture_output=True, text=True, check=True).stdout
    errors = {name: float(worst) for name, worst, _ in map(str.split, said.splitlines())}
    assert errors.keys() == {
        f"{function}_{type}"
        for function in ("exp", "exp_of_nonpositive", "expm1", "log", "erf")
        for type in ("float", "double")
    }
    assert all(0.5 <= worst < 1.5 for worst in errors.values()), said


@pytest.fixture
def source(tmp_path):
    """What git knows of this tree, in an empty folder."""
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).exists():
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "source" / name)
    return tmp_path / "source"


@pytest.fixture
def one_op(source):
    """With the kernels of one op: what a wheel is made of does not depend on how many there are."""
    for path in [*source.glob("csrc/cpu/*.cpp"), *source.glob("csrc/cuda/*.cu")]:
        if path.stem != "distortion_loss":
            path.unlink()
    return source


def build_wheel(source, **environment):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"],
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel, done.stdout + done.stderr


def test_wheel_is_for_every_python_of_this_platform(one_op):
    wheel, _ = build_wheel(one_op)
    assert re.search(r"-py3-none-(linux|manylinux)\w*\.whl$", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    for library in LIBRARIES:
        assert f"rayfuse/lib/{library.name}" in names
    assert "rayfuse/triton_kernels/__init__.py" in names
    assert "rayfuse/train/report.html.j2" in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"rayfuse"}


def libraries_of(wheel):
    return [Path(n).name for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")]


def test_native_build_holds_the_best_library_of_this_processor(one_op):
    wheel, _ = build_wheel(one_op, RAYFUSE_ISAS="native")
    assert libraries_of(wheel) == [f"librayfuse_cpu.{backend.isas()[-1]}.so"]


def test_unknown_instruction_set_is_one_line(one_op):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build"],
        cwd=one_op,
        env={**os.environ, "RAYFUSE_ISAS": "avx2,mmx"},
        capture_output=True,
        text=True,
    )
    assert done.returncode
    rule = "rayfuse: RAYFUSE_ISAS must be some of native, baseline, avx2, avx512, got 'mmx'"
    assert done.stderr.splitlines()[-1] == rule


def test_without_a_compiler_there_is_one_message_and_a_pure_wheel(source, tmp_path):
    wheel, said = build_wheel(source, CXX=str(tmp_path / "no-such-compiler"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert said.count("a C++ compiler (g++ or clang++) was not found, so the CPU library") == 1
    assert not libraries_of(wheel)


def test_doctor_fits_one_screen_and_names_every_backend():
    done = subprocess.run(
        [sys.executable, "-m", "rayfuse", "doctor"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) <= 30
    for name in (*backend.NAMES, *(library.name for library in LIBRARIES), "toolkit", "torch"):
        assert re.search(rf"^  {re.escape(name)} ", done.stdout, re.M), name


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_doctor_is_silent_where_nobody_reads_on(unbuffered):
    command = [sys.executable, "-m", "rayfuse", "doctor"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, env=env, **pipes) as done:
        done.stdout.close()
        assert (done.stderr.read(), done.wait()) == (b"", 141)
