"""nerfacc.pack, and the ways in which nerfacc says which samples are whose as rayfuse's offsets."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backend
from ...packed import ray_offsets
from .. import packed

__all__ = ["pack_info"]


@torch.no_grad()
def pack_info(ray_indices: Tensor, n_rays: int | None = None) -> Tensor:
    """Where the samples of each ray begin, and how many it has.

    Args:
        ray_indices: [P] int64, the ray of each sample, not decreasing.
        n_rays: R, the number of rays; without it the last sample's ray is the last ray, which waits
            for a GPU.

    Returns:
        [R, 2] int64.

    Example:
        >>> import torch
        >>> from rayfuse.compat import nerfacc
        >>> nerfacc.pack_info(torch.tensor([0, 0, 2]), n_rays=4).tolist()
        [[0, 2], [2, 0], [2, 1], [3, 0]]
    """
    offsets = _offsets_from_indices(ray_indices, n_rays)
    return torch.stack([offsets[:-1], offsets.diff()], -1)


def offsets_from_info(packed_info: Tensor, P: int) -> Tensor:
    """[R+1] of [R, 2], which nerfacc lets lie in any order; here they must lie end to end."""
    if packed_info.dim() != 2 or packed_info.shape[-1] != 2:
        raise ValueError(f"packed_info must have shape [R, 2], got {list(packed_info.shape)}")
    starts, counts = packed_info.long().unbind(-1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    # elsewhere a look would synchronise
    if packed_info.device.type == "cpu" or backend.debugging():
        apart = ((starts != offsets[:-1]) & (counts != 0)).nonzero()
        if len(apart) or offsets[-1] != P:
            at = int(apart[0]) if len(apart) else len(packed_info) - 1
            got = f"{packed_info[at].tolist()} for ray {at}" if len(packed_info) else "no ray"
            raise ValueError(
                f"packed_info must have the {P} samples of its rays end to end, got {got}"
            )
    return offsets


def packed_rays(
    *tensors: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
) -> tuple[Tensor, ...]:
    """Tensors [P], and the offsets of their rays; without either of these [..., S] of S each."""
    if packed_info is None and ray_indices is None:
        return packed(*tensors)
    shape = tensors[0].shape
    if len(shape) != 1:
        raise ValueError(f"packed samples must have shape [P], got {list(shape)}")
    if packed_info is not None:
        return *tensors, offsets_from_info(packed_info, shape[0])
    assert ray_indices is not None
    return *tensors, _offsets_from_indices(ray_indices, n_rays)


def _offsets_from_indices(ray_indices: Tensor, n_rays: int | None) -> Tensor:
    if n_rays is None:
        n_rays = int(ray_indices.max()) + 1 if len(ray_indices) else 0
    return ray_offsets(ray_indices, n_rays)
