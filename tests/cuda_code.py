"""What nvcc makes of the CUDA kernels, and what they move by the host executor's count.

Needs nvcc, but no GPU.
"""

import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

import gpu_figures
import rayfuse
import simt

ROOT = Path(__file__).parent.parent


def reason():
    """Why nothing can be compiled here, or None."""
    if shutil.which("nvcc") is None:
        return "no nvcc on the path (PyPI: nvidia-cuda-nvcc)"
    if disassembler() is None:
        return "no cuobjdump on the path (triton has one)"
    return simt.reason()


def version():
    """nvcc's."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", said).group(1)


def source(stem):
    return ROOT / "csrc" / "cuda" / f"{stem}.cu"


def compiled(stem, arch, output=None):
    """What one GPU needs for each kernel of an op; a warning is an error.

    An output is what a linker takes, and `<output>.d` then names all that the compiler read.
    """
    with tempfile.TemporaryDirectory() as folder:
        form = ["-c", "-MD", "-MF", f"{output}.d", "-Xcompiler", "-fPIC"] if output else ["-cubin"]
        output = output or Path(folder) / "code.cubin"
        command = [
            *("nvcc", "-std=c++20", "-O3", f"-arch=sm_{arch}", *form, str(source(stem))),
            *("-o", str(output), "-Werror", "all-warnings", "-Xptxas", "-v"),
            *("-isystem", str(Path(torch.__file__).parent / "include"), "-DUSE_CUDA"),
            f"-DTORCH_TARGET_VERSION={simt.STABLE_ABI_TARGET}",
            *("-DRAYFUSE_NAMESPACE=rayfuse_cuda", "-DRAYFUSE_DISPATCH_KEY=CUDA"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        code = _instructions(output)
    found = []
    for function, about in re.findall(
        r"Compiling entry function '(\w+)'(.*?)Compile time", done.stderr, re.S
    ):

        def number(pattern, about=about):
            match = re.search(pattern, about)
            return int(match.group(1)) if match else 0

        found.append(
            {
                "kernel": _readable(function),
                "target": f"sm_{arch}",
                "registers": number(r"Used (\d+) registers"),  # a thread
                "stack": number(r"(\d+) bytes stack frame"),  # a thread
                # bytes a thread
                "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
                "shared": number(r"(\d+) bytes smem"),  # a block, without the dynamic memory
                # bits of the widest one
                "load": _widest("LDG", code[function]),
                "store": _widest("STG", code[function]),
            }
        )
    return found


def link(objects, library):
    subprocess.run(
        [
            *("nvcc", "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs=ALL", *objects),
            *(f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-o", library),
        ],
        check=True,
    )


def _readable(function):
    """As the host executor names it: distortion_loss_fwd_kernel<32, float>."""
    name = subprocess.run(["c++filt", function], capture_output=True, text=True, check=True).stdout
    for word in ("void ", "rayfuse::", "(anonymous namespace)::"):
        name = name.replace(word, "")
    # a parenthesis may stand among the template's arguments as well: (Form)0
    return re.match(r".+?>(?=\()|\w+", name).group()


def disassembler():
    """cuobjdump: the toolkit's, or the one that comes with triton; None if there is neither."""
    if shutil.which("cuobjdump") or importlib.util.find_spec("triton") is None:
        return shutil.which("cuobjdump")
    import triton

    return triton.knobs.nvidia.cuobjdump.path


def _instructions(binary):
    """Function -> SASS."""
    text = subprocess.run(
        [disassembler(), "--dump-sass", binary], capture_output=True, text=True, check=True
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


def launches(stem, dtype, sizes):
    """What a forward and a backward of an op launch and move, by the host executor's count."""
    contract = gpu_figures.contract(stem)()
    return [
        {
            "kernel": kernel,
            "inputs": gpu_figures.label(dtype, sizes),
            "threads": counters["threads"] // counters["blocks"],  # a block
            "shared": counters["dynamic_bytes"] // counters["blocks"],
            "sectors": counters["sectors"],
            "ideal_sectors": counters["ideal_sectors"],
        }
        for kernel, counters in moved(contract, dtype, sizes).items()
    ]
