"""splat_covariances beside gsplat's reference in PyTorch, eager and compiled, for as many splats as
a scene of 3D Gaussian splatting begins with."""

from __future__ import annotations

import torch
from torch import Tensor

import harness
import peers
import rayfuse
from harness import Workload


def of_gsplat(quats: Tensor, scales: Tensor) -> Tensor:
    from gsplat.cuda._torch_impl import _quat_scale_to_covar_preci

    return _quat_scale_to_covar_preci(quats, scales, compute_preci=False, triu=True)[0]


class BenchSplatCovariances(harness.Bench):
    op = staticmethod(rayfuse.splat_covariances)
    options = dict(triu=True)
    workloads = (
        Workload((111_000,), {}),
        Workload((1_000_000,), {}),
        Workload((111_000,), {}, torch.float64),
    )
    directions = ((), ("quats", "scales"))
    peers = (
        peers.eager("gsplat", of_gsplat, mean=False, module="gsplat"),
        peers.compiled("gsplat", of_gsplat, mean=False, module="gsplat"),
    )
    # along splats, of which none depends on another
    growth = test_growth = None
    page = "splats"

    def _sizes(self, workload: Workload) -> dict[str, int]:
        return {"M": 6}
