from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..lookup import Lookup
from ..ops.composite_tiles import ListedSplats, composite_tiles

__all__ = ["TileContributors", "tile_contributors"]

# the arguments of composite_tiles, its checks and their messages, in another name
_arguments = copy.copy(composite_tiles.op)
_arguments.name = "tile_contributors"


class TileContributors(NamedTuple):
    """What `tile_contributors` returns."""

    counts: Tensor  # [..., H, W]
    ids: Tensor  # [K]
    weights: Tensor  # [K]


def tile_contributors(
    means2d: Tensor,
    conics: Tensor,
    opacities: Tensor,
    tile_offsets: Tensor,
    flatten_ids: Tensor,
    *,
    masks: Tensor | None = None,
    transmittance: Tensor | None = None,
    image_width: int,
    image_height: int,
    tile_size: int = 16,
    preset: str = "gsplat15",
    max_alpha: float | None = None,
    min_alpha: float | None = None,
    min_transmittance: float | None = None,
    pixel_center: float | None = None,
    stop_at_min: bool | None = None,
) -> TileContributors:
    """The splats that `composite_tiles` composites, pixel after pixel, with their weights.

    Those of a pixel come front to back, of the first pixel first, row by row of each image: what
    belongs to a pixel ends at the running sum of `counts`.

    Args:
        means2d, conics, opacities, tile_offsets, flatten_ids: as of `composite_tiles`.

    Keyword Args:
        masks, image_width, image_height, tile_size, preset, max_alpha, min_alpha,
            min_transmittance, pixel_center, stop_at_min: as of `composite_tiles`.
        transmittance: [..., H, W] of what lies before the lists; None for 1.

    Returns:
        TileContributors(counts [..., H, W] int32, ids [K] int64 as in flatten_ids, weights [K]),
        K being the sum of counts. Not differentiable.

    Raises:
        ValueError, TypeError: as `composite_tiles`.

    Source:
        gsplat, `rasterize_to_indices_in_range`, `rasterize_contributing_gaussian_ids`.

    Example:
        >>> import torch, rayfuse
        >>> mean, conic = torch.full((2, 2), 0.5), torch.tensor([[1.0, 0.0, 1.0]]).expand(2, 3)
        >>> rayfuse.tile_contributors(
        ...     mean, conic, torch.tensor([0.5, 0.25]), torch.tensor([[0]]), torch.tensor([1, 0]),
        ...     image_width=1, image_height=1,
        ... )
        TileContributors(counts=tensor([[2]], dtype=torch.int32), ids=tensor([1, 0]), \
weights=tensor([0.2500, 0.3750]))
    """
    constants = dict(
        max_alpha=max_alpha,
        min_alpha=min_alpha,
        min_transmittance=min_transmittance,
        pixel_center=pixel_center,
        stop_at_min=stop_at_min,
    )
    # a splat is the same whatever its colour
    colorless = means2d[..., :0] if isinstance(means2d, Tensor) else means2d
    given = _arguments._positional(
        (means2d, conics, colorless, opacities, tile_offsets, flatten_ids),
        dict(
            masks=masks,
            image_width=image_width,
            image_height=image_height,
            tile_size=tile_size,
            preset=preset,
            **{name: value for name, value in constants.items() if value is not None},
        ),
    )
    _arguments._check_once(given)
    pixels = [*tile_offsets.shape[:-2], image_height, image_width]
    if transmittance is not None:
        if [*transmittance.shape] != pixels:
            rule = f"have shape {pixels}"
            _arguments._fail(ValueError, "transmittance", rule, [*transmittance.shape])
        if transmittance.device != means2d.device:
            rule = f"be on {means2d.device} like means2d"
            _arguments._fail(ValueError, "transmittance", rule, transmittance.device)
        transmittance = transmittance.reshape(-1, *pixels[-2:]).to(given[0].dtype)
    values = dict(zip(_arguments.domain, _arguments._encoded(given), strict=True))
    for name in ("colors", "depths", "background", "absgrad"):
        del values[name]
    tensors, scalars = [*values.values()][:6], [*values.values()][6:]
    counts, ids, weights = _lookup(*tensors, transmittance, *scalars)
    return TileContributors(counts.reshape(pixels), ids, weights)


def _tile_contributors(
    means2d: Tensor,  # [P, 2]
    conics: Tensor,  # [P, 3]
    opacities: Tensor,  # [P]
    tile_offsets: Tensor,  # [I, Y, X]
    flatten_ids: Tensor,  # [M]
    masks: Tensor | None,  # [I, Y, X]
    transmittance: Tensor | None,  # [I, H, W]
    image_width: int,
    image_height: int,
    tile_size: int,
    *constants: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    # on the CPU kernels look at the lists as well, as it costs no synchronisation
    if means2d.device.type == "cpu":
        given = means2d, conics, means2d[:, :0], opacities, tile_offsets, flatten_ids
        _arguments.check_integers((*given, None, None, masks, None))
    lists = ListedSplats(tile_offsets, flatten_ids, masks, means2d, conics, opacities)
    weight, _ = lists.weigh(tile_size, *constants, begun=transmittance)
    weight = lists.as_images(weight)[:, :image_height, :image_width]
    ids = lists.as_images(lists.ids[:, None].expand(-1, tile_size**2, -1))
    ids = ids[:, :image_height, :image_width]
    met = weight > 0
    return met.sum(-1, dtype=torch.int32), ids[met], weight[met]


def _fake(
    means2d: Tensor,
    conics: Tensor,
    opacities: Tensor,
    tile_offsets: Tensor,
    flatten_ids: Tensor,
    masks: Tensor | None,
    transmittance: Tensor | None,
    image_width: int,
    image_height: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    K = torch.library.get_ctx().new_dynamic_size()
    counts = len(tile_offsets), image_height, image_width
    return (
        means2d.new_empty(counts, dtype=torch.int32),
        means2d.new_empty(K, dtype=torch.int64),
        means2d.new_empty(K),
    )


_lookup = Lookup(
    _tile_contributors,
    "(Tensor means2d, Tensor conics, Tensor opacities, Tensor tile_offsets, Tensor flatten_ids,"
    " Tensor? masks, Tensor? transmittance, int image_width, int image_height, int tile_size,"
    " float max_alpha, float min_alpha, float min_transmittance, float pixel_center,"
    " bool stop_at_min) -> (Tensor, Tensor, Tensor)",
    _fake,
)
