"""packed_ray_weights beside what people use: nerfacc's formulas in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

import harness
import peers
import rayfuse
from harness import Workload


def in_torch(
    sigma: Tensor, t_starts: Tensor, t_ends: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As nerfacc's `render_weight_from_density`.

    Its running sums along rays need a GPU: here they are of all rays, less what lies before each.
    """
    x = sigma * (t_ends - t_starts)
    ray = torch.repeat_interleave(offsets.diff(), output_size=len(x))
    depth = torch.cat([x.new_zeros(1), x.cumsum(0)])
    before = depth[offsets]
    transmittance = torch.exp(-(depth[:-1] - before[ray]))
    w = transmittance * (1 - torch.exp(-x))
    return w, transmittance, torch.exp(-before.diff())


class BenchPackedRayWeights(harness.PackedBench):
    op = staticmethod(rayfuse.packed_ray_weights)
    title = "packed_ray_weights"
    workloads = (
        # what instant-ngp aims at: 2^18 samples in all
        Workload((4096,), dict(P=64)),
        Workload((8192,), dict(P=32)),
        Workload((65536,), dict(P=48)),
        Workload((1_000_000,), dict(P=1)),
        Workload((65536,), dict(P=48), torch.bfloat16),
    )
    directions = ((), ("sigma",), ("sigma", "t_starts", "t_ends"))
    peers = (
        peers.eager("", in_torch, mean=False),
        peers.eager("reference", rayfuse.packed_ray_weights.op.reference, mean=False),
        peers.compiled("", in_torch, mean=False),
    )
    growth = ("P", (16, 64, 256, 1024), (4096,), ("eager", "compile"))
    page = "compositing"
