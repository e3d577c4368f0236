"""What compilers make of the GPU kernels, found without a GPU: this script writes docs/gpu.md.

The launches are those of each op's own `fwd` and `bwd`, recorded instead of run. A process in which
triton interprets its kernels cannot compile them, so the tests run this one beside theirs.
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
import re
import subprocess
import tempfile
from pathlib import Path
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
import simt
from contract import Contract, as_tuple
from rayfuse.ops import STEMS

PAGE = Path(__file__).parent.parent / "docs" / "gpu.md"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes of shared memory of a multiprocessor: CUDA programming guide, compute capabilities; and of
# a compute unit: CDNA 3 ISA
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "gfx942": 64 << 10}
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16"}


@dataclasses.dataclass(frozen=True)
class Code:
    """One kernel for one target."""

    kernel: str
    inputs: str
    target: str
    registers: int  # a thread
    spills: int  # instructions on an NVIDIA GPU, registers on an AMD one
    stack: int  # bytes a thread
    shared: int  # bytes a block
    occupancy: float  # of the warps that a multiprocessor can hold
    load: int  # bits of the widest one
    wide_index: bool  # the program's index is made 64 bits wide before it is used


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    inputs: str
    arguments: dict[str, Any]
    options: dict[str, Any]

    def code(self, target: str, **options: Any) -> Code:
        compiled = triton.compile(
            self._source(), target=TARGETS[target], options={**self.options, **options}
        )
        warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
        read = _nvidia if "cubin" in compiled.asm else _amd
        return Code(
            self.kernel.__name__,
            self.inputs,
            target,
            shared=shared,
            wide_index=_is_widened(compiled.asm["ttir"]),
            **read(compiled.asm, warps, SHARED[target] // (shared + 1024)),
        )

    def _source(self) -> ASTSource:
        """As the launcher sees it: multiples of 16 and ones are part of an argument's type."""
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            divisible = False
            if isinstance(value, torch.Tensor):
                kind, divisible = "*" + TYPES[value.dtype], value.data_ptr() % 16 == 0
            elif parameter.is_constexpr or value == 1:
                kind, constants[(i,)] = "constexpr", value
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
        "registers": registers,
        "stack": stack,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "load": max(int(bits or 32) for bits in re.findall(r"\bLDG\.E(?:\.U?(\d+))?", sass)),
        "occupancy": blocks * warps / 64,
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
        "spills": number(r"\.vgpr_spill_count") + number(r"\.sgpr_spill_count"),
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
    text = ", ".join([TYPES[dtype], *(f"{name} = {size:,}" for name, size in sizes.items())])
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


def page(codes: list[Code]) -> str:
    """The text of docs/gpu.md."""
    lines = [
        "# GPU kernels",
        "",
        "Written by `make gpu-code`; a test compares it with what the compilers make of the tree.",
        "",
        "## triton",
        "",
        f"triton {triton.__version__}, compiled for GPUs that were not there: nothing here was"
        " measured on one.",
        "Each cell: registers a thread, bytes of shared memory a block, occupancy by these two, and"
        " the widest",
        "load. The compiler joins loads where it sees that the rows of an array start at multiples"
        " of 16.",
        "",
        f"Stack: at most {max(code.stack for code in codes)} bytes a thread."
        f" Spills: at most {max(code.spills for code in codes)}.",
        "",
        "| kernel | inputs | " + " | ".join(TARGETS) + " |",
        "|---" * (2 + len(TARGETS)) + "|",
    ]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for code in codes:
        rows.setdefault((code.kernel, code.inputs), {})[code.target] = (
            f"{code.registers}, {code.shared} B, {code.occupancy:.0%}, {code.load} bit"
        )
    for (kernel, inputs), cells in sorted(rows.items()):
        lines.append(f"| `{kernel}` | {inputs} | {' | '.join(cells[name] for name in TARGETS)} |")
    return "\n".join(lines) + "\n"


def _cuda_section() -> str:
    """Measured where nvcc is; elsewhere what the page says already."""
    if cuda_code.reason() or simt.reason():
        return "## cuda" + PAGE.read_text().partition("## cuda")[2]
    return cuda_code.section([contract() for contract in Contract.__subclasses__()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print all that was found, write none")
    as_json = parser.parse_args().json
    for stem in STEMS:
        importlib.import_module(f"test_{stem}")
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        found = [
            launch
            for contract in Contract.__subclasses__()
            for sizes in contract.gpu_sizes
            for dtype in TYPES
            for launch in launches(contract(), dtype, sizes)
        ]
        codes = [launch.code(target) for launch in found for target in TARGETS]
        if not as_json:
            PAGE.write_text(f"{page(codes)}\n{_cuda_section()}")
            return
        # so few registers that the compilers must spill, which proves that a spill would be seen
        starved = [
            found[-1].code("sm_90", maxnreg=32),
            found[-1].code("gfx942", num_warps=1, waves_per_eu=8),
        ]
    every = [[dataclasses.asdict(code) for code in group] for group in (codes, starved)]
    print(json.dumps({"codes": every[0], "starved": every[1], "page": page(codes)}))


if __name__ == "__main__":
    main()
