"""The edges on either side of queries along rays, dense and packed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..histograms import Checks, even_offsets, neighbours, ray_of_each
from ..lookup import Lookup

__all__ = ["packed_searchsorted", "searchsorted"]


def packed_searchsorted(
    edges: Tensor,
    edge_offsets: Tensor,
    queries: Tensor,
    query_offsets: Tensor,
    from_ray: bool = False,
) -> tuple[Tensor, Tensor]:
    """The edges on either side of each query, among those of its own ray.

    edges[ids_left] <= query < edges[ids_right] wherever a ray has such edges. Below its first edge
    both are the first; from its last edge on they are the last two.

    Args:
        edges: [Q] edges of the rays' bins, those of a ray not decreasing.
        edge_offsets: [R+1] int64: ray r has edges edge_offsets[r] up to edge_offsets[r + 1].
        queries: [P] positions to look for, in any order.
        query_offsets: [R+1] int64, likewise.
        from_ray: count places from the first edge of the ray instead of that of all rays.

    Returns:
        ids_left, ids_right: [P] int64, places in `edges`. Queries of a ray without edges get -1.

    Raises:
        ValueError: for shapes or devices that do not match; on the CPU and in debug mode for
            offsets that do not rise from 0 to the number of values.
        TypeError: for offsets that are not int64, or edges and queries that are not floating point.

    Source:
        nerfacc's `searchsorted` (Li et al., 2023).

    Example:
        >>> import torch, rayfuse
        >>> edges, edge_offsets = torch.tensor([0.0, 1.0, 2.0, 0.0, 4.0]), torch.tensor([0, 3, 5])
        >>> queries, query_offsets = torch.tensor([1.0, 9.0, 1.0]), torch.tensor([0, 2, 3])
        >>> rayfuse.packed_searchsorted(edges, edge_offsets, queries, query_offsets)
        (tensor([1, 1, 3]), tensor([2, 2, 4]))
    """
    check = Checks("packed_searchsorted")
    check.values("edges", edges, "Q")
    check.values("queries", queries, "P")
    check.offsets("edge_offsets", edge_offsets, edges)
    check.offsets("query_offsets", query_offsets, queries)
    check.same_length("query_offsets", query_offsets, "edge_offsets", edge_offsets)
    return _found(edges, edge_offsets, queries, query_offsets, from_ray)


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
        >>> import torch, rayfuse
        >>> rayfuse.searchsorted(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[-1.0, 1.0, 9.0]]))
        (tensor([[0, 1, 1]]), tensor([[0, 2, 2]]))
    """
    check = Checks("searchsorted")
    check.rows("queries", queries, "edges", edges)
    R = queries.shape[:-1].numel()
    edge_offsets, query_offsets = (even_offsets(R, x.shape[-1], x) for x in (edges, queries))
    ids = _found(edges.flatten(), edge_offsets, queries.flatten(), query_offsets, True)
    left, right = (i.view(queries.shape) for i in ids)
    return left, right


def _found(
    edges: Tensor, edge_offsets: Tensor, queries: Tensor, query_offsets: Tensor, from_ray: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(edges.dtype, queries.dtype)
    return _lookup(edges.to(dtype), edge_offsets, queries.to(dtype), query_offsets, from_ray)


def _packed_searchsorted(
    edges: Tensor, edge_offsets: Tensor, queries: Tensor, query_offsets: Tensor, from_ray: bool
) -> tuple[Tensor, Tensor]:
    if edges.device.type == "cpu":
        check = Checks("packed_searchsorted")
        check.rising("edge_offsets", edge_offsets, len(edges))
        check.rising("query_offsets", query_offsets, len(queries))
    ray = ray_of_each(query_offsets, len(queries))
    ids = neighbours(edges, edge_offsets, queries, ray)
    first, empty = edge_offsets[ray], edge_offsets.diff()[ray] == 0
    left, right = ((i - first * int(from_ray)).masked_fill(empty, -1) for i in ids)
    return left, right


def _fake(edges: Tensor, edge_offsets: Tensor, queries: Tensor, *_: object) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(queries, dtype=torch.int64) for _ in range(2))


_lookup = Lookup(
    _packed_searchsorted,
    "(Tensor edges, Tensor edge_offsets, Tensor queries, Tensor query_offsets, bool from_ray)"
    " -> (Tensor, Tensor)",
    _fake,
)
