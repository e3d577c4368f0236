"""intersect_tiles beside its reference in vectorised PyTorch, and gsplat's loop where that ends.

RAYFUSE_GARDEN=test_garden.npz, of gsplat's assets, adds the points of a real garden.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import gsplat_step
import harness
import peers
import rayfuse
from harness import Workload
from rayfuse import backend

TILE = 16
GARDEN = os.environ.get("RAYFUSE_GARDEN")
GARDEN_SPLATS = 111_785
LOOP_SPLATS = 1000


@functools.cache
def projected(N: int, width: int, height: int) -> dict[str, Tensor]:
    """Random splats, two pixels wide in the median; or, of their number, those of the garden."""
    if N == GARDEN_SPLATS:
        gaussians, (viewmats, Ks, *_) = gsplat_step.scene(GARDEN or "")
        del gaussians["colors"]
    else:
        generator = torch.Generator().manual_seed(0)
        middle = torch.tensor([width / 2, height / 2])
        plane = torch.rand(N, 2, generator=generator) * 2 * middle - middle
        depth = 1 + 9 * torch.rand(N, 1, generator=generator)
        size = 2 * torch.exp(0.5 * torch.randn(N, 3, generator=generator))
        gaussians = dict(
            means=torch.cat([plane * depth / width, depth], 1),
            quats=torch.randn(N, 4, generator=generator),
            scales=size * depth / width,
            opacities=torch.rand(N, generator=generator),
        )
        viewmats = torch.eye(4)[None]
        Ks = torch.tensor([[[width, 0, middle[0]], [0, width, middle[1]], [0, 0, 1]]])
    splats = rayfuse.project_gaussians(
        gaussians.pop("means"), viewmats, Ks, **gaussians, image_width=width, image_height=height
    )
    return dict(
        means2d=splats.means2d,
        radii=splats.radii,
        depths=splats.depths,
        conics=splats.conics,
        opacities=gaussians["opacities"][None],
    )


class BenchIntersectTiles(harness.Bench):
    """By boxes, which are what gsplat lists."""

    op = staticmethod(rayfuse.intersect_tiles)
    stem = "intersect_tiles"
    title = "boxes,"
    names: tuple[str, ...] = ("means2d", "radii", "depths")
    # splats, and the picture
    workloads = (
        Workload((LOOP_SPLATS,), dict(W=640, H=480)),
        Workload((100_000,), dict(W=640, H=480)),
        Workload((1_000_000,), dict(W=640, H=480)),
        *([Workload((GARDEN_SPLATS,), dict(W=648, H=420))] if GARDEN else []),
    )
    gpu_times = 1
    page = "splats"

    test_growth = None
    test_call_overhead = None

    def inputs(self, workload: Workload) -> dict[str, Tensor]:
        splats = projected(*workload.leading, *workload.sizes.values())
        return {name: splats[name].to(peers.device) for name in self.names}

    def d_outputs(self, workload: Workload) -> None:
        return None

    def lists(self, *inputs: Tensor) -> rayfuse.TileLists:
        ellipses = dict(zip(("conics", "opacities"), inputs[3:], strict=False))
        return rayfuse.intersect_tiles(*inputs[:3], TILE, *self.grid, **ellipses)

    def bytes_moved(self, workload: Workload, wants: Sequence[str]) -> int:
        inputs = [*self.inputs(workload).values()]
        return sum(x.nbytes for x in (*inputs, *self.lists(*inputs)))

    def contenders(self) -> list[peers.Peer]:
        others = {isa: f"cpu.{isa}" for isa in backend.isas()[:-1]}
        if peers.device.type != "cpu":
            others = {}
        slower = [peers.ours(self.lists, f"rayfuse {isa}", name) for isa, name in others.items()]
        return [
            peers.ours(self.lists),
            *slower,
            peers.ours(self.lists, "vectorised PyTorch", "ref"),
            peers.eager("gsplat", self.gsplat, mean=False, module="gsplat", refuse=refuse),
        ]

    def gsplat(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        from gsplat.cuda import _torch_impl

        return _torch_impl._isect_tiles(*inputs[:3], TILE, *self.grid)

    def errors(
        self, results: Sequence[Tensor], inputs: dict[str, Tensor], *_: Any
    ) -> tuple[float, bool]:
        """The part of the splats that have another number of tiles than in PyTorch."""
        with rayfuse.use_backend("ref"):
            wanted = self.lists(*inputs.values()).tiles_per_splat
        error = float((results[0] != wanted).double().mean())
        # where products are fused with sums, a pair may be on the other side of the slack
        return error, error <= 1e-4

    def test_speed(self, benchmark: Any, workload: Workload, wants: tuple[str, ...]) -> None:
        self.grid = [-(-side // TILE) for side in workload.sizes.values()]
        super().test_speed(benchmark, workload, wants)


class BenchEllipses(BenchIntersectTiles):
    title = "ellipses,"
    names = ("means2d", "radii", "depths", "conics", "opacities")

    def contenders(self) -> list[peers.Peer]:
        return super().contenders()[:-1]


def refuse(leading: tuple[int, ...], sizes: dict[str, int], dtype: torch.dtype) -> str | None:
    return "its loop takes minutes" if leading[0] > LOOP_SPLATS else None
