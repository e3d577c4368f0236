"""Packed rays: samples lie end to end, ray r has samples offsets[r] up to offsets[r + 1].

What ops on them share beyond the engine: samples of tests and benches, checks, and the running sums
of the references.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import backend
from .op import Op


def ray_offsets(ray_indices: Tensor, rays: int) -> Tensor:
    """Where the samples of each ray begin, from the ray that each sample belongs to.

    Args:
        ray_indices: [P] int64, not decreasing, each at least 0 and less than rays.
        rays: R, the number of rays, those without samples included.

    Returns:
        offsets [R+1] int64: ray r has samples offsets[r] up to offsets[r + 1]. Where ray_indices
        decrease or leave the rays, a ValueError on the CPU or in debug mode; elsewhere a look at
        them would synchronise, and offsets are wrong in silence.

    Raises:
        ValueError: see above, and for a shape other than [P].
        TypeError: for ray_indices that are not int64, or rays that is no integer.

    Example:
        >>> import torch, rayfuse
        >>> rayfuse.ray_offsets(torch.tensor([0, 0, 2]), 4)
        tensor([0, 2, 2, 3, 3])
    """

    def fail(error: type[Exception], name: str, rule: str, got: object) -> None:
        raise error(f"ray_offsets: {name} must {rule}, got {got}")

    if not isinstance(rays, int) or isinstance(rays, bool):
        fail(TypeError, "rays", "be an integer", type(rays).__name__)
    if not isinstance(ray_indices, Tensor) or ray_indices.dtype != torch.int64:
        got = getattr(ray_indices, "dtype", type(ray_indices).__name__)
        fail(TypeError, "ray_indices", "be an int64 tensor", str(got).removeprefix("torch."))
    if rays < 0:
        fail(ValueError, "rays", "be >= 0", rays)
    if ray_indices.dim() != 1:
        fail(ValueError, "ray_indices", "have shape [P]", list(ray_indices.shape))
    if ray_indices.device.type == "cpu" or backend.debugging():
        least = torch.cat([ray_indices.new_zeros(1), ray_indices])[:-1]
        wrong = ((ray_indices < least) | (ray_indices >= rays)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            rule = f"not decrease, and be from 0 to {rays - 1}"
            fail(ValueError, "ray_indices", rule, f"{int(ray_indices[at])} at [{at}]")
    starts = torch.arange(rays + 1, device=ray_indices.device)
    return torch.searchsorted(ray_indices.contiguous(), starts)


_RAY_INDICES_DOC = """
Keyword Args:
    ray_indices, rays: [P] int64, not decreasing, and the number of rays: they may be given in place
        of offsets (`ray_offsets`).
"""


class PackedOp(Op):
    """An op on packed rays: samples along P with `offsets[R+1]`, and maybe bins of an envelope
    along Q with `offsets_env[R+1]`; the intervals of both may be among the inputs."""

    def public(self) -> Callable:
        call: Any = super().public()
        parameters = [*call.__signature__.parameters.values()]
        keyword = inspect.Parameter.KEYWORD_ONLY
        extra = [inspect.Parameter(x, keyword, default=None) for x in ("ray_indices", "rays")]
        call.__signature__ = inspect.Signature([*parameters, *extra])
        head, returns, tail = call.__doc__.partition("\n\nReturns:")
        keywords = _RAY_INDICES_DOC.rstrip()
        if "\nKeyword Args:\n" in head:
            keywords = keywords.removeprefix("\nKeyword Args:")
        call.__doc__ = head + keywords + returns + tail
        return call

    def _positional(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        if "ray_indices" in named or "rays" in named:
            named = {**named}
            ray_indices, rays = named.pop("ray_indices", None), named.pop("rays", None)
            if ray_indices is None or rays is None or "offsets" in named:
                raise TypeError(
                    f"{self.name}: ray_indices and rays must come together, in place of offsets"
                )
            named["offsets"] = ray_offsets(ray_indices, rays)
        return super()._positional(args, named)

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
        self.lay_intervals(named, seed)
        return [*named.values()]

    def lay_intervals(self, named: dict[str, Tensor], seed: int = 0) -> None:
        """Replace the intervals by random ones of the rays that the offsets tell."""
        for starts, ends, offsets in self._intervals():
            n, dtype, rays = len(named[starts]), named[starts].dtype, len(named[offsets]) - 1
            generator = torch.Generator().manual_seed(seed + 1)
            u = torch.rand(2, n, generator=generator, dtype=torch.float64)
            # half of the intervals begin where the one before ends
            gap, width = (2 * u[0] - 1).clamp(min=0), 0.05 + u[1]
            far = (gap + width).cumsum(0)
            # in a sum of all rays the others' rounding would show
            near = far - PackedRays(named[offsets], n).at_first(far - width - gap)
            scale = max(rays, 1) / max(n, 1)
            named[starts] = (scale * (near - width)).to(dtype)
            named[ends] = (scale * near).to(dtype)

    def _intervals(self) -> Iterator[tuple[str, str, str]]:
        """Names of starts, ends and offsets."""
        for t, offsets in (("t", "offsets"), ("t_env", "offsets_env")):
            if f"{t}_starts" in self.inputs:
                yield f"{t}_starts", f"{t}_ends", offsets

    def _reference(self, *args: Any) -> Any:
        # on the CPU kernels look at the offsets as well, as it costs no synchronisation
        if args[0].device.type == "cpu":
            self.check_integers(args[: len(self.inputs)])
        return super()._reference(*args)

    def _check_values(self, named: dict[str, Tensor]) -> None:
        super()._check_values(named)
        for starts_name, ends_name, offsets in self._intervals():
            starts, ends = named[starts_name], named[ends_name]
            first = PackedRays(named[offsets], len(starts)).place == 0
            before = torch.where(first, starts, torch.cat([starts[:1], ends[:-1]]))
            for name, early, late in ((starts_name, before, starts), (ends_name, starts, ends)):
                wrong = (late < early).nonzero()
                if len(wrong):
                    at = int(wrong[0])
                    rule = "not decrease along a ray, from start to end to the next start"
                    self._fail(ValueError, name, rule, f"{late[at].item():g} at [{at}]")


def upper_bound(values: Tensor, begin: Tensor, end: Tensor, x: Tensor) -> Tensor:
    """[P] of each x, the first place from begin on where values are above it; end if nowhere.

    As `torch.searchsorted(..., right=True)` finds it in each of these pieces of the values.
    """
    if len(values) == 0:
        return end
    # the longest is known only here without a synchronisation
    on_cpu = values.device.type == "cpu" and len(x) > 0
    longest = int((end - begin).max()) if on_cpu else len(values)
    for _ in range(max(longest, 0).bit_length()):
        middle = begin + (end - begin) // 2
        searching, above = begin < end, values[middle.clamp(0, len(values) - 1)] > x
        begin = torch.where(searching & ~above, middle + 1, begin)
        end = torch.where(searching & above, middle, end)
    return begin


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
        self.is_last = self.place == self.offsets.diff()[self.ray] - 1
        """[P] of each sample, whether none of its ray comes after it."""

    def at_first(self, x: Tensor) -> Tensor:
        """[P] of each sample, the value of the first one of its ray."""
        return x[self.offsets[self.ray].clamp(max=max(len(x) - 1, 0))]

    def before(self, x: Tensor, first: Tensor | float) -> Tensor:
        """[P] of each sample, the value of the one before it; `first` for a ray's first."""
        return torch.where(self.place > 0, torch.cat([x[:1], x[:-1]]), first)

    def running_sum(self, x: Tensor) -> Tensor:
        """[P, ...] of each sample, the sum from its ray's first one up to it, in log2(longest)
        steps."""
        return self._running(x, torch.add, 0.0)

    def running_product(self, x: Tensor) -> Tensor:
        """[P, ...] the same of the product; no gradient divides."""
        return self._running(x, torch.mul, 1.0)

    def _running(
        self, x: Tensor, join: Callable[[Tensor, Tensor], Tensor], nothing: float
    ) -> Tensor:
        place = self.place.view(-1, *[1] * (x.dim() - 1))
        longest = int(self.place.max()) + 1 if len(x) else 0
        step = 1
        while step < longest:
            earlier = torch.cat([torch.zeros_like(x[:step]), x[:-step]])
            x = join(x, torch.where(place >= step, earlier, nothing))
            step *= 2
        return x

    def at_last(self, x: Tensor, empty: float = 0.0) -> Tensor:
        """[R, ...] of each ray, the value of its last sample; `empty` where it has none."""
        values = torch.cat([x.new_full((1, *x.shape[1:]), empty), x])
        return values[torch.where(self.offsets.diff() > 0, self.offsets[1:], 0)]

    def total(self, x: Tensor) -> Tensor:
        """[R, ...] of each ray, the sum over its samples; 0 where it has none."""
        return self.at_last(self.running_sum(x))
