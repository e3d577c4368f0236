"""alpha_weights beside what people use: a cumulative product, with an epsilon and without."""

from __future__ import annotations

import torch
from torch import Tensor

import harness
import peers
import rayfuse
from harness import Workload


def product(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """As nerfacc's `render_weight_from_alpha`."""
    ones = alpha.new_ones((*alpha.shape[:-1], 1))
    transmittance = torch.cat([ones, 1 - alpha], -1).cumprod(-1)
    return alpha * transmittance[..., :-1], transmittance


def biased(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """As nerfstudio's `get_weights_and_transmittance_from_alphas`: its gradient divides by
    1 - alpha, so 1e-7 is added."""
    ones = alpha.new_ones((*alpha.shape[:-1], 1))
    transmittance = torch.cat([ones, 1 - alpha + 1e-7], -1).cumprod(-1)
    return alpha * transmittance[..., :-1], transmittance


class BenchAlphaWeights(harness.Bench):
    op = staticmethod(rayfuse.alpha_weights)
    title = "alpha_weights"
    workloads = (
        Workload((4096,), dict(S=48)),
        Workload((4096,), dict(S=256)),
        Workload((65536,), dict(S=48)),
        Workload((65536,), dict(S=48), torch.bfloat16),
    )
    directions = ((), ("alpha",))
    peers = (
        peers.eager("", product, mean=False),
        peers.eager("biased", biased, mean=False),
        peers.compiled("", product, mean=False),
    )
    growth = ("S", (64, 256, 1024, 4096), (4096,), ("eager", "compile"))
    goal = 1.1
    page = "compositing"
