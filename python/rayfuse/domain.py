"""What an argument must hold: the rule in words, its check, and samples that obey it.

Checks read values, so they run only in debug mode; samples feed tests and benches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Domain:
    rule: str
    holds: Callable[[Tensor], Tensor]  # values -> bool [same shape or one fewer along the last dim]
    from_uniform: Callable[[Tensor], Tensor]  # uniform values in [0, 1) -> values in the domain


real = Domain("be finite", torch.isfinite, lambda u: 2 * u - 1)
nonnegative = Domain("be finite and >= 0", lambda x: torch.isfinite(x) & (x >= 0), lambda u: u)
increasing = Domain(
    "be finite and not decrease along the last dimension",
    lambda x: torch.isfinite(x).all(-1, keepdim=True) & (x.diff(dim=-1) >= 0),
    lambda u: (0.05 + u).cumsum(-1) / max(u.shape[-1], 1),
)
