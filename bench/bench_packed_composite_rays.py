"""packed_composite_rays beside what people use: nerfacc's rendering in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

import harness
import peers
import rayfuse
from harness import Workload


def accumulate_along_rays(values: Tensor, ray: Tensor, rays: int) -> Tensor:
    return values.new_zeros(rays, values.shape[1]).index_add_(0, ray, values)


def rendering(
    t_starts: Tensor,
    t_ends: Tensor,
    sigma: Tensor,
    offsets: Tensor,
    f: Tensor,
    background: Tensor,
) -> tuple[Tensor, ...]:
    """`rendering` of nerfacc: weights from densities, then a sum along rays for each output.

    Its running sums along rays need a GPU: here they are of all rays, less what lies before each.
    """
    rays = len(offsets) - 1
    ray = torch.repeat_interleave(offsets.diff(), output_size=len(sigma))
    x = sigma * (t_ends - t_starts)
    total = torch.cat([x.new_zeros(1), x.cumsum(0)])
    w = torch.exp(total[offsets[ray]] - total[:-1]) * (1 - torch.exp(-x))
    accumulation = accumulate_along_rays(w[:, None], ray, rays)
    features = accumulate_along_rays(w[:, None] * f, ray, rays) + background * (1 - accumulation)
    mid = (t_starts + t_ends)[:, None] / 2
    depth = accumulate_along_rays(w[:, None] * mid, ray, rays)
    depth = depth / accumulation.clamp_min(torch.finfo(w.dtype).eps)
    return features, depth[:, 0], accumulation[:, 0]


class BenchPackedCompositeRays(harness.PackedBench):
    """Densities to colour, depth and accumulation."""

    op = staticmethod(rayfuse.packed_composite_rays)
    options = dict(density=True)
    title = "from densities,"
    workloads = (
        # what instant-ngp aims at: 2^18 samples in all
        Workload((4096,), dict(P=64, C=3)),
        Workload((65536,), dict(P=48, C=3)),
        Workload((65536,), dict(P=48, C=3), narrow=torch.float16),
        Workload((4096,), dict(P=64, C=16)),
    )
    directions = ((), ("w", "f"))
    peers = (
        peers.eager("", rendering, mean=False),
        peers.compiled("", rendering, mean=False),
    )
    growth = ("P", (16, 64, 256, 1024), (4096,), ("eager", "compile"))
    page = "compositing"
