"""packed_normal_losses beside what people write: the two losses of nerfstudio sample by sample,
added along rays as nerfacc does."""

from __future__ import annotations

import torch
from torch import Tensor

import harness
import peers
import rayfuse
from bench_packed_render_features import add_along_rays
from harness import Workload


def two_losses(
    w: Tensor, n: Tensor, offsets: Tensor, n_pred: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """One after the other, with the direction of each sample's ray gathered first."""
    v = -torch.repeat_interleave(d, offsets.diff(), 0, output_size=len(w))
    towards = (n * v).sum(-1)
    orientation = add_along_rays(w * torch.fmin(torch.zeros_like(towards), towards) ** 2, offsets)
    return orientation, add_along_rays(w * (1 - (n * n_pred).sum(-1)), offsets)


class BenchPackedNormalLosses(harness.PackedBench):
    op = staticmethod(rayfuse.packed_normal_losses)
    workloads = (
        # what instant-ngp aims at: 2^18 samples in all
        Workload((4096,), dict(P=64)),
        Workload((65536,), dict(P=48)),
        Workload((65536,), dict(P=48), torch.bfloat16),
    )
    directions = ((), ("w", "n", "n_pred"), ("w", "n", "n_pred", "d"))
    peers = (peers.eager("nerfacc", two_losses), peers.compiled("nerfacc", two_losses))
    growth = ("P", (16, 64, 256, 1024), (4096,), ("eager nerfacc",))
    page = "normals"
