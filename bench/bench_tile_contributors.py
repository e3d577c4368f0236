"""tile_contributors, as multiples of the time that torch.exp takes for as many values as there are
pairs of a pixel and a splat in its tile's list: it goes through them twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

import bench_composite_tiles
import rayfuse
from harness import Workload


class BenchTileContributors(bench_composite_tiles.BenchCompositeTiles):
    workloads = (
        Workload((320, 240), dict(N=64, S=3, D=3)),
        Workload((320, 240), dict(N=200, S=8, D=3)),
    )
    directions = ((),)
    stem = "tile_contributors"

    def bytes_moved(self, workload: Workload, wants: Sequence[str]) -> int:
        inputs = self.inputs(workload)
        del inputs["colors"]
        width, height = workload.leading
        ids = rayfuse.tile_contributors(*inputs.values(), image_width=width, image_height=height)[1]
        return sum(x.nbytes for x in inputs.values()) + 4 * width * height + 12 * len(ids)

    def contenders_of(self, workload: Workload) -> dict[str, Callable[..., Any]]:
        width, height = workload.leading

        def counts(*inputs: Tensor) -> tuple[Tensor]:
            means2d, conics, _, *rest = inputs
            found = rayfuse.tile_contributors(
                means2d, conics, *rest, image_width=width, image_height=height
            )
            return (found.counts,)

        def of_reference(*inputs: Tensor) -> tuple[Tensor]:
            with rayfuse.use_backend("ref"):
                return counts(*inputs)

        return {"rayfuse": counts, "PyTorch": of_reference}
