"""packed_render_features beside what people use: nerfacc's sum by the index of a sample's ray."""

from __future__ import annotations

import torch
from torch import Tensor

import harness
import peers
import rayfuse
from harness import Workload

PACKED_FEATURE_WORKLOADS = (
    # what instant-ngp aims at: 2^18 samples in all
    Workload((4096,), dict(P=64, C=3)),
    Workload((4096,), dict(P=64, C=64)),
    Workload((4096,), dict(P=64, C=64), narrow=torch.float16),
    Workload((4096,), dict(P=48, C=768)),
)


def add_along_rays(x: Tensor, offsets: Tensor) -> Tensor:
    """The sums of x [P, ...] over the samples of each ray, one sample after the other."""
    ray = torch.repeat_interleave(offsets.diff(), output_size=len(x))
    return x.new_zeros(len(offsets) - 1, *x.shape[1:]).index_add(0, ray, x)


def accumulate(w: Tensor, f: Tensor, offsets: Tensor) -> Tensor:
    """nerfacc's accumulate_along_rays: the product is stored."""
    return add_along_rays(w[:, None] * f, offsets)


class BenchPackedRenderFeatures(harness.PackedBench):
    op = staticmethod(rayfuse.packed_render_features)
    workloads = PACKED_FEATURE_WORKLOADS
    gpu_times = 4
    directions = ((), ("w", "f"))
    peers = (
        peers.eager("nerfacc", accumulate, mean=False),
        peers.compiled("nerfacc", accumulate, mean=False),
    )
    growth = ("P", (16, 64, 256), (4096,), ("eager nerfacc",))
    page = "features"
