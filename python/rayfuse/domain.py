"""What an argument must hold: the rule in words, its check, and samples that obey it.

Checks of tensors read values, so they run only in debug mode; samples feed tests and benches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Domain:
    rule: str
    # values -> bool [same shape or one fewer along the last dim]
    holds: Callable[..., Tensor]
    # uniform values in [0, 1) -> values in the domain
    from_uniform: Callable[..., Tensor]
    # the letter of the size that these int64 values count up to, the second argument of both
    # functions above; None: floating point values
    size: str | None = None


real = Domain("be finite", torch.isfinite, lambda u: 2 * u - 1)
nonnegative = Domain("be finite and >= 0", lambda x: torch.isfinite(x) & (x >= 0), lambda u: u)
positive = Domain("be finite and > 0", lambda x: torch.isfinite(x) & (x > 0), lambda u: 1 - u)
unit = Domain("be between 0 and 1", lambda x: (x >= 0) & (x <= 1), lambda u: u)
increasing = Domain(
    "be finite and not decrease along the last dimension",
    lambda x: torch.isfinite(x).all(-1, keepdim=True) & (x.diff(dim=-1) >= 0),
    lambda u: (0.05 + u).cumsum(-1) / max(u.shape[-1], 1),
)


def _is_csr(offsets: Tensor, P: int) -> Tensor:
    follows = offsets >= torch.cat([offsets.new_zeros(1), offsets[:-1]])
    last = torch.arange(len(offsets), device=offsets.device) == len(offsets) - 1
    first = torch.arange(len(offsets), device=offsets.device) == 0
    return follows & (~first | (offsets == 0)) & torch.where(last, offsets == P, offsets <= P)


def _csr_from_uniform(u: Tensor, P: int) -> Tensor:
    # every fourth ray is empty
    cuts = u.sort().values
    cuts[1::4] = cuts[: len(cuts[1::4]) * 4 : 4]
    cuts = (cuts * P).long()
    cuts[0], cuts[-1] = 0, P
    return cuts


def _csr(size: str) -> Domain:
    return Domain("rise from 0 to the number of samples", _is_csr, _csr_from_uniform, size)


# ray r of a packed array of P samples has samples offsets[r] up to offsets[r + 1]
csr = _csr("P")
# the same of the Q bins of an envelope
csr_env = _csr("Q")
