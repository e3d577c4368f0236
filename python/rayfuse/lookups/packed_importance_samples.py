"""Samples at even steps of the cdf of a histogram, and intervals around them, dense and packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..histograms import Checks, even_offsets, neighbours, ray_of_each
from ..lookup import Lookup

__all__ = [
    "importance_samples",
    "importance_sampling",
    "packed_importance_samples",
    "packed_importance_sampling",
    "packed_intervals_around",
]

# below this difference of cdf a bin is flat
_FLAT = 1e-10


def packed_importance_samples(
    edges: Tensor,
    cdf: Tensor,
    edge_offsets: Tensor,
    counts: Tensor | int,
    stratified: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Positions at even steps of a cdf along packed rays: where it is (i + b) / n of the way up.

    The bias b is 1/2, or with `stratified` one random number for all samples of a ray. In a bin in
    which the cdf rises by less than 1e-10 a sample is in the middle. The samples of a ray do not
    decrease, and lie between its edges.

    Args:
        edges: [Q] edges of the rays' bins, those of a ray not decreasing.
        cdf: [Q] a function at the edges that does not decrease along a ray, such as
            1 - transmittance; it may begin and end anywhere.
        edge_offsets: [R+1] int64: ray r has edges edge_offsets[r] up to edge_offsets[r + 1].
        counts: [R] int64, or one number for all rays: how many samples to take. A ray without edges
            gets none.
        stratified: whether the bias is random.
        generator: where random numbers come from.

    Returns:
        t, offsets: the positions, [sum of counts], and [R+1] where those of each ray begin.

    Raises:
        ValueError: for shapes or devices that do not match, or negative counts; on the CPU and in
            debug mode for offsets that do not rise from 0 to Q.
        TypeError: for offsets or counts that are not integers, and edges or a cdf that are not
            floating point.

    Source:
        nerfacc's `importance_sampling` (Li et al., 2023).

    Example:
        >>> import torch, rayfuse
        >>> edges, cdf = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 0.75, 1.0])
        >>> rayfuse.packed_importance_samples(edges, cdf, torch.tensor([0, 3]), 2)
        (tensor([0.3333, 1.0000]), tensor([0, 2]))
    """
    function = "packed_importance_samples"
    return Draw.packed(function, edges, cdf, edge_offsets, counts, stratified, generator).samples()


def packed_importance_sampling(
    edges: Tensor,
    cdf: Tensor,
    edge_offsets: Tensor,
    counts: Tensor | int,
    stratified: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Intervals around `packed_importance_samples`, within the edges they are drawn from.

    Arguments, errors and source are those of `packed_importance_samples`.

    Returns:
        new_edges, new_offsets: n + 1 edges for n samples of a ray, none for none, and [R+1] where
        those of each ray begin.

    Example:
        >>> import torch, rayfuse
        >>> edges, cdf = torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.0, 0.5, 1.0])
        >>> rayfuse.packed_importance_sampling(edges, cdf, torch.tensor([0, 3]), 2)
        (tensor([0.0000, 1.5000, 3.5000]), tensor([0, 3]))
    """
    function = "packed_importance_sampling"
    return Draw.packed(
        function, edges, cdf, edge_offsets, counts, stratified, generator
    ).intervals()


def importance_samples(
    edges: Tensor,
    cdf: Tensor,
    count: int,
    stratified: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`packed_importance_samples` for rays that have equally many edges.

    Args:
        edges: [..., S+1] edges of the bins, not decreasing along a ray.
        cdf: [..., S+1] a function at the edges that does not decrease along a ray.
        count: how many samples each ray gets, > 0.
        stratified, generator: see `packed_importance_samples`.

    Returns:
        [..., count] the positions, without a gradient.

    Raises:
        ValueError, TypeError: as `packed_importance_samples`.

    Example:
        >>> import torch, rayfuse
        >>> edges, cdf = torch.tensor([[0.0, 1.0, 4.0]]), torch.tensor([[0.0, 0.5, 1.0]])
        >>> rayfuse.importance_samples(edges, cdf, 2)
        tensor([[0.5000, 2.5000]])
    """
    t, _ = Draw.dense("importance_samples", edges, cdf, count, stratified, generator).samples()
    return t.view(*edges.shape[:-1], count)


def importance_sampling(
    edges: Tensor,
    cdf: Tensor,
    count: int,
    stratified: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`packed_importance_sampling` for rays that have equally many edges.

    Arguments and errors are those of `importance_samples`.

    Returns:
        [..., count + 1] the edges of the new intervals, without a gradient.

    Example:
        >>> import torch, rayfuse
        >>> edges, cdf = torch.tensor([[0.0, 1.0, 4.0]]), torch.tensor([[0.0, 0.5, 1.0]])
        >>> rayfuse.importance_sampling(edges, cdf, 2)
        tensor([[0.0000, 1.5000, 3.5000]])
    """
    new_edges, _ = Draw.dense(
        "importance_sampling", edges, cdf, count, stratified, generator
    ).intervals()
    return new_edges.view(*edges.shape[:-1], count + 1)


def packed_intervals_around(
    t: Tensor, offsets: Tensor, t_min: Tensor, t_max: Tensor
) -> tuple[Tensor, Tensor]:
    """The edges of intervals around the samples of packed rays, one each.

    They meet halfway between samples. The first and the last one reach as far to the other side,
    but not beyond t_min and t_max; the interval of a single sample is all from t_min to t_max.

    Args:
        t: [P] positions, those of a ray not decreasing.
        offsets: [R+1] int64: ray r has samples offsets[r] up to offsets[r + 1].
        t_min, t_max: [R] how far the intervals of each ray may reach.

    Returns:
        edges, edge_offsets: n + 1 edges for a ray of n samples, none for an empty one, and [R+1]
        where those of each ray begin.

    Raises:
        ValueError, TypeError: as `packed_importance_samples`.

    Source:
        nerfacc's `importance_sampling` (Li et al., 2023), which for a single sample reads beyond
        its memory.

    Example:
        >>> import torch, rayfuse
        >>> t, none, most = torch.tensor([1.0, 3.0, 2.0]), torch.zeros(2), torch.full((2,), 9.0)
        >>> rayfuse.packed_intervals_around(t, torch.tensor([0, 2, 3]), none, most)
        (tensor([0., 2., 4., 0., 9.]), tensor([0, 3, 5]))
    """
    check = Checks("packed_intervals_around")
    check.values("t", t, "P")
    check.values("t_min", t_min, "R")
    check.values("t_max", t_max, "R")
    check.offsets("offsets", offsets, t)
    if t.device.type == "cpu":
        check.rising("offsets", offsets, len(t))
    for name, x in (("t_min", t_min), ("t_max", t_max)):
        check.same_length(name, x, "offsets.diff()", offsets[1:])
    t, t_min, t_max = (x.detach() for x in (t, t_min, t_max))
    edge_offsets = _offsets_of(_edges_around(offsets.diff()))
    return _enclosed(t, offsets, edge_offsets, t_min, t_max), edge_offsets


@dataclass(frozen=True)
class Draw:
    """Samples that are to be drawn from histograms, and the intervals around just these."""

    edges: Tensor
    cdf: Tensor
    edge_offsets: Tensor
    bias: Tensor
    # [R], 0 where there are no edges; one number where all rays have that many
    counts: Tensor | int

    @classmethod
    def packed(
        cls,
        function: str,
        edges: Tensor,
        cdf: Tensor,
        edge_offsets: Tensor,
        counts: Tensor | int,
        stratified: bool = False,
        generator: torch.Generator | None = None,
    ) -> Draw:
        check = Checks(function)
        check.values("edges", edges, "Q")
        check.values("cdf", cdf, "Q")
        check.same_length("cdf", cdf, "edges", edges)
        check.offsets("edge_offsets", edge_offsets, edges)
        counts = check.counts(counts, edge_offsets)
        counts = torch.where(edge_offsets.diff() > 0, counts, 0)
        return cls._of(edges, cdf, edge_offsets, counts, stratified, generator)

    @classmethod
    def dense(
        cls,
        function: str,
        edges: Tensor,
        cdf: Tensor,
        count: int,
        stratified: bool = False,
        generator: torch.Generator | None = None,
    ) -> Draw:
        check = Checks(function)
        check.rows("cdf", cdf, "edges", edges)
        if cdf.shape != edges.shape:
            check.fail(ValueError, "cdf", f"have shape {list(edges.shape)}", list(cdf.shape))
        if count < 1:
            check.fail(ValueError, "count", "be > 0", count)
        offsets = even_offsets(edges.shape[:-1].numel(), edges.shape[-1], edges)
        return cls._of(edges.flatten(), cdf.flatten(), offsets, count, stratified, generator)

    @classmethod
    def _of(
        cls,
        edges: Tensor,
        cdf: Tensor,
        edge_offsets: Tensor,
        counts: Tensor | int,
        stratified: bool,
        generator: torch.Generator | None,
    ) -> Draw:
        dtype = torch.promote_types(edges.dtype, cdf.dtype)
        bias = cdf.new_full((len(edge_offsets) - 1,), 0.5, dtype=_wide(dtype))
        if stratified:
            bias = torch.rand(bias.shape, generator=generator, device=bias.device, dtype=bias.dtype)
        return cls(edges.to(dtype), cdf.to(dtype), edge_offsets, bias, counts)

    def samples(self) -> tuple[Tensor, Tensor]:
        """t, offsets."""
        return self._drawn(self.counts, False)

    def intervals(self) -> tuple[Tensor, Tensor]:
        """new_edges, new_offsets."""
        return self._drawn(_edges_around(self.counts), True)

    def _drawn(self, results: Tensor | int, intervals: bool) -> tuple[Tensor, Tensor]:
        if isinstance(results, int):
            rays = len(self.bias)
            offsets, total = even_offsets(rays, results, self.bias), rays * results
        else:
            offsets = _offsets_of(results)
            total = int(offsets[-1])
        inputs = self.edges, self.cdf, self.edge_offsets, self.bias
        return _lookup(*inputs, offsets, total, intervals), offsets


def _edges_around(counts: Any) -> Any:
    """How many edges the intervals around so many samples have."""
    return (counts + 1) * (counts > 0)


def _offsets_of(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _packed_importance_samples(
    edges: Tensor,
    cdf: Tensor,
    edge_offsets: Tensor,
    bias: Tensor,
    offsets: Tensor,
    total: int,
    intervals: bool,
) -> Tensor:
    """Of each ray the samples, or the edges of intervals around one fewer: where they begin."""
    if edges.device.type == "cpu":
        check = Checks("packed_importance_samples")
        check.rising("edge_offsets", edge_offsets, len(edges))
        check.rising("offsets", offsets, total)
    edges, cdf = (x.to(bias.dtype) for x in (edges, cdf))
    counts = (offsets.diff() - int(intervals)).clamp(min=0)
    t_offsets = _offsets_of(counts)
    ray = ray_of_each(t_offsets, int(t_offsets[-1]))
    if len(ray) == 0:
        return bias.new_empty(total)
    place = torch.arange(len(ray), device=cdf.device) - t_offsets[ray]
    floor, ceiling = cdf[edge_offsets[:-1][ray]], cdf[edge_offsets[1:][ray] - 1]
    u = floor + (place + bias[ray]) * ((ceiling - floor) / counts[ray])
    left, right = neighbours(cdf, edge_offsets, u, ray)
    rise, width = cdf[right] - cdf[left], edges[right] - edges[left]
    flat = rise < _FLAT
    inside = (u - cdf[left]) * (width / rise.masked_fill(flat, 1)) + edges[left]
    # no rounding leads beyond the bin: samples are in order
    t = torch.where(flat, (edges[left] + edges[right]) * 0.5, inside.minimum(edges[right]))
    if not intervals:
        return t
    places = edge_offsets[:-1].clamp(max=len(edges) - 1), (edge_offsets[1:] - 1).clamp(min=0)
    return _enclosed(t, t_offsets, offsets, *(edges[i] for i in places))


def _enclosed(
    t: Tensor, offsets: Tensor, edge_offsets: Tensor, t_min: Tensor, t_max: Tensor
) -> Tensor:
    """The edges of `packed_intervals_around`."""
    ray = ray_of_each(edge_offsets, int(edge_offsets[-1]))
    i = torch.arange(len(ray), device=t.device) - edge_offsets[ray]
    last = offsets.diff()[ray] - 1
    # the nearest sample, and the one across the edge, or behind it at either end
    own = i.minimum(last)
    other = torch.where(i == 0, last.clamp(max=1), torch.where(i > last, last - 1, i - 1))
    t_own, t_other = (t[offsets[ray] + k.clamp(min=0)] for k in (own, other))
    edges = torch.where((i > 0) & (i <= last), t_own + t_other, 0) * 0.5
    end = t_own - (t_other - t_own) * 0.5
    single = last == 0
    lowest, highest = t_min[ray], t_max[ray]
    edges = torch.where(i == 0, torch.where(single, lowest, end.maximum(lowest)), edges)
    edges = torch.where(i > last, torch.where(single, highest, end.minimum(highest)), edges)
    return edges


_lookup = Lookup(
    _packed_importance_samples,
    "(Tensor edges, Tensor cdf, Tensor edge_offsets, Tensor bias, Tensor offsets, SymInt total,"
    " bool intervals) -> Tensor",
    lambda edges, cdf, edge_offsets, bias, offsets, total, intervals: bias.new_empty(total),
)
