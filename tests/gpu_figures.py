"""What compilers made of the GPU kernels: docs/gpu/<stem>.json, and docs/gpu.md written from them.

The figures of an op on a backend carry a fingerprint of all they were made from. `make gpu-code`
measures again what has another one; the quick tests compare fingerprints, and compile a part.
"""

import functools
import hashlib
import importlib
import json
import math
import re
from pathlib import Path

import torch

from rayfuse.ops import STEMS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "gpu.md"
TRITON_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
ARCHS = ("75", "80", "90", "100", "120")
# KiB of shared memory, warps and blocks of a multiprocessor: CUDA programming guide, compute
# capabilities
LIMITS = {
    "75": (64, 32, 16),
    "80": (164, 64, 32),
    "90": (228, 64, 32),
    "100": (228, 64, 32),
    "120": (100, 48, 24),
}
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
# backend -> an op's kernels, and what else decides its figures
KERNELS = {"triton": "triton_kernels/{}.py", "cuda": "csrc/cuda/{}.cu"}
TOOLS = {
    "triton": ["tests/gpu_code.py", "tests/gpu_figures.py"],
    "cuda": ["tests/cuda_code.py", "tests/gpu_figures.py", "tests/simt.py", "csrc/simt/**/*.*"],
}


def contract(stem):
    """An op's test class."""
    module = importlib.import_module(f"test_{stem}")
    specs = ((c, getattr(c, "spec", None)) for c in vars(module).values())
    return next(c for c, spec in specs if getattr(spec, "name", None) == stem)


def label(dtype, sizes):
    return ", ".join([TYPES[dtype], *(f"{name} = {size:,}" for name, size in sizes.items())])


@functools.cache
def included(path):
    """A kernel file of the tree with all that it includes, or imports, of the tree."""
    text = path.read_text()
    names = re.findall(r'^#include "(.+)"', text, re.M) if path.suffix != ".py" else []
    names += [f"{name}.py" for name in re.findall(r"^from \.(\w*) import", text, re.M)]
    return {path}.union(*(included((path.parent / name).resolve()) for name in names))


def fingerprint(stem, backend):
    """Of the op's kernels, its schemas, what they are launched with, and the tools."""
    files = included(ROOT / KERNELS[backend].format(stem))
    files = files.union(*(ROOT.glob(pattern) for pattern in TOOLS[backend]))
    suite = contract(stem)
    found = hashlib.sha256(repr((suite.gpu_sizes, suite.variants[0])).encode())
    for name in (stem, f"{stem}_bwd"):
        found.update(str(getattr(torch.ops.rayfuse, name).default._schema).encode())
    for path in sorted(path for path in files if path.is_file()):
        found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


def read(stem):
    """Backend -> {"from": fingerprint, "by": the compiler's version, rows of figures}."""
    path = _path(stem)
    return json.loads(path.read_text()) if path.exists() else {}


def write(stem, figures):
    # a line for each kernel
    text = json.dumps(figures, sort_keys=True).replace("{", "\n{").lstrip()
    _path(stem).parent.mkdir(exist_ok=True)
    _path(stem).write_text(text + "\n")


def _path(stem):
    return PAGE.parent / "gpu" / f"{stem}.json"


def unexplained_spills(stem, rows):
    """The kernels that use memory of their own for no reason given in the op's test."""
    reasons = contract(stem).gpu_spills
    return [row for row in rows if (row["spills"] or row["stack"]) and row["kernel"] not in reasons]


def page():
    """The text of docs/gpu.md."""
    figures = {stem: read(stem) for stem in STEMS}
    reasons = {
        f"`{kernel}` spills: {reason}"
        for stem in STEMS
        for kernel, reason in contract(stem).gpu_spills.items()
    }
    parts = [_head(), _triton(figures), _cuda(figures), *sorted(reasons)]
    return "\n\n".join(parts) + "\n"


def _head():
    return """\
# GPU kernels

Written by `make gpu-code` from [docs/gpu](gpu), where each op's figures stand with a fingerprint
of what they were made from. The compilers ran without a GPU: nothing here was measured on one."""


def _triton(figures):
    rows = {stem: figures[stem]["triton"]["codes"] for stem in STEMS}
    every = [row for codes in rows.values() for row in codes]
    lines = [
        "## triton",
        "",
        f"triton {_versions(figures, 'triton')}. Each cell: registers a thread, bytes of shared"
        " memory a block, occupancy by",
        "these two, and the widest load. The compiler joins loads where it sees that the rows of an"
        " array start",
        "at multiples of 16.",
        "",
        _worst(every),
        "",
        *_table("kernel", "inputs", *TRITON_TARGETS),
    ]
    cells = {}
    for row in every:
        cells.setdefault((row["kernel"], row["inputs"]), {})[row["target"]] = (
            f"{row['registers']}, {row['shared']} B, {row['occupancy']:.0%}, {row['load']} bit"
        )
    for (kernel, inputs), of in sorted(cells.items()):
        lines.append(_row(f"`{kernel}`", inputs, *(of[target] for target in TRITON_TARGETS)))
    return "\n".join(lines)


def _cuda(figures):
    found = [figures[stem]["cuda"] for stem in STEMS]
    every = [row for op in found for row in op["codes"]]
    lines = [
        "## cuda",
        "",
        f"nvcc {_versions(figures, 'cuda')}. Each cell: registers a thread, and occupancy by"
        " registers and shared memory. Shared memory is",
        "of a block, dynamic and static; sectors/ideal is what the host executor counts on 16 rays:"
        " 32-byte sectors",
        "moved by requests of a warp, over what its bytes would fill.",
        "",
        f"{_worst(every)} Every kernel's widest load: {min(row['load'] for row in every)} bits.",
        "",
        *_table(
            *("kernel", "inputs", "shared", "sectors/ideal"),
            *(f"sm_{arch}" for arch in ARCHS),
        ),
    ]
    at = {(row["kernel"], row["target"]): row for row in every}
    for launch in sorted(
        (launch for op in found for launch in op["launches"]),
        key=lambda launch: (launch["kernel"], launch["inputs"]),
    ):
        name = launch["kernel"]
        codes = [at[name, f"sm_{arch}"] for arch in ARCHS]
        cells = [
            f"{code['registers']}, {_occupancy(code, launch, arch):.0%}"
            for code, arch in zip(codes, ARCHS, strict=True)
        ]
        shared = f"{launch['shared'] + codes[0]['shared']} B"
        ratio = f"{launch['sectors'] / launch['ideal_sectors']:.2f}"
        lines.append(_row(f"`{name}`", launch["inputs"], shared, ratio, *cells))
    return "\n".join(lines)


def _occupancy(code, launch, arch):
    """The part of a multiprocessor's warps that registers and shared memory allow."""
    kib, most_warps, most_blocks = LIMITS[arch]
    warps = launch["threads"] // 32
    # from 8.0 on the system takes 1 KiB of each block
    shared = launch["shared"] + code["shared"] + (1024 if int(arch) >= 80 else 0)
    # 65,536 registers are handed out to warps in units of 256
    of_a_warp = math.ceil(code["registers"] * 32 / 256) * 256
    blocks = min((kib << 10) // max(shared, 1), 65536 // of_a_warp // warps, most_warps // warps)
    return min(blocks, most_blocks) * warps / most_warps


def _versions(figures, backend):
    return ", ".join(sorted({figures[stem][backend]["by"] for stem in STEMS}))


def _worst(rows):
    stack, spills = (max(row[name] for row in rows) for name in ("stack", "spills"))
    return f"Stack: at most {stack} bytes a thread. Spills: at most {spills}."


def _table(*names):
    return _row(*names), "|---" * len(names) + "|"


def _row(*cells):
    return f"| {' | '.join(cells)} |"
