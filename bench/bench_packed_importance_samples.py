"""packed_importance_sampling and importance_sampling beside PyTorch: the reference, and for equally
many edges torch.searchsorted and gathers, as nerfstudio's PDFSampler."""

from __future__ import annotations

import torch
from torch import Tensor

import histograms
import peers
import rayfuse
from harness import Workload

COUNT = 48
WORKLOADS = (
    Workload((4096,), dict(E=97)),
    Workload((65536,), dict(E=97)),
    Workload((4096,), dict(E=257)),
)


def inverse_cdf(edges: Tensor, cdf: Tensor) -> Tensor:
    """nerfstudio 1.1.5 draws edges, one more than samples, instead of intervals around samples."""
    step = 1 / (COUNT + 1)
    u = torch.linspace(0, 1 - step, COUNT + 1, device=cdf.device) + step / 2
    u = u.expand(*cdf.shape[:-1], COUNT + 1).contiguous()
    found = torch.searchsorted(cdf, u, side="right")
    below, above = (found - 1).clamp(0, cdf.shape[-1] - 1), found.clamp(0, cdf.shape[-1] - 1)
    cdf0, cdf1 = cdf.gather(-1, below), cdf.gather(-1, above)
    edges0, edges1 = edges.gather(-1, below), edges.gather(-1, above)
    part = torch.clip(torch.nan_to_num((u - cdf0) / (cdf1 - cdf0), 0), 0, 1)
    return edges0 + part * (edges1 - edges0)


class BenchImportanceSampling(histograms.HistogramBench):
    stem, title = "packed_importance_samples", "dense"
    workloads = WORKLOADS
    also = (peers.eager("nerfstudio", inverse_cdf, mean=False),)

    @staticmethod
    def op(edges: Tensor, cdf: Tensor) -> Tensor:
        return rayfuse.importance_sampling(edges, cdf, COUNT)

    def samples(self, workload: Workload) -> dict[str, Tensor]:
        leading, E = workload.leading, workload.sizes["E"]
        return dict(edges=histograms.rising(leading, E, 0), cdf=histograms.rising(leading, E, 1))


class BenchPackedImportanceSampling(histograms.HistogramBench):
    stem, title = "packed_importance_samples", "packed"
    workloads = WORKLOADS

    @staticmethod
    def op(edges: Tensor, cdf: Tensor, edge_offsets: Tensor) -> tuple[Tensor, Tensor]:
        return rayfuse.packed_importance_sampling(edges, cdf, edge_offsets, COUNT)

    def samples(self, workload: Workload) -> dict[str, Tensor]:
        offsets, Q = histograms.edges_of_rays(workload)
        return dict(
            edges=histograms.packed_rising(offsets, Q, 0),
            cdf=histograms.packed_rising(offsets, Q, 1),
            edge_offsets=offsets,
        )
