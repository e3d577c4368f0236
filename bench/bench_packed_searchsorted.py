"""packed_searchsorted and searchsorted beside PyTorch: the reference, which bisects for all queries
at once, and for equally many edges torch.searchsorted."""

from __future__ import annotations

import torch
from torch import Tensor

import histograms
import peers
import rayfuse
from harness import Workload

WORKLOADS = (
    Workload((4096,), dict(E=97, S=49)),
    Workload((65536,), dict(E=97, S=49)),
    Workload((4096,), dict(E=257, S=97)),
)


def neighbours(edges: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    right = torch.searchsorted(edges[..., :-1].contiguous(), queries, right=True)
    return (right - 1).clamp_(min=0), right


class BenchSearchsorted(histograms.HistogramBench):
    stem, title = "packed_searchsorted", "dense"
    op = staticmethod(rayfuse.searchsorted)
    workloads = WORKLOADS
    also = (peers.eager("torch.searchsorted", neighbours, mean=False),)

    def samples(self, workload: Workload) -> dict[str, Tensor]:
        sizes = workload.sizes
        return dict(
            edges=histograms.rising(workload.leading, sizes["E"], 0),
            queries=histograms.rising(workload.leading, sizes["S"], 1),
        )


class BenchPackedSearchsorted(histograms.HistogramBench):
    stem, title = "packed_searchsorted", "packed"
    op = staticmethod(rayfuse.packed_searchsorted)
    workloads = WORKLOADS

    def samples(self, workload: Workload) -> dict[str, Tensor]:
        rays, S = workload.leading[0], workload.sizes["S"]
        edge_offsets, Q = histograms.edges_of_rays(workload)
        query_offsets = histograms.ragged(rays, S)
        return dict(
            edges=histograms.packed_rising(edge_offsets, Q, 0),
            edge_offsets=edge_offsets,
            queries=histograms.packed_rising(query_offsets, rays * S, 1),
            query_offsets=query_offsets,
        )
