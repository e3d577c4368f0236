"""nerfacc.pdf: search in histograms along rays and sampling from them, on rayfuse.lookups."""

from __future__ import annotations

import torch
from torch import Tensor

from ...lookups.packed_importance_samples import Draw
from ...lookups.packed_searchsorted import packed_searchsorted
from .data_specs import RayIntervals, RaySamples
from .pack import packed_rays

__all__ = ["importance_sampling", "searchsorted"]


@torch.no_grad()
def searchsorted(
    sorted_sequence: RayIntervals | RaySamples, values: RayIntervals | RaySamples
) -> tuple[Tensor, Tensor]:
    """The neighbours of values among those of a sequence on the same ray.

    sequence[ids_left] <= value < sequence[ids_right]; below the first both are the first, from
    the last one on they are the last two.

    Args:
        sorted_sequence: what to look in, not decreasing along a ray.
        values: what to look for, on as many rays.

    Returns:
        ids_left, ids_right: int64 of the shape of the values; counted from the first of the ray for
        batched values, from the first of all for packed ones.

    Example:
        >>> import torch
        >>> from rayfuse.compat.nerfacc import RaySamples, searchsorted
        >>> sequence = RaySamples(torch.tensor([[0.0, 1.0, 2.0]]))
        >>> searchsorted(sequence, RaySamples(torch.tensor([[-1.0, 1.0, 9.0]])))
        (tensor([[0, 1, 1]]), tensor([[0, 2, 2]]))
    """
    edges, edge_offsets = _packed(sorted_sequence)
    queries, query_offsets = _packed(values)
    batched = _is_batched(values)
    left, right = packed_searchsorted(edges, edge_offsets, queries, query_offsets, batched)
    return left.view(values.vals.shape), right.view(values.vals.shape)


@torch.no_grad()
def importance_sampling(
    intervals: RayIntervals,
    cdfs: Tensor,
    n_intervals_per_ray: Tensor | int,
    stratified: bool = False,
) -> tuple[RayIntervals, RaySamples]:
    """Samples at even steps of a cdf, and intervals around them, within those given.

    Args:
        intervals: edges along the rays, not decreasing.
        cdfs: their cdf, of the shape of `intervals.vals`.
        n_intervals_per_ray: how many each ray gets: one number, or [R] for each its own.
        stratified: shift the samples of each ray by one random number within their steps.

    Returns:
        intervals, samples: batched, [..., n+1] and [..., n], for one number, else packed with
        `packed_info` and `ray_indices`. The interval of a single sample is the whole of its ray.

    Example:
        >>> import torch
        >>> from rayfuse.compat.nerfacc import RayIntervals, importance_sampling
        >>> edges, cdf = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 0.5, 0.75]])
        >>> intervals, samples = importance_sampling(RayIntervals(edges), cdf, 3)
        >>> intervals.vals, samples.vals
        (tensor([[0.0000, 0.5000, 1.1250, 1.8750]]), tensor([[0.2500, 0.7500, 1.5000]]))
    """
    name, counts = "importance_sampling", n_intervals_per_ray
    if _is_batched(intervals) and isinstance(counts, int):
        draw = Draw.dense(name, intervals.vals, cdfs, counts, stratified)
        leading = intervals.vals.shape[:-1]
    else:
        edges, offsets = _packed(intervals)
        draw = Draw.packed(name, edges, cdfs.reshape(-1), offsets, counts, stratified)
        leading = offsets[1:].shape
    (t, t_offsets), (new_edges, new_offsets) = draw.samples(), draw.intervals()
    if isinstance(counts, Tensor):
        return _packed_results(new_edges, new_offsets, t, t_offsets)
    if len(t) != leading.numel() * counts:
        raise ValueError("intervals must have edges on every ray, got one without")
    return (
        RayIntervals(new_edges.view(*leading, counts + 1)),
        RaySamples(t.view(*leading, counts)),
    )


def _packed_results(
    edges: Tensor, edge_offsets: Tensor, t: Tensor, t_offsets: Tensor
) -> tuple[RayIntervals, RaySamples]:
    (edge_info, edge_rays), (t_info, t_rays) = map(_described, (edge_offsets, t_offsets))
    place = torch.arange(len(edges), device=edges.device)
    intervals = RayIntervals(
        edges,
        edge_info,
        edge_rays,
        is_left=place + 1 < edge_offsets[1:][edge_rays],
        is_right=place > edge_offsets[:-1][edge_rays],
    )
    return intervals, RaySamples(t, t_info, t_rays)


def _described(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """packed_info [R, 2] and ray_indices [P]."""
    counts = offsets.diff()
    rays = torch.arange(len(counts), device=offsets.device)
    return torch.stack([offsets[:-1], counts], -1), rays.repeat_interleave(counts)


def _is_batched(values: RayIntervals | RaySamples) -> bool:
    return values.vals.dim() > 1


def _packed(values: RayIntervals | RaySamples) -> tuple[Tensor, ...]:
    if not _is_batched(values) and values.packed_info is None:
        raise ValueError(f"{type(values).__name__} of shape [P] must have packed_info, got None")
    return packed_rays(values.vals, packed_info=values.packed_info)
