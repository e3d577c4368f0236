"""Which code runs an op: the backends, why one cannot run, and how to force one.

A backend is found by name alone: the libraries register `torch.ops.rayfuse_<backend>.<op>[_bwd]`
(one namespace per instruction set on the CPU), and `<op>_fwd_bwd` where both are faster at once;
the Triton kernels are modules of the op's stem, and the reference is the op's own Python function.
`simt` is the CUDA kernels run on the host by csrc/simt: the tests build and load it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIBRARY_FOLDER = Path(__file__).parent / "lib"
# worst to best, with torch's name for the least processor that runs it
ISAS = {"baseline": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}
_CAPABILITIES = [*ISAS.values()]
_ORDER = {"cpu": ("cpu", "ref"), "cuda": ("cuda", "triton", "ref"), "xpu": ("triton", "ref")}
NAMES = ("ref", "cpu", "cuda", "triton", "simt")
# the backends that are libraries with a torch.ops namespace of their own
LIBRARIES = (*(f"cpu.{isa}" for isa in ISAS), "cuda", "simt")

Kernel = Callable[..., Any]


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run."""


@functools.cache
def isas() -> tuple[str, ...]:
    """The instruction sets that this build holds and this processor runs, worst to best."""
    capability = torch.backends.cpu.get_cpu_capability()
    # other processors than x86 have names of their own, and the baseline library alone
    best = _CAPABILITIES.index(capability) if capability in _CAPABILITIES else 0
    usable = [isa for isa, needs in ISAS.items() if _CAPABILITIES.index(needs) <= best]
    return tuple(isa for isa in usable if library_path("cpu", isa).exists())


def library_path(backend: str, isa: str | None = None) -> Path:
    """Where the library of a backend lies, whether or not it is there."""
    return LIBRARY_FOLDER / f"librayfuse_{backend}{'.' + isa if isa else ''}.so"


def isa() -> str | None:
    """The instruction set that backend `cpu` uses: `RAYFUSE_ISA`, else the best one."""
    return os.environ.get("RAYFUSE_ISA") or (isas()[-1] if isas() else None)


@functools.cache
def reason(name: str) -> str | None:
    """Why backend `name` cannot run here, or None if it can."""
    backend, _, forced_isa = name.partition(".")
    if backend == "cpu":
        return _cpu_reason(forced_isa or isa())
    if backend == "cuda":
        return _cuda_reason()
    if backend == "triton":
        return _triton_reason()
    if backend == "simt" and "rayfuse_simt" not in sys.modules:
        return "the tests' host executor of the CUDA kernels is not loaded"
    return None


def _cpu_reason(wanted: str | None) -> str | None:
    if wanted is None:
        return (
            f"no library in {LIBRARY_FOLDER}: there was no C++ compiler, or no torch, to build it"
        )
    if wanted not in isas():
        have = ", ".join(isas()) or "none"
        return f"instruction set {wanted!r} is not in this build or processor (usable: {have})"
    try:
        torch.ops.load_library(library_path("cpu", wanted))
    except OSError as error:
        return f"{library_path('cpu', wanted).name} does not load: {error}"
    return None


def _cuda_reason() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if not library_path("cuda").exists():
        return f"{library_path('cuda').name} is not in this build (RAYFUSE_CUDA=1 at install)"
    return load_cuda_library()


def load_cuda_library() -> str | None:
    """Load it, which needs a torch with CUDA but no GPU; the reason why that failed, or None."""
    try:
        # it needs torch's CUDA functions, which import torch keeps to itself
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cuda.so"), ctypes.RTLD_GLOBAL)
        torch.ops.load_library(library_path("cuda"))
    except OSError as error:
        return f"{library_path('cuda').name} does not load: {error}"
    return None


def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not (interpreting() or torch.cuda.is_available() or torch.xpu.is_available()):
        return "torch sees no GPU"
    return None


def interpreting() -> bool:
    """Whether triton runs its kernels in Python: it decides when it is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _emulated(device: str) -> tuple[str, ...]:
    """GPU backends that run on this device type where they are forced, for tests: slowly."""
    if device != "cpu":
        return ()
    return ("simt", "triton") if interpreting() else ("simt",)


def backends() -> dict[str, str]:
    """Every backend of rayfuse, and `"available"` or the reason why it is not.

    Example:
        >>> import torch, rayfuse
        >>> rayfuse.backends()["ref"]
        'available'
    """
    return {name: reason(name) or "available" for name in NAMES}


def release_memory() -> None:
    """Give back the memory that CPU kernels keep for their next large gradient or image.

    They keep the last four blocks of 32 MB and more. What goes beyond 256 MB is marked so that the
    system takes it back where it runs short; until then it counts as memory of the process.

    Example:
        >>> import rayfuse
        >>> rayfuse.release_memory()
    """
    for name in isas():
        if reason(f"cpu.{name}") is None:
            ctypes.CDLL(str(library_path("cpu", name))).rayfuse_release_memory()


def _valid(name: str | None, source: str) -> str | None:
    known = (*NAMES, *(f"cpu.{isa}" for isa in ISAS))
    if name is not None and name not in known:
        raise ValueError(f"{source} must be one of {', '.join(known)}, got {name!r}")
    return name


class _Local(threading.local):
    forced: str | None = _valid(os.environ.get("RAYFUSE_BACKEND") or None, "RAYFUSE_BACKEND")
    last: str | None = None


_local = _Local()


class use_backend:
    """Force a backend in this thread, for good or, used with `with`, for a block.

    Args:
        name: `"ref"`, `"cpu"`, `"cuda"`, `"triton"`; `"cpu.baseline"`, `"cpu.avx2"` or
            `"cpu.avx512"` for one instruction set; None for the default order.

    Raises:
        ValueError: for an unknown name. A known backend that cannot run raises when an op is
            called; it never falls through to another.

    Example:
        >>> import torch, rayfuse
        >>> with rayfuse.use_backend("ref"):
        ...     loss = rayfuse.distortion_loss(torch.tensor([0.0, 0.5, 1.0]), torch.ones(2))
        >>> rayfuse.last_backend()
        'ref'
    """

    def __init__(self, name: str | None) -> None:
        self._before = _local.forced
        _local.forced = _valid(name, "use_backend: name")

    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None:
        _local.forced = self._before


def last_backend() -> str | None:
    """The backend that ran the last op of this thread, or None before the first."""
    return _local.last


def as_tuple(x: Any) -> tuple[Any, ...]:
    """The outputs of a kernel, or of an op, if there is one or are several."""
    return (x,) if isinstance(x, Tensor) else tuple(x)


class Chosen(NamedTuple):
    """An op's kernels on one backend; a lookup has no backward."""

    name: str
    fwd: Kernel
    bwd: Kernel | None = None
    fwd_bwd: Kernel | None = None

    def run_fwd(self, args: Sequence[Any]) -> Any:
        """Kernels read contiguous memory: here is where that is seen to."""
        _local.last = self.name
        return _with_value_errors(self.fwd, args)

    def run_bwd(self, args: Sequence[Any], needs: int) -> Any:
        """The gradients of the inputs, empty where `needs` has no bit."""
        assert self.bwd is not None
        _local.last = self.name
        return _with_value_errors(self.bwd, (*args, needs))

    def run_fwd_bwd(
        self, d_sums: Sequence[float | None], args: Sequence[Any], needs: int
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The sums of the outputs over all rays, and with these gradients of the sums the gradients
        of the inputs: none where nothing is needed."""
        count, given = len(d_sums), [d for d in d_sums if d is not None]
        if self.fwd_bwd and needs and len(given) == count:
            _local.last = self.name
            out = _with_value_errors(self.fwd_bwd, (*d_sums, *args, needs))
            return out[:count], out[count:]
        everything = as_tuple(self.run_fwd(args))
        out, kept = everything[:count], everything[count:]
        sums = [sum_of_rays(y) for y in out]
        if not (needs and given):
            return sums, ()
        d_out = [
            d if d is None else torch.full_like(y, d) for d, y in zip(d_sums, out, strict=True)
        ]
        return sums, as_tuple(self.run_bwd((*d_out, *kept, *args), needs))


# torch adds up fewer values than this on one thread, whatever the number of threads
_SERIAL_SUM = 1 << 14


def sum_of_rays(x: Tensor) -> Tensor:
    """The sum, the same to the bit for any number of threads."""
    if x.device.type == "cpu" and x.numel() > _SERIAL_SUM:
        x = torch.stack([part.sum() for part in x.flatten().split(_SERIAL_SUM)])
    return x.sum()


def _with_value_errors(kernel: Kernel, args: Sequence[Any]) -> Any:
    """Torch's C interface knows one kind of error, a RuntimeError here."""
    try:
        return kernel(*map(_contiguous, args))
    except RuntimeError as error:
        if re.match(r"\w+: \w+ must ", str(error)):
            raise ValueError(*error.args) from None
        raise


def _contiguous(x: Any) -> Any:
    return x.contiguous() if isinstance(x, Tensor) else x


class Kernels:
    """An op's kernels on every backend, looked up once per (forced backend, device)."""

    def __init__(self, op: str, *reference: Kernel) -> None:
        """With the reference of each direction: of both, or of a lookup the only one."""
        self.op = op
        self._reference = reference
        self._chosen: dict[tuple[str | None, str], Chosen] = {}

    def choose(self, device: str, name: str | None = None) -> Chosen:
        """The kernels for tensors on a device type.

        Raises:
            BackendError: if `name`, or the backend forced in this thread, cannot run.
        """
        name = name or _local.forced
        try:
            return self._chosen[name, device]
        except KeyError:
            return self._chosen.setdefault((name, device), self._find(device, name))

    def available(self, device: str) -> list[str]:
        """The backends that can run this op on a device type, best first."""
        return [b for b in _ORDER.get(device, ("ref",)) if self._missing(b, device) is None]

    def _find(self, device: str, name: str | None) -> Chosen:
        available = self.available(device)
        name = name or available[0]
        if name == "triton" and len(self._reference) == 1:
            name = "ref"  # triton's kernels have no lookups
        missing = self._missing(name, device)
        if missing:
            raise BackendError(
                f"{self.op}: backend {name!r} is not available on {device}: {missing};"
                f" available: {', '.join(available)}"
            )
        return Chosen(name, *self._load(name))

    def _missing(self, name: str, device: str) -> str | None:
        runs_here = (*_ORDER.get(device, ("ref",)), *_emulated(device))
        if name.partition(".")[0] not in runs_here:
            return f"it does not run on {device} tensors"
        return reason(name) or (None if self._load(name) else "it has no kernel for this op")

    def _load(self, name: str) -> tuple[Kernel, ...]:
        if name == "ref":
            return self._reference
        if name == "triton":
            module = f"rayfuse.triton_kernels.{self.op}"
            if importlib.util.find_spec(module) is None:
                return ()
            kernels = importlib.import_module(module)
            return _on_its_device(kernels.fwd), _on_its_device(kernels.bwd)
        namespace = library_namespace(name)
        directions = [self.op, f"{self.op}_bwd"][: len(self._reference)]
        # the engine defines the ops of every library; whether the library holds them is its affair
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        key = "CUDA" if name == "cuda" else "CPU"
        if not all(has_kernel(f"{namespace}::{op}", key) for op in directions):
            return ()
        both = f"{self.op}_fwd_bwd"
        if len(directions) == 2 and has_kernel(f"{namespace}::{both}", key):
            directions.append(both)
        return tuple(getattr(getattr(torch.ops, namespace), op).default for op in directions)


def _on_its_device(kernel: Kernel) -> Kernel:
    """Triton launches on the current device, wherever the tensors are."""

    def run(*args: Any) -> Any:
        # the gradient of the first output may be absent
        device = next(x for x in args if x is not None).device
        if device.type == "cpu":
            return kernel(*args)
        with torch.get_device_module(device).device(device):
            return kernel(*args)

    return run


def library_namespace(name: str) -> str:
    """The torch.ops namespace of a library: `cpu` is the one of its instruction set."""
    return "rayfuse_" + (f"cpu_{isa()}" if name == "cpu" else name.replace(".", "_"))


_debug = os.environ.get("RAYFUSE_DEBUG", "") not in ("", "0")


def debugging() -> bool:
    """Whether ops check the values of their arguments."""
    return _debug


@contextmanager
def debug(on: bool = True) -> Iterator[None]:
    """Check the values of every argument (sortedness, sign, finiteness) inside a `with` block.

    This reads tensors back from the device, so it is off by default; `RAYFUSE_DEBUG=1` turns it
    on for the whole process.

    Example:
        >>> import torch, rayfuse
        >>> with rayfuse.debug():
        ...     rayfuse.distortion_loss(torch.tensor([0.0, 1.0, 0.5]), torch.ones(2))
        Traceback (most recent call last):
            ...
        ValueError: distortion_loss: t must be finite and not decrease along the last dimension, \
got 0.5 at [2]
    """
    global _debug
    before, _debug = _debug, on
    try:
        yield
    finally:
        _debug = before
