"""What compilers make of the GPU kernels, found without a GPU: this script writes docs/gpu.

It compiles what has changed since (gpu_figures.py). The launches are those of each op's own `fwd`
and `bwd`, recorded instead of run. A process in which triton interprets its kernels cannot compile
them, so the tests run this one beside theirs.
"""

import argparse
import dataclasses
import importlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

# before triton is imported, and before the tests' conftest asks for the interpreter
os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import cuda_code
import gpu_figures
from contract import Contract, as_tuple
from gpu_figures import TYPES
from rayfuse.ops import STEMS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes of shared memory of a multiprocessor: CUDA programming guide, compute capabilities; and of
# a compute unit: CDNA 3 ISA
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "gfx942": 64 << 10}
# what a kernel's signature calls what is behind a pointer
POINTED_AT = {**TYPES, torch.int32: "i32", torch.int64: "i64"}


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    inputs: str
    arguments: dict[str, Any]
    options: dict[str, Any]

    def code(self, target: str, **options: Any) -> dict[str, Any]:
        """The kernel as it comes out for one target."""
        compiled = triton.compile(
            self._source(), target=TARGETS[target], options={**self.options, **options}
        )
        warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
        read = _nvidia if "cubin" in compiled.asm else _amd
        return {
            "kernel": self.kernel.__name__,
            "inputs": self.inputs,
            "target": target,
            "shared": shared,  # bytes a block
            # the program's index is made 64 bits wide before it is used
            "wide_index": _is_widened(compiled.asm["ttir"]),
            **read(compiled.asm, warps, SHARED[target] // (shared + 1024)),
        }

    def _source(self) -> ASTSource:
        """As the launcher sees it: multiples of 16 and ones are part of an argument's type."""
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            divisible = False
            if isinstance(value, torch.Tensor):
                kind, divisible = "*" + POINTED_AT[value.dtype], value.data_ptr() % 16 == 0
            elif parameter.is_constexpr or value is None or value == 1:
                kind, constants[(i,)] = "constexpr", value
            elif isinstance(value, float):
                kind = "fp32"
            else:
                kind, divisible = "i32" if value < 1 << 31 else "i64", value % 16 == 0
            signature[parameter.name] = kind
            if divisible:
                attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)


def _is_widened(ttir: str) -> bool:
    (index,) = re.findall(r"(%\S+) = tt\.get_program_id x", ttir)
    uses = re.findall(rf"= (.*{re.escape(index)}\b.*) loc", ttir)
    return uses == [f"arith.extsi {index} : i32 to i64"]


def _nvidia(asm: Any, warps: int, blocks: int) -> dict[str, Any]:
    """`blocks` fit into shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, option, file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    # 65,536 registers are handed out to warps in units of 256; 64 warps and 32 blocks fit
    of_a_warp = math.ceil(registers * 32 / 256) * 256
    blocks = min(blocks, 65536 // of_a_warp // warps, 64 // warps, 32)
    return {
        "registers": registers,  # a thread
        "stack": stack,  # bytes a thread
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),  # instructions
        # bits of the widest one
        "load": max(int(bits or 32) for bits in re.findall(r"\bLDG\.E(?:\.U?(\d+))?", sass)),
        "occupancy": blocks * warps / 64,  # of the warps that a multiprocessor can hold
    }


def _amd(asm: Any, warps: int, blocks: int) -> dict[str, Any]:
    text = asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", text).group(1))

    # waves of a SIMD by its registers; 4 SIMDs hold 8 each
    waves = min(4 * number("; Occupancy"), blocks * warps, 32)
    return {
        "registers": number(r"\.vgpr_count"),
        "stack": number(r"\.private_segment_fixed_size"),
        # registers; scalar ones without room go to lanes of vector registers, not to memory
        "spills": number(r"\.vgpr_spill_count"),
        "load": max(
            32 * int(words or 1) if kind == "dword" else 16
            for kind, words in re.findall(
                r"\b(?:global|buffer)_load_(dword|[us]short)(?:x(\d))?", text
            )
        ),
        "occupancy": waves / 32,
    }


def launches(contract: Contract, dtype: torch.dtype, sizes: dict[str, int]) -> list[Launch]:
    """What an op's Triton kernels are launched with, forward and backward."""
    kernels = importlib.import_module(f"rayfuse.triton_kernels.{contract.spec.name}")
    text = gpu_figures.label(dtype, sizes)
    found = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        arguments |= {k: named.pop(k) for k in [*named] if k in kernel.arg_names}
        found.append(Launch(kernel, text, arguments, named))

    with mock.patch.object(JITFunction, "run", record):
        inputs = contract.inputs(dtype=dtype, **sizes)
        raw = contract.spec.raw_arguments(inputs, **contract.variants[0])
        outputs = as_tuple(kernels.fwd(*raw))
        kernels.bwd(*outputs, *raw, (1 << len(contract.spec.differentiable)) - 1)
    return found


def compiled(
    stem: str, dtype: torch.dtype, sizes: dict[str, int], targets: Sequence[str]
) -> list[dict[str, Any]]:
    found = launches(gpu_figures.contract(stem)(), dtype, sizes)
    return [launch.code(target) for launch in found for target in targets]


def starved() -> list[dict[str, Any]]:
    """A kernel with so few registers that the compilers must spill: a spill would be seen."""
    contract = gpu_figures.contract("distortion_loss")()
    launch = launches(contract, torch.float32, {"S": 65536})[-1]
    return [
        launch.code("sm_90", maxnreg=32),
        launch.code("gfx942", num_warps=1, waves_per_eu=8),
    ]


def triton_figures(
    stems: Sequence[str],
    dtypes: Sequence[torch.dtype] = tuple(TYPES),
    targets: Sequence[str] = tuple(TARGETS),
) -> dict[str, dict[str, Any]]:
    """Op -> the figures of its kernels."""
    tasks = [
        (stem, dtype, sizes, targets)
        for stem in stems
        for dtype in dtypes
        for sizes in gpu_figures.contract(stem).gpu_sizes
    ]
    figures = {stem: {"by": triton.__version__, "codes": []} for stem in stems}
    for (stem, *_), codes in _in_parallel(compiled, tasks):
        figures[stem]["codes"] += codes
    return figures


def cuda_figures(stems: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Op -> the figures of its kernels, and of their launches."""
    tasks = [(stem, arch) for stem in stems for arch in gpu_figures.ARCHS]
    figures = {stem: {"by": cuda_code.version(), "codes": [], "launches": []} for stem in stems}
    for (stem, _), codes in _in_parallel(cuda_code.compiled, tasks):
        figures[stem]["codes"] += codes
    tasks = [
        (stem, dtype, sizes)
        for stem in stems
        for dtype in TYPES
        for sizes in gpu_figures.contract(stem).gpu_sizes
    ]
    for (stem, *_), launched in _in_parallel(cuda_code.launches, tasks):
        figures[stem]["launches"] += launched
    return figures


def _in_parallel(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Any:
    """Tasks with their results, by as many processes as may run at once."""
    processes = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        yield from zip(tasks, pool.map(function, *zip(*tasks, strict=True)), strict=True)


def update() -> None:
    """Measure what has changed, and write the page."""
    measures = {"triton": (triton.__version__, triton_figures)}
    if cuda_code.reason():
        print(f"cuda: stays as it is, {cuda_code.reason()}")
        if without := [stem for stem in STEMS if "cuda" not in gpu_figures.read(stem)]:
            sys.exit(f"cuda: no figures of {', '.join(without)}")
    else:
        measures["cuda"] = (cuda_code.version(), cuda_figures)
    for backend, (version, measure) in measures.items():
        for stem in STEMS:
            figures = gpu_figures.read(stem)
            made = {"from": gpu_figures.fingerprint(stem, backend), "by": version}
            if made.items() <= figures.get(backend, {}).items():
                continue
            print(f"{backend}: {stem}", flush=True)
            figures[backend] = {**made, **measure([stem])[stem]}
            gpu_figures.write(stem, figures)
    gpu_figures.PAGE.write_text(gpu_figures.page())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", choices=("quick", "all"), help="print figures, write none")
    part = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        if part is None:
            update()
        elif part == "quick":
            found = triton_figures(STEMS, [torch.float32], ["sm_90"])
            print(json.dumps({"triton": found, "starved": starved()}))
        else:
            found = {"triton": triton_figures(STEMS)}
            if cuda_code.reason() is None:
                found["cuda"] = cuda_figures(STEMS)
            print(json.dumps(found))


if __name__ == "__main__":
    main()
