"""packed_alpha_weights beside what people use: the logarithm's sums, as products have no packed
form in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

import harness
import peers
import rayfuse
from harness import Workload


def by_logarithms(alpha: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `render_weight_from_alpha` of nerfacc computes, wrong where alpha = 1.

    Sums are of all rays, less what lies before each.
    """
    ray = torch.repeat_interleave(offsets.diff(), output_size=len(alpha))
    passed = torch.cat([alpha.new_zeros(1), torch.log1p(-alpha).cumsum(0)])
    before = passed[offsets]
    transmittance = torch.exp(passed[:-1] - before[ray])
    return transmittance * alpha, transmittance, torch.exp(before.diff())


class BenchPackedAlphaWeights(harness.PackedBench):
    op = staticmethod(rayfuse.packed_alpha_weights)
    title = "packed_alpha_weights"
    workloads = (
        Workload((4096,), dict(P=64)),
        Workload((8192,), dict(P=32)),
        Workload((65536,), dict(P=48)),
        Workload((1_000_000,), dict(P=1)),
        Workload((65536,), dict(P=48), torch.bfloat16),
    )
    directions = ((), ("alpha",))
    peers = (
        peers.eager("by logarithms", by_logarithms, mean=False),
        peers.eager("reference", rayfuse.packed_alpha_weights.op.reference, mean=False),
        peers.compiled("by logarithms", by_logarithms, mean=False),
    )
    growth = ("P", (16, 64, 256, 1024), (4096,), ("eager by logarithms",))
    page = "compositing"
