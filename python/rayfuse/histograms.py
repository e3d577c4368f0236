"""Histograms along packed rays: what the lookups in them share."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend
from .domain import csr
from .packed import upper_bound


def neighbours(
    edges: Tensor, edge_offsets: Tensor, queries: Tensor, ray: Tensor
) -> tuple[Tensor, Tensor]:
    """The places on either side of each query in its ray, which has edges."""
    first, last = edge_offsets[:-1][ray], edge_offsets[1:][ray] - 1
    right = upper_bound(edges, first, last, queries)
    return torch.maximum(right - 1, first), torch.maximum(right, first)


def ray_of_each(offsets: Tensor, n: int) -> Tensor:
    """[n] the ray of each sample."""
    rays = torch.arange(len(offsets) - 1, device=offsets.device)
    return rays.repeat_interleave(offsets.diff(), output_size=n)


def even_offsets(rays: int, each: int, like: Tensor) -> Tensor:
    """[rays + 1] where the samples of rays begin that have so many each."""
    return torch.arange(rays + 1, device=like.device) * each


class Checks:
    """What arguments must be, in the words of the ops."""

    def __init__(self, function: str) -> None:
        self.function = function

    def fail(self, error: type[Exception], name: str, rule: str, got: object) -> None:
        raise error(f"{self.function}: {name} must {rule}, got {got}")

    def values(self, name: str, x: Tensor, shape: str) -> None:
        if not isinstance(x, Tensor):
            self.fail(TypeError, name, "be a tensor", type(x).__name__)
        if not x.is_floating_point():
            self.fail(TypeError, name, "be floating point", _plain(x.dtype))
        if x.dim() != 1:
            self.fail(ValueError, name, f"have shape [{shape}]", list(x.shape))

    def rows(self, name: str, x: Tensor, like: str, y: Tensor) -> None:
        """Both have the same leading dimensions, and device."""
        self.values(like, y.flatten(), "")
        self.values(name, x.flatten(), "")
        if x.device != y.device:
            self.fail(ValueError, name, f"be on {y.device} like {like}", x.device)
        if y.dim() < 1 or y.shape[-1] < 1:
            self.fail(ValueError, like, "have shape [..., S+1] with S >= 0", list(y.shape))
        if x.dim() < 1 or x.shape[:-1] != y.shape[:-1]:
            rule = f"have the leading dimensions of {like}, {list(y.shape[:-1])}"
            self.fail(ValueError, name, rule, list(x.shape))

    def same_length(self, name: str, x: Tensor, like: str, y: Tensor) -> None:
        if x.device != y.device:
            self.fail(ValueError, name, f"be on {y.device} like {like}", x.device)
        if len(x) != len(y):
            self.fail(ValueError, name, f"have length {len(y)} like {like}", len(x))

    def offsets(self, name: str, offsets: Tensor, values: Tensor) -> None:
        if not isinstance(offsets, Tensor) or offsets.dtype != torch.int64:
            got = _plain(getattr(offsets, "dtype", type(offsets).__name__))
            self.fail(TypeError, name, "be an int64 tensor", got)
        if offsets.dim() != 1 or len(offsets) < 1:
            self.fail(ValueError, name, "have shape [R+1]", list(offsets.shape))
        if offsets.device != values.device:
            self.fail(ValueError, name, f"be on {values.device}", offsets.device)
        if backend.debugging():
            self.rising(name, offsets, len(values))

    def rising(self, name: str, offsets: Tensor, n: int) -> None:
        """What kernels on the CPU look at themselves, as it costs no synchronisation."""
        wrong = csr.holds(offsets, n).logical_not().nonzero()
        if len(wrong):
            at = int(wrong[0])
            self.fail(ValueError, name, csr.rule, f"{int(offsets[at])} at [{at}]")

    def counts(self, counts: Tensor | int, edge_offsets: Tensor) -> Tensor:
        """One for each ray."""
        if isinstance(counts, int):
            counts = edge_offsets.new_full((len(edge_offsets) - 1,), counts)
        if not isinstance(counts, Tensor) or counts.dtype not in (torch.int64, torch.int32):
            got = _plain(getattr(counts, "dtype", type(counts).__name__))
            self.fail(TypeError, "counts", "be an integer, or an int64 tensor", got)
        self.same_length("counts", counts, "edge_offsets[1:]", edge_offsets[1:])
        if (counts.device.type == "cpu" or backend.debugging()) and (counts < 0).any():
            self.fail(ValueError, "counts", "be >= 0", int(counts.min()))
        return counts.long()


def _plain(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
