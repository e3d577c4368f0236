"""The stem law: one op or lookup, one stem, a file of that stem in every folder; no orphans."""

import re
from pathlib import Path

import pytest

import rayfuse
from rayfuse import lookups, ops
from rayfuse.backend import isas
from rayfuse.ops import STEMS

ROOT = Path(__file__).parent.parent
# role -> where an op's file is; a big one grows to <stem>_<part>
ROLES = {
    "spec": "python/rayfuse/ops/{}.py",
    "cpu": "csrc/cpu/{}.cpp",
    "cuda": "csrc/cuda/{}.cu",
    "triton": "triton_kernels/{}.py",
    "test": "tests/test_{}.py",
    "bench": "bench/bench_{}.py",
}
# a lookup has no gradient, and torch stands for triton
LOOKUP_ROLES = {**ROLES, "spec": "python/rayfuse/lookups/{}.py"}
del LOOKUP_ROLES["triton"]
# a role that an op may have: what its CPU and CUDA kernels really share
OPTIONAL = {"math": "csrc/math/{}.h"}
# files of these patterns that belong to no op
SHARED = {
    "tests/test_law.py",
    "tests/test_dims.py",
    "tests/test_op.py",
    "tests/test_backend.py",
    "tests/test_library.py",
    "tests/test_gpu_code.py",
    "tests/test_strict_interpreter.py",
    "tests/test_cuda.py",
    "tests/test_simt.py",
    "tests/test_train.py",
    "tests/test_splat.py",
    "tests/test_objective.py",
    "tests/test_one_pass.py",
    "tests/test_report.py",
    "tests/test_compat_diff_gaussian_rasterization.py",
    "tests/test_compat_f3rm.py",
    "tests/test_compat_gsplat.py",
    "tests/test_compat_nerfacc.py",
    "tests/test_compat_nerfstudio.py",
    "tests/test_compat_torch_efficient_distloss.py",
    "bench/bench_field_losses.py",
    "triton_kernels/__init__.py",
    "triton_kernels/common.py",
    "python/rayfuse/ops/__init__.py",
    "python/rayfuse/lookups/__init__.py",
}


@pytest.mark.parametrize("stem", [*STEMS, *lookups.STEMS])
@pytest.mark.parametrize("role", ROLES)
def test_stem_has_a_file_for_every_role(stem, role):
    path = (ROLES if stem in STEMS else LOOKUP_ROLES).get(role)
    assert path is None or (ROOT / path.format(stem)).exists(), f"{stem} has no {role}: add {path}"


@pytest.mark.parametrize(
    "pattern", sorted({*ROLES.values(), *LOOKUP_ROLES.values(), *OPTIONAL.values()})
)
def test_no_file_without_a_stem(pattern):
    before, after = pattern.split("{}")
    for path in sorted(ROOT.glob(pattern.format("*"))):
        name = path.relative_to(ROOT).as_posix()
        stem = name.removeprefix(before).removesuffix(after)
        stems = (*STEMS, *lookups.STEMS)
        belongs = any(stem == s or stem.startswith(f"{s}_") for s in stems)
        assert belongs or name in SHARED, f"{name} belongs to none of {stems}"


@pytest.mark.parametrize("name", [*ops.__all__, *lookups.__all__])
def test_function_is_public_documented_and_in_the_readme(name):
    assert name in rayfuse.__all__
    public = getattr(rayfuse, name)
    if isinstance(public, type):  # what an op returns: its fields say the rest
        assert public.__doc__
        return
    # what stands on an op may leave the rest to it
    whole = ("Args:", "Returns:", "Raises:", "Source:", "Example:")
    for section in whole if name in (*STEMS, *lookups.STEMS) else ("Example:",):
        assert section in public.__doc__, f"the docstring of {name} has no {section}"
    assert f"`{name}`" in (ROOT / "README.md").read_text(), f"README.md does not list {name}"


@pytest.mark.parametrize("stem", STEMS)
def test_every_library_holds_every_op(stem):
    for isa in isas():
        getattr(rayfuse, stem).op.kernels.choose("cpu", f"cpu.{isa}")


def test_example_in_the_readme_runs():
    """Its own assertion included."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    exec(compile(example, "README.md", "exec"), {})


def test_tests_derive_from_the_contract():
    for stem in STEMS:
        source = (ROOT / ROLES["test"].format(stem)).read_text()
        assert "Contract)" in source, f"test_{stem}.py does not derive from Contract"
