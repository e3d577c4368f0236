"""Packed rays: samples lie end to end, ray r has samples offsets[r] up to offsets[r + 1].

What ops on them share beyond the engine: samples of tests and benches, checks, and the running sums
of the references.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .op import Op


class PackedOp(Op):
    """An op whose inputs end in `offsets[R+1]`, and may hold the intervals t_starts and t_ends."""

    def sample(
        self,
        leading: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **sizes: int,
    ) -> list[Tensor]:
        """Random inputs: each ray's intervals in order from 0 on, some with gaps between them."""
        values = super().sample(leading, dtype, seed, **sizes)
        named = dict(zip(self.inputs, values, strict=True))
        if "t_starts" in named:
            generator = torch.Generator().manual_seed(seed + 1)
            u = torch.rand(2, sizes["P"], generator=generator, dtype=torch.float64)
            # half of the intervals begin where the one before ends
            gap, width = (2 * u[0] - 1).clamp(min=0), 0.05 + u[1]
            ends = (gap + width).cumsum(0)
            # in a sum of all rays the others' rounding would show
            rays = PackedRays(named["offsets"], sizes["P"])
            near = ends - rays.at_first(ends - width - gap)
            scale = max(sizes["R"], 1) / max(sizes["P"], 1)
            named["t_starts"] = (scale * (near - width)).to(dtype)
            named["t_ends"] = (scale * near).to(dtype)
        return [*named.values()]

    def _reference_fwd(self, *args: Any) -> Any:
        offsets, P = args[self.inputs.index("offsets")], len(args[0])
        # on the CPU kernels look at the offsets as well, as it costs no synchronisation
        if offsets.device.type == "cpu":
            self._check_offsets(offsets, P)
        return super()._reference_fwd(*args)

    def _check_offsets(self, offsets: Tensor, P: int) -> None:
        wrong = self.domain["offsets"].holds(offsets, P).logical_not().nonzero()
        if len(wrong):
            at = int(wrong[0])
            rule = self.domain["offsets"].rule
            self._fail(ValueError, "offsets", rule, f"{offsets[at].item()} at [{at}]")

    def _check_values(self, named: dict[str, Tensor]) -> None:
        super()._check_values(named)
        if "t_starts" not in named:
            return
        starts, ends = named["t_starts"], named["t_ends"]
        first = PackedRays(named["offsets"], len(starts)).place == 0
        before = torch.where(first, starts, torch.cat([starts[:1], ends[:-1]]))
        for name, early, late in (("t_starts", before, starts), ("t_ends", starts, ends)):
            wrong = (late < early).nonzero()
            if len(wrong):
                at = int(wrong[0])
                rule = "not decrease along a ray, from start to end to the next start"
                self._fail(ValueError, name, rule, f"{late[at].item():g} at [{at}]")


class PackedRays:
    """Where the samples of rays lie, and sums along them in plain PyTorch.

    Rays never meet in a sum, so that none sees another's rounding, or its NaN.
    """

    def __init__(self, offsets: Tensor, P: int) -> None:
        self.offsets = offsets.clamp(0, P)
        sample = torch.arange(P, device=offsets.device)
        rays = max(len(offsets) - 1, 1)
        self.ray = torch.searchsorted(offsets[1:].contiguous(), sample, right=True).clamp(
            max=rays - 1
        )
        self.place = sample - self.offsets[self.ray]
        """[P] of each sample, how many of its ray come before it."""

    def at_first(self, x: Tensor) -> Tensor:
        """[P] of each sample, the value of the first one of its ray."""
        return x[self.offsets[self.ray].clamp(max=max(len(x) - 1, 0))]

    def before(self, x: Tensor, first: Tensor | float) -> Tensor:
        """[P] of each sample, the value of the one before it; `first` for a ray's first."""
        return torch.where(self.place > 0, torch.cat([x[:1], x[:-1]]), first)

    def running_sum(self, x: Tensor) -> Tensor:
        """[P] of each sample, the sum from its ray's first one up to it, in log2(longest) steps."""
        longest = int(self.place.max()) + 1 if len(x) else 0
        step = 1
        while step < longest:
            earlier = torch.cat([x.new_zeros(step), x[:-step]])
            x = x + torch.where(self.place >= step, earlier, 0.0)
            step *= 2
        return x

    def total(self, x: Tensor) -> Tensor:
        """[R] of each ray, the sum over its samples; 0 where it has none."""
        sums = torch.cat([x.new_zeros(1), self.running_sum(x)])
        return sums[torch.where(self.offsets.diff() > 0, self.offsets[1:], 0)]
