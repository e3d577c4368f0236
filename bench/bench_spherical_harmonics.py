"""spherical_harmonics beside gsplat's reference in PyTorch, eager and compiled, for as many splats
as a scene of 3D Gaussian splatting begins with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import harness
import peers
import rayfuse
from harness import Workload

DEGREE = 3


def of_gsplat(dirs: Tensor, coeffs: Tensor) -> Tensor:
    from gsplat.cuda._torch_impl import _spherical_harmonics

    shared = coeffs[..., None, :, :, :].expand(*dirs.shape[:-1], *coeffs.shape[-2:])
    return _spherical_harmonics(DEGREE, dirs, shared)


class BenchSphericalHarmonics(harness.Bench):
    op = staticmethod(rayfuse.spherical_harmonics)
    options = dict(degree=DEGREE, masks=None)
    workloads = (
        Workload((1,), dict(C=1, N=111_000, K=16, D=3)),
        Workload((1,), dict(C=4, N=111_000, K=16, D=3)),
        Workload((1,), dict(C=1, N=111_000, K=16, D=3), narrow=torch.bfloat16),
    )
    gpu_times = 1
    directions = ((), ("coeffs",), ("dirs", "coeffs"))
    peers = (
        peers.eager("gsplat", of_gsplat, mean=False, module="gsplat"),
        peers.compiled("gsplat", of_gsplat, mean=False, module="gsplat"),
    )
    # along splats, of which none depends on another
    growth = test_growth = None
    page = "splats"

    def _sizes(self, workload: Workload) -> dict[str, int]:
        return workload.sizes

    def inputs(self, workload: Workload) -> dict[str, Tensor]:
        # the tiny call of the overhead has coefficients enough
        K = max(workload.sizes["K"], (DEGREE + 1) ** 2)
        return super().inputs(replace(workload, sizes={**workload.sizes, "K": K}))
