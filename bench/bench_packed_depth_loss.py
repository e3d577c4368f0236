"""packed_depth_loss beside both losses as nerfstudio writes them, summed up with index_add."""

from __future__ import annotations

import torch
from torch import Tensor

import harness
import peers
import rayfuse
from bench_depth_loss import SIGMA
from harness import Workload


def ray_of_each(w: Tensor, offsets: Tensor) -> Tensor:
    return torch.repeat_interleave(offsets.diff(), output_size=len(w))


def ds_nerf(w: Tensor, s: Tensor, depth: Tensor, offsets: Tensor, lengths: Tensor) -> Tensor:
    ray = ray_of_each(w, offsets)
    bell = torch.exp(-((s - depth[ray]) ** 2) / (2 * SIGMA))
    each = -torch.log(w + 1e-7) * bell * lengths
    return torch.zeros_like(depth).index_add(0, ray, each) * (depth > 0)


def urban(w: Tensor, s: Tensor, depth: Tensor, offsets: Tensor, depth_pred: Tensor) -> Tensor:
    ray = ray_of_each(w, offsets)
    target = torch.distributions.normal.Normal(0.0, SIGMA / 3, validate_args=False)
    at = depth[ray]
    is_near = torch.logical_and(s <= at + SIGMA, s >= at - SIGMA)
    each = is_near * (w - torch.exp(target.log_prob(s - at))) ** 2 + (s < at - SIGMA) * w**2
    loss = (depth - depth_pred) ** 2
    return loss.index_add(0, ray, each) * (depth > 0)


class _Bench(harness.PackedBench):
    op = staticmethod(rayfuse.packed_depth_loss)
    workloads = (
        # 2^18 samples in all
        Workload((4096,), dict(P=64)),
        Workload((65536,), dict(P=48)),
        Workload((65536,), dict(P=48), torch.bfloat16),
    )
    growth = ("P", (16, 64, 256, 1024), (4096,), ("eager",))
    page = "depth"


class BenchPackedDsNerfDepthLoss(_Bench):
    title = "DS-NeRF,"
    options = dict(form="ds_nerf", sigma=SIGMA, depth_pred=None)
    directions = ((), ("w",), ("w", "s"))
    peers = (peers.eager("", ds_nerf),)


class BenchPackedUrbanDepthLoss(_Bench):
    title = "Urban Radiance Fields,"
    options = dict(form="urban", sigma=SIGMA, lengths=None)
    directions = ((), ("w", "depth_pred"), ("w", "s", "depth_pred"))
    peers = (peers.eager("", urban),)
