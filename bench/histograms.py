"""What benches of lookups in histograms along rays share: samples, and results that are those of
the reference to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import harness
import peers
import rayfuse
from harness import Workload
from rayfuse import backend
from rayfuse.domain import csr, csr_env
from rayfuse.packed import PackedRays


def rising(leading: tuple[int, ...], n: int, seed: int) -> Tensor:
    """Values from 0 to 1 at n edges of each ray, with steep and flat parts."""
    u = torch.rand((*leading, n - 1), generator=torch.Generator().manual_seed(seed)) ** 4 + 0.01
    values = torch.cat([torch.zeros_like(u[..., :1]), u.cumsum(-1)], -1)
    return values / values[..., -1:]


def packed_rising(offsets: Tensor, n: int, seed: int) -> Tensor:
    """The same at n edges of packed rays, from 0 on."""
    u = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = (u**4 + 0.01).cumsum(0)
    return (values - PackedRays(offsets, n).at_first(values)).float()


def ragged(rays: int, n: int, domain: Any = csr) -> Tensor:
    """Offsets of rays with n samples on average, a quarter of them without any."""
    u = torch.rand(rays + 1, generator=torch.Generator().manual_seed(rays + n))
    return domain.from_uniform(u, rays * n)


class HistogramBench(harness.Bench):
    """The bench of a form of a lookup: `op` takes the tensors of `samples`."""

    samples: Callable[[Workload], dict[str, Tensor]]
    stem = ""
    growth = test_growth = test_call_overhead = None
    page = "interlevel"
    also: Sequence[peers.Peer] = ()

    def inputs(self, workload: Workload) -> dict[str, Tensor]:
        return {name: x.to(peers.device) for name, x in self.samples(workload).items()}

    def d_outputs(self, workload: Workload) -> None:
        return None

    def contenders(self) -> list[peers.Peer]:
        slower = backend.isas()[:-1] if peers.device.type == "cpu" else ()
        return [
            peers.ours(self.op),
            *(peers.ours(self.op, f"rayfuse {isa}", f"cpu.{isa}") for isa in slower),
            peers.ours(self.op, "eager reference", "ref"),
            *self.also,
        ]

    def bytes_moved(self, workload: Workload, wants: Sequence[str]) -> int:
        """Inputs are read and results written."""
        inputs = self.inputs(workload)
        results = peers.as_tuple(self.op(*inputs.values()))
        return sum(x.nbytes for x in (*inputs.values(), *results))

    def errors(
        self,
        results: Sequence[Tensor],
        inputs: dict[str, Tensor],
        wants: Sequence[str],
        d_outputs: Sequence[Tensor] | None,
    ) -> tuple[float, bool]:
        with rayfuse.use_backend("ref"):
            truth = peers.as_tuple(self.op(*inputs.values()))
        errors = harness.relative_errors(results, [x.double() for x in truth])
        return max(errors), all(torch.equal(x, y) for x, y in zip(results, truth, strict=True))


def edges_of_rays(workload: Workload) -> tuple[Tensor, int]:
    """Offsets of packed edges, and their number."""
    rays, n = workload.leading[0], workload.sizes["E"]
    return ragged(rays, n, csr_env), rays * n
