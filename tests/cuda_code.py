"""What nvcc makes of the CUDA kernels, and what they move by the host executor's count.

Needs nvcc, but no GPU; `gpu_code.py` puts the table in docs/gpu.md.
"""

import dataclasses
import functools
import importlib.util
import math
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

import rayfuse
import simt

ROOT = Path(__file__).parent.parent
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
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16"}
ENCODED = {"f": "float", "d": "double", "6__half": "__half", "13__nv_bfloat16": "__nv_bfloat16"}


@dataclasses.dataclass(frozen=True)
class Resources:
    """One kernel for one GPU."""

    registers: int  # a thread
    stack: int  # bytes a thread
    spills: int  # bytes a thread
    shared: int  # bytes a block, without the dynamic memory
    load: int  # bits of the widest one; 0 if there is none, or no disassembler
    store: int


def reason():
    """Why nothing can be compiled here, or None."""
    if shutil.which("nvcc") is None:
        return "no nvcc on the path (PyPI: nvidia-cuda-nvcc)"
    return None


def version():
    """nvcc's."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", said).group(1)


def sources():
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@functools.cache
def compiled(source, arch):
    """Kernel -> resources; a warning is an error, and so is a spill."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "code.cubin"
        command = [
            *("nvcc", "-std=c++20", "-O3", f"-arch=sm_{arch}", "-cubin", str(source)),
            *("-o", str(cubin), "-Werror", "all-warnings"),
            *("-Xptxas", "-v,-warn-spills,-warn-lmem-usage"),
            *("-isystem", str(Path(torch.__file__).parent / "include"), "-DUSE_CUDA"),
            f"-DTORCH_TARGET_VERSION={simt.STABLE_ABI_TARGET}",
            *("-DRAYFUSE_NAMESPACE=rayfuse_cuda", "-DRAYFUSE_DISPATCH_KEY=CUDA"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        code = _instructions(cubin)
    found = {}
    for function, about in re.findall(
        r"Compiling entry function '(\w+)'(.*?)Compile time", done.stderr, re.S
    ):

        def number(pattern, about=about):
            match = re.search(pattern, about)
            return int(match.group(1)) if match else 0

        found[_readable(function)] = Resources(
            number(r"Used (\d+) registers"),
            number(r"(\d+) bytes stack frame"),
            number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            number(r"(\d+) bytes smem"),
            _widest("LDG", code.get(function, "")),
            _widest("STG", code.get(function, "")),
        )
    return found


def _readable(function):
    """As the host executor names it: distortion_loss_fwd_kernel<32, float>."""
    name, threads, kind = re.search(r"\d([a-z_]+_kernel)ILi(\d+)E(\w+?)EEv", function).groups()
    return f"{name}<{threads}, {ENCODED[kind]}>"


def disassembler():
    """cuobjdump: the toolkit's, or the one that comes with triton; None if there is neither."""
    if shutil.which("cuobjdump") or importlib.util.find_spec("triton") is None:
        return shutil.which("cuobjdump")
    import triton

    return triton.knobs.nvidia.cuobjdump.path


def _instructions(cubin):
    """Function -> SASS."""
    if disassembler() is None:
        return {}
    text = subprocess.run(
        [disassembler(), "--dump-sass", cubin], capture_output=True, text=True, check=True
    )
    parts = re.split(r"Function : (\w+)", text.stdout)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _widest(instruction, code):
    return max(
        (int(bits or 32) for bits in re.findall(rf"\b{instruction}\.E(?:\.U?(\d+))?", code)),
        default=0,
    )


def moved(contract, dtype, sizes, rays=16):
    """Kernel -> the host executor's counters, of one forward and one backward."""
    executor = simt.load()
    executor.reset()
    with rayfuse.use_backend("simt"):
        contract.gradients(contract.inputs((rays,), dtype, **sizes))
    counters = executor.counters()
    executor.reset()
    return counters


def occupancy(resources, counters, arch):
    """The part of a multiprocessor's warps that registers and shared memory allow."""
    kib, most_warps, most_blocks = LIMITS[arch]
    warps = counters["threads"] // counters["blocks"] // 32
    # from 8.0 on the system takes 1 KiB of each block
    shared = counters["dynamic_bytes"] // counters["blocks"] + resources.shared
    shared += 1024 if int(arch) >= 80 else 0
    # 65,536 registers are handed out to warps in units of 256
    of_a_warp = math.ceil(resources.registers * 32 / 256) * 256
    blocks = min((kib << 10) // shared, 65536 // of_a_warp // warps, most_warps // warps)
    return min(blocks, most_blocks) * warps / most_warps


def section(contracts):
    """The part of docs/gpu.md on CUDA."""
    resources = {arch: {} for arch in ARCHS}
    for source in sources():
        for arch in ARCHS:
            resources[arch] |= compiled(source, arch)
    every = [r for kernels in resources.values() for r in kernels.values()]
    lines = [
        "## cuda",
        "",
        f"nvcc {version()}. Each cell: registers a thread, and occupancy by registers and shared"
        " memory. Shared memory is",
        "of a block, dynamic and static; sectors/ideal is what the host executor counts on 16 rays:"
        " 32-byte sectors",
        "moved by requests of a warp, over what its bytes would fill.",
        "",
        f"Stack: at most {max(r.stack for r in every)} bytes a thread."
        f" Spills: at most {max(r.spills for r in every)} bytes."
        f" Every kernel's widest load: {min(r.load for r in every)} bits.",
        "",
        "| kernel | inputs | shared | sectors/ideal | "
        + " | ".join(f"sm_{arch}" for arch in ARCHS)
        + " |",
        "|---" * (4 + len(ARCHS)) + "|",
    ]
    rows = []
    for contract in contracts:
        for sizes in contract.gpu_sizes:
            for dtype, name in TYPES.items():
                inputs = ", ".join([name, *(f"{k} = {v:,}" for k, v in sizes.items())])
                for kernel, counters in moved(contract, dtype, sizes).items():
                    ratio = counters["sectors"] / counters["ideal_sectors"]
                    at = [(resources[arch][kernel], arch) for arch in ARCHS]
                    cells = [f"{r.registers}, {occupancy(r, counters, arch):.0%}" for r, arch in at]
                    shared = counters["dynamic_bytes"] // counters["blocks"] + at[0][0].shared
                    rows.append(
                        f"| `{kernel}` | {inputs} | {shared} B | {ratio:.2f} | "
                        + " | ".join(cells)
                        + " |"
                    )
    return "\n".join([*lines, *sorted(rows)]) + "\n"
