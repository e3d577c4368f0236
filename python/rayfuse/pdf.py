"""Search in, and sampling from, the histograms along rays, dense and packed, as nerfacc's CUDA
kernels define them, on any device.

These are vectorised PyTorch, not ops with kernels: they have no gradient, as samplers detach.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend
from .domain import csr
from .packed import upper_bound

__all__ = [
    "importance_sampling",
    "packed_importance_samples",
    "packed_importance_sampling",
    "packed_intervals_around",
    "packed_searchsorted",
    "searchsorted",
]

# below this difference of cdf a bin is flat
_FLAT = 1e-10


def packed_searchsorted(
    edges: Tensor, edge_offsets: Tensor, queries: Tensor, query_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """The edges on either side of each query, among those of its own ray.

    edges[ids_left] <= query < edges[ids_right] wherever a ray has such edges. Below its first edge
    both are the first; from its last edge on they are the last two.

    Args:
        edges: [Q] edges of the rays' bins, those of a ray not decreasing.
        edge_offsets: [R+1] int64: ray r has edges edge_offsets[r] up to edge_offsets[r + 1].
        queries: [P] positions to look for, in any order.
        query_offsets: [R+1] int64, likewise.

    Returns:
        ids_left, ids_right: [P] int64, places in `edges` whichever the ray. Queries of a ray
        without edges get -1.

    Raises:
        ValueError: for shapes or devices that do not match; on the CPU and in debug mode for
            offsets that do not rise from 0 to the number of values.
        TypeError: for offsets that are not int64, or edges and queries that are not floating point.

    Example:
        >>> import torch
        >>> from rayfuse.pdf import packed_searchsorted
        >>> edges, edge_offsets = torch.tensor([0.0, 1.0, 2.0, 0.0, 4.0]), torch.tensor([0, 3, 5])
        >>> queries, query_offsets = torch.tensor([1.0, 9.0, 1.0]), torch.tensor([0, 2, 3])
        >>> packed_searchsorted(edges, edge_offsets, queries, query_offsets)
        (tensor([1, 1, 3]), tensor([2, 2, 4]))
    """
    check = _Checks("packed_searchsorted")
    check.values("edges", edges, "Q")
    check.values("queries", queries, "P")
    check.offsets("edge_offsets", edge_offsets, edges)
    check.offsets("query_offsets", query_offsets, queries)
    check.same_length("query_offsets", query_offsets, "edge_offsets", edge_offsets)
    ray = _ray_of_each(query_offsets, len(queries))
    ids_left, ids_right = _search(edges, edge_offsets, queries, ray)
    empty = edge_offsets.diff()[ray] == 0
    return ids_left.masked_fill(empty, -1), ids_right.masked_fill(empty, -1)


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
    which the cdf rises by less than 1e-10 a sample is in the middle.

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
        >>> import torch
        >>> from rayfuse.pdf import packed_importance_samples
        >>> edges, cdf = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 0.75, 1.0])
        >>> packed_importance_samples(edges, cdf, torch.tensor([0, 3]), 2)
        (tensor([0.3333, 1.0000]), tensor([0, 2]))
    """
    check = _Checks("packed_importance_samples")
    check.values("edges", edges, "Q")
    check.values("cdf", cdf, "Q")
    check.same_length("cdf", cdf, "edges", edges)
    check.offsets("edge_offsets", edge_offsets, edges)
    counts = check.counts(counts, edge_offsets)
    counts = torch.where(edge_offsets.diff() > 0, counts, 0)
    edges, cdf = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in (edges, cdf))

    offsets = _offsets_of(counts)
    bias = cdf.new_full((len(counts),), 0.5)
    if stratified:
        bias = torch.rand(len(counts), generator=generator, device=cdf.device, dtype=cdf.dtype)
    ray = torch.arange(len(counts), device=cdf.device).repeat_interleave(counts)
    place = torch.arange(len(ray), device=cdf.device) - offsets[ray]
    floor, ceiling = cdf[edge_offsets[:-1][ray]], cdf[edge_offsets[1:][ray] - 1]
    u = floor + (place + bias[ray]) * ((ceiling - floor) / counts[ray])
    left, right = _search(cdf, edge_offsets, u, ray)
    rise, width = cdf[right] - cdf[left], edges[right] - edges[left]
    flat = rise < _FLAT
    inside = (u - cdf[left]) * (width / rise.masked_fill(flat, 1)) + edges[left]
    return torch.where(flat, (edges[left] + edges[right]) * 0.5, inside), offsets


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
        ValueError, TypeError: as `packed_searchsorted`.

    Source:
        nerfacc's `importance_sampling` (Li et al., 2023), which for a single sample reads beyond
        its memory.

    Example:
        >>> import torch
        >>> from rayfuse.pdf import packed_intervals_around
        >>> t, none, most = torch.tensor([1.0, 3.0, 2.0]), torch.zeros(2), torch.full((2,), 9.0)
        >>> packed_intervals_around(t, torch.tensor([0, 2, 3]), none, most)
        (tensor([0., 2., 4., 0., 9.]), tensor([0, 3, 5]))
    """
    check = _Checks("packed_intervals_around")
    check.values("t", t, "P")
    check.values("t_min", t_min, "R")
    check.values("t_max", t_max, "R")
    check.offsets("offsets", offsets, t)
    for name, x in (("t_min", t_min), ("t_max", t_max)):
        check.same_length(name, x, "offsets.diff()", offsets[1:])
    counts = offsets.diff()
    edge_offsets = _offsets_of((counts + 1) * (counts > 0))
    ray = torch.arange(len(counts), device=t.device).repeat_interleave(edge_offsets.diff())
    i = torch.arange(len(ray), device=t.device) - edge_offsets[ray]
    last = counts[ray] - 1
    # the nearest sample, and the one across the edge, or behind it at either end
    own = i.minimum(last)
    other = torch.where(i == 0, last.clamp(max=1), torch.where(i > last, last - 1, i - 1))
    t_own, t_other = (t.detach()[offsets[ray] + k.clamp(min=0)] for k in (own, other))
    edges = torch.where((i > 0) & (i <= last), t_own + t_other, 0) * 0.5
    end = t_own - (t_other - t_own) * 0.5
    single = last == 0
    lowest, highest = t_min.detach()[ray], t_max.detach()[ray]
    edges = torch.where(i == 0, torch.where(single, lowest, end.maximum(lowest)), edges)
    edges = torch.where(i > last, torch.where(single, highest, end.minimum(highest)), edges)
    return edges, edge_offsets


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
        >>> import torch
        >>> from rayfuse.pdf import packed_importance_sampling
        >>> edges, cdf = torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.0, 0.5, 1.0])
        >>> packed_importance_sampling(edges, cdf, torch.tensor([0, 3]), 2)
        (tensor([0.0000, 1.5000, 3.5000]), tensor([0, 3]))
    """
    t, offsets = packed_importance_samples(edges, cdf, edge_offsets, counts, stratified, generator)
    ends = edges if len(edges) else edges.new_zeros(1)
    t_min, t_max = (
        ends[place.clamp(0, len(ends) - 1)].to(t.dtype)
        for place in (edge_offsets[:-1], edge_offsets[1:] - 1)
    )
    return packed_intervals_around(t, offsets, t_min, t_max)


def searchsorted(edges: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """`packed_searchsorted` for rays that have equally many edges, and equally many queries.

    Args:
        edges: [..., E] not decreasing along the last dimension.
        queries: [..., S] in any order.

    Returns:
        ids_left, ids_right: [..., S] int64, places along the last dimension of edges.

    Raises:
        ValueError, TypeError: as `packed_searchsorted`.

    Example:
        >>> import torch
        >>> from rayfuse.pdf import searchsorted
        >>> searchsorted(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[-1.0, 1.0, 9.0]]))
        (tensor([[0, 1, 1]]), tensor([[0, 2, 2]]))
    """
    check = _Checks("searchsorted")
    check.rows("queries", queries, "edges", edges)
    E, S = edges.shape[-1], queries.shape[-1]
    R = queries.shape[:-1].numel()
    edge_offsets = torch.arange(R + 1, device=edges.device) * E
    ray = torch.arange(R, device=edges.device).repeat_interleave(S)
    ids_left, ids_right = _search(edges.flatten(), edge_offsets, queries.flatten(), ray)
    first = edge_offsets[ray]
    return (ids_left - first).view(queries.shape), (ids_right - first).view(queries.shape)


def importance_sampling(
    edges: Tensor,
    cdf: Tensor,
    count: int,
    stratified: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`packed_importance_sampling` for rays that have equally many edges.

    Args:
        edges: [..., S+1] edges of the bins, not decreasing along a ray.
        cdf: [..., S+1] a function at the edges that does not decrease along a ray.
        count: how many intervals each ray gets, > 0.
        stratified, generator: see `packed_importance_samples`.

    Returns:
        [..., count + 1] the edges of the new intervals, without a gradient.

    Raises:
        ValueError, TypeError: as `packed_importance_samples`.

    Example:
        >>> import torch
        >>> from rayfuse.pdf import importance_sampling
        >>> edges, cdf = torch.tensor([[0.0, 1.0, 4.0]]), torch.tensor([[0.0, 0.5, 1.0]])
        >>> importance_sampling(edges, cdf, 2)
        tensor([[0.0000, 1.5000, 3.5000]])
    """
    check = _Checks("importance_sampling")
    check.rows("cdf", cdf, "edges", edges)
    if cdf.shape != edges.shape:
        check.fail(ValueError, "cdf", f"have shape {list(edges.shape)}", list(cdf.shape))
    if count < 1:
        check.fail(ValueError, "count", "be > 0", count)
    R = edges.shape[:-1].numel()
    offsets = torch.arange(R + 1, device=edges.device) * edges.shape[-1]
    new_edges, _ = packed_importance_sampling(
        edges.flatten(), cdf.flatten(), offsets, count, stratified, generator
    )
    return new_edges.view(*edges.shape[:-1], count + 1)


def _search(
    edges: Tensor, edge_offsets: Tensor, queries: Tensor, ray: Tensor
) -> tuple[Tensor, Tensor]:
    """The places on either side of each query in its ray, which has edges."""
    first, last = edge_offsets[:-1][ray], edge_offsets[1:][ray] - 1
    right = upper_bound(edges, first, last, queries)
    return torch.maximum(right - 1, first), torch.maximum(right, first)


def _ray_of_each(offsets: Tensor, n: int) -> Tensor:
    rays = torch.arange(len(offsets) - 1, device=offsets.device)
    return rays.repeat_interleave(offsets.diff(), output_size=n)


def _offsets_of(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


class _Checks:
    """What arguments must be, in the words of the ops."""

    def __init__(self, function: str) -> None:
        self.function = function

    def fail(self, error: type[Exception], name: str, rule: str, got: object) -> None:
        raise error(f"{self.function}: {name} must {rule}, got {got}")

    def values(self, name: str, x: Tensor, shape: str) -> None:
        if not isinstance(x, Tensor):
            self.fail(TypeError, name, "be a tensor", type(x).__name__)
        if not x.is_floating_point():
            self.fail(TypeError, name, "be floating point", _plain(x.dtype))
        if x.dim() != 1:
            self.fail(ValueError, name, f"have shape [{shape}]", list(x.shape))

    def rows(self, name: str, x: Tensor, like: str, y: Tensor) -> None:
        """Both have the same leading dimensions."""
        self.values(like, y.flatten(), "")
        self.values(name, x.flatten(), "")
        if y.dim() < 1 or y.shape[-1] < 1:
            self.fail(ValueError, like, "have shape [..., S+1] with S >= 0", list(y.shape))
        if x.dim() < 1 or x.shape[:-1] != y.shape[:-1]:
            self.fail(ValueError, name, f"have the leading dimensions of {like}", list(x.shape))

    def same_length(self, name: str, x: Tensor, like: str, y: Tensor) -> None:
        if x.device != y.device:
            self.fail(ValueError, name, f"be on {y.device} like {like}", x.device)
        if len(x) != len(y):
            self.fail(ValueError, name, f"have length {len(y)} like {like}", len(x))

    def offsets(self, name: str, offsets: Tensor, values: Tensor) -> None:
        if not isinstance(offsets, Tensor) or offsets.dtype != torch.int64:
            got = _plain(getattr(offsets, "dtype", type(offsets).__name__))
            self.fail(TypeError, name, "be an int64 tensor", got)
        if offsets.dim() != 1 or len(offsets) < 1:
            self.fail(ValueError, name, "have shape [R+1]", list(offsets.shape))
        if offsets.device != values.device:
            self.fail(ValueError, name, f"be on {values.device}", offsets.device)
        if offsets.device.type == "cpu" or backend.debugging():
            wrong = csr.holds(offsets, len(values)).logical_not().nonzero()
            if len(wrong):
                at = int(wrong[0])
                self.fail(ValueError, name, csr.rule, f"{int(offsets[at])} at [{at}]")

    def counts(self, counts: Tensor | int, edge_offsets: Tensor) -> Tensor:
        """One for each ray."""
        if isinstance(counts, int):
            counts = edge_offsets.new_full((len(edge_offsets) - 1,), counts)
        if not isinstance(counts, Tensor) or counts.dtype not in (torch.int64, torch.int32):
            got = _plain(getattr(counts, "dtype", type(counts).__name__))
            self.fail(TypeError, "counts", "be an integer, or an int64 tensor", got)
        self.same_length("counts", counts, "edge_offsets[1:]", edge_offsets[1:])
        if (counts.device.type == "cpu" or backend.debugging()) and (counts < 0).any():
            self.fail(ValueError, "counts", "be >= 0", int(counts.min()))
        return counts.long()


def _plain(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
