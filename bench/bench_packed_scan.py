"""packed_scan beside what people use: sums of all rays less what lies before each; products have
no such form that is right at 0."""

from __future__ import annotations

import torch
from torch import Tensor

import harness
import peers
import rayfuse
from harness import Workload

WORKLOADS = (
    Workload((4096,), dict(P=64)),
    Workload((8192,), dict(P=32)),
    Workload((65536,), dict(P=48)),
    Workload((1_000_000,), dict(P=1)),
    Workload((65536,), dict(P=48), torch.bfloat16),
)


def sums(x: Tensor, offsets: Tensor) -> Tensor:
    ray = torch.repeat_interleave(offsets.diff(), output_size=len(x))
    total = torch.cat([x.new_zeros(1), x.cumsum(0)])
    return total[1:] - total[offsets[ray]]


class BenchPackedSums(harness.PackedBench):
    op = staticmethod(rayfuse.packed_scan)
    options = {"kind": "sum"}
    title = "sums"
    workloads = WORKLOADS
    directions = ((), ("x",))
    peers = (
        peers.eager("", sums, mean=False),
        peers.compiled("", sums, mean=False),
    )
    growth = ("P", (16, 64, 256, 1024), (4096,), ("eager", "compile"))
    page = "compositing"


class BenchPackedProducts(harness.PackedBench):
    op = staticmethod(rayfuse.packed_scan)
    options = {"kind": "prod"}
    title = "products"
    workloads = WORKLOADS
    directions = ((), ("x",))
    peers = (
        peers.eager(
            "reference",
            lambda x, offsets: rayfuse.packed_scan.op.reference(x, offsets, kind="prod"),
            mean=False,
        ),
    )
    growth = ("P", (16, 64, 256, 1024), (4096,), ("eager reference",))
    page = "compositing"
