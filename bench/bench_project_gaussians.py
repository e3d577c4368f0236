"""project_gaussians beside gsplat's projection in PyTorch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import harness
import peers
import rayfuse
from harness import Workload

IMAGE = dict(image_width=40, image_height=30)
SHAPE = ("means", "quats", "scales")


def gsplat_projection(
    means: Tensor, viewmats: Tensor, Ks: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor
) -> tuple[Tensor, ...]:
    """Which knows no opacities, and gives what is culled its values and gradients all the same."""
    from gsplat.cuda import _torch_impl

    covars, _ = _torch_impl._quat_scale_to_covar_preci(quats, scales, compute_preci=False)
    _, *outputs = _torch_impl._fully_fused_projection(
        means, covars, viewmats, Ks, *IMAGE.values(), calc_compensations=True
    )
    return tuple(outputs)


class BenchProjectGaussians(harness.Bench):
    op = staticmethod(rayfuse.project_gaussians)
    options = dict(IMAGE, covars=None)
    # Gaussians and cameras
    workloads = (
        Workload((1,), dict(N=138_766, C=1)),
        Workload((1,), dict(N=1_000_000, C=1)),
        Workload((1,), dict(N=138_766, C=4)),
    )
    gpu_times = 1
    directions = ((), SHAPE, (*SHAPE, "viewmats"))
    peers = (
        peers.eager("gsplat", gsplat_projection, mean=False, module="gsplat"),
        peers.compiled("gsplat", gsplat_projection, mean=False, module="gsplat"),
    )
    growth = ("N", (1 << 14, 1 << 16, 1 << 18, 1 << 20), (1,), ("eager gsplat",))
    page = "splats"

    # radii have no gradient: they count among the bytes alone

    def closed(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        call = super().closed(function, **options)

        def without_radii(*tensors: Tensor) -> tuple[Tensor, ...]:
            means2d, depths, conics, _, compensations = call(*tensors)
            return means2d, depths, conics, compensations

        return without_radii

    def d_outputs(self, workload: Workload) -> list[Tensor]:
        drawn = super().d_outputs(workload)
        assert drawn is not None
        return [drawn[i] for i in (0, 1, 2, 4)]
