"""depth_loss beside what people use: both losses as nerfstudio writes them, eager and compiled."""

from __future__ import annotations

import torch
from torch import Tensor

import harness
import peers
import rayfuse
from harness import Workload

# nerfstudio's, for rays that end at 0.55 here
SIGMA = 0.01


def ds_nerf(w: Tensor, s: Tensor, depth: Tensor, lengths: Tensor) -> Tensor:
    bell = torch.exp(-((s - depth[..., None]) ** 2) / (2 * SIGMA))
    return (-torch.log(w + 1e-7) * bell * lengths).sum(-1) * (depth > 0)


def urban(w: Tensor, s: Tensor, depth: Tensor, depth_pred: Tensor) -> Tensor:
    target = torch.distributions.normal.Normal(0.0, SIGMA / 3, validate_args=False)
    expected = (depth - depth_pred) ** 2
    at = depth[..., None]
    is_near = torch.logical_and(s <= at + SIGMA, s >= at - SIGMA)
    near = (is_near * (w - torch.exp(target.log_prob(s - at))) ** 2).sum(-1)
    empty = ((s < at - SIGMA) * w**2).sum(-1)
    return (expected + near + empty) * (depth > 0)


class _Bench(harness.Bench):
    op = staticmethod(rayfuse.depth_loss)
    workloads = (
        Workload((4096,), dict(S=48)),
        Workload((65536,), dict(S=48)),
        Workload((32768,), dict(S=128)),
        Workload((65536,), dict(S=48), torch.bfloat16),
    )
    growth = ("S", (64, 256, 1024, 4096), (1024,), ("eager",))
    bound, goal = 1.8, 1.2
    page = "depth"


class BenchDsNerfDepthLoss(_Bench):
    title = "DS-NeRF,"
    options = dict(form="ds_nerf", sigma=SIGMA, depth_pred=None)
    directions = ((), ("w",), ("w", "s"))
    peers = (peers.eager("", ds_nerf), peers.compiled("", ds_nerf))


class BenchUrbanDepthLoss(_Bench):
    title = "Urban Radiance Fields,"
    options = dict(form="urban", sigma=SIGMA, lengths=None)
    directions = ((), ("w", "depth_pred"), ("w", "s", "depth_pred"))
    peers = (peers.eager("", urban), peers.compiled("", urban))
