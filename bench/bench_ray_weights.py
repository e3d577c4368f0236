"""ray_weights beside what people use: nerfstudio's and nerfacc's formulas in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

import harness
import peers
import rayfuse
from harness import Workload


def in_torch(sigma: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """As nerfstudio's `RaySamples.get_weights` writes it, with the light of the background."""
    x = sigma * t.diff(dim=-1)
    depth = torch.cat([x.new_zeros((*x.shape[:-1], 1)), x.cumsum(-1)], -1)
    transmittance = torch.exp(-depth)
    w = (1 - torch.exp(-x)) * transmittance[..., :-1]
    return torch.nan_to_num(w), transmittance


class BenchRayWeights(harness.Bench):
    op = staticmethod(rayfuse.ray_weights)
    title = "ray_weights"
    workloads = (
        Workload((4096,), dict(S=48)),
        Workload((4096,), dict(S=256)),
        Workload((65536,), dict(S=48)),
        Workload((65536,), dict(S=48), torch.bfloat16),
    )
    directions = ((), ("sigma",), ("sigma", "t"))
    peers = (
        peers.eager("", in_torch, mean=False),
        peers.compiled("", in_torch, mean=False),
    )
    growth = ("S", (64, 256, 1024, 4096), (4096,), ("eager", "compile"))
    goal = 1.1
    page = "compositing"
