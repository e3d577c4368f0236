"""Drop-ins: functions of other packages by their own names (docs/compat.md)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from ..op import HALVES


def promoted(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype that arithmetic on them would have: rayfuse's ops never convert."""
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in tensors])
    return [x.to(dtype) for x in tensors]


def weighted(w: Tensor, f: Tensor) -> list[Tensor]:
    """Weights and features: those of half precision are read as they are beside float32."""
    return [w, f] if w.dtype == torch.float32 and f.dtype in HALVES else promoted(w, f)


def packed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors [..., S] as packed rays [P] of S samples each, and the offsets of these."""
    *leading, S = tensors[0].shape
    rays = torch.Size(leading).numel()
    offsets = torch.arange(rays + 1, device=tensors[0].device) * S
    return *[x.reshape(-1) for x in tensors], offsets


def swap_everywhere(new_of_old: dict[Callable, Callable]) -> None:
    """Put functions in the place of others in all modules that have imported those."""
    new = {id(old): function for old, function in new_of_old.items()}
    for module in [*sys.modules.values()]:
        for name, value in [*getattr(module, "__dict__", {}).items()]:
            if id(value) in new:
                setattr(module, name, new[id(value)])
