"""outer_bound beside nerfstudio's formula, at the sizes of nerfacto's two proposals."""

from __future__ import annotations

import torch
from torch import Tensor

import harness
import peers
import rayfuse
from harness import Workload


def outer(t: Tensor, t_env: Tensor, w_env: Tensor) -> Tensor:
    """As nerfstudio has it: two searches, a running sum, two gathers."""
    until = torch.cat([torch.zeros_like(w_env[..., :1]), w_env.cumsum(-1)], -1)
    last = w_env.shape[-1] - 1
    starts, ends = t_env[..., :-1].contiguous(), t_env[..., 1:].contiguous()
    below = torch.searchsorted(starts, t[..., :-1].contiguous(), right=True) - 1
    above = torch.searchsorted(ends, t[..., 1:].contiguous(), right=True)
    return until.gather(-1, above.clamp(0, last) + 1) - until.gather(-1, below.clamp(0, last))


class BenchOuterBound(harness.Bench):
    op = staticmethod(rayfuse.outer_bound)
    workloads = (
        Workload((4096,), dict(S=48, E=256)),
        Workload((4096,), dict(S=48, E=96)),
        Workload((65536,), dict(S=48, E=256)),
        Workload((65536,), dict(S=48, E=96)),
    )
    directions = ((), ("w_env",))
    peers = (
        peers.eager("nerfstudio", outer, mean=False),
        peers.compiled("nerfstudio", outer, mean=False),
    )
    growth = ("E", (64, 256, 1024, 4096), (4096,), ("eager nerfstudio",))
    bound, goal = 2.5, 1.5
    page = "interlevel"
