"""interlevel_loss beside nerfstudio's formula, at the sizes of nerfacto's two proposals."""

from __future__ import annotations

import torch
from torch import Tensor

import harness
import peers
import rayfuse
from bench_outer_bound import outer
from harness import Workload


def as_nerfstudio(t: Tensor, w: Tensor, t_env: Tensor, w_env: Tensor) -> Tensor:
    """The loss of each ray."""
    uncovered = (w - outer(t, t_env, w_env)).clip(min=0)
    return (uncovered**2 / (w + 1e-7)).mean(-1)


class BenchInterlevelLoss(harness.Bench):
    op = staticmethod(rayfuse.interlevel_loss)
    workloads = (
        Workload((4096,), dict(S=48, E=256)),
        Workload((4096,), dict(S=48, E=96)),
        Workload((65536,), dict(S=48, E=256)),
        Workload((65536,), dict(S=48, E=96)),
        Workload((65536,), dict(S=48, E=96), torch.bfloat16),
    )
    directions = ((), ("w_env",), ("w", "w_env"))
    read_again = ()
    peers = (
        peers.eager("nerfstudio", as_nerfstudio),
        peers.compiled("nerfstudio", as_nerfstudio),
    )
    growth = ("E", (64, 256, 1024, 4096), (4096,), ("eager nerfstudio",))
    bound, goal = 2.5, 1.5
    page = "interlevel"
