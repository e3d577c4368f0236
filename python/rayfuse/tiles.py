"""Which tiles projected splats touch, and each tile's list of them, front to back, on any device.

Vectorised PyTorch, not an op with kernels: lists have no gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

__all__ = ["TileLists", "intersect_tiles"]

# an ellipse may miss a tile by this much of sigma, or by roundings of its terms, and still be
# listed: composite_tiles decides, and its own roundings differ
_SLACK = 1e-4
_ROUNDINGS = 16


class TileLists(NamedTuple):
    """What `intersect_tiles` returns, and `composite_tiles` takes."""

    tiles_per_splat: Tensor  # [..., N]
    flatten_ids: Tensor  # [M]
    tile_offsets: Tensor  # [..., tile_height, tile_width]


@torch.no_grad()
def intersect_tiles(
    means2d: Tensor,
    radii: Tensor,
    depths: Tensor,
    tile_size: int,
    tile_width: int,
    tile_height: int,
    *,
    conics: Tensor | None = None,
    opacities: Tensor | None = None,
    image_ids: Tensor | None = None,
    images: int | None = None,
    min_alpha: float = 1 / 255,
    pixel_center: float = 0.5,
) -> TileLists:
    """The splats of each tile, front to back.

    A splat is listed where the box means2d +- radii overlaps a tile. With `conics` and `opacities`
    tiles are left out in which it stays below `min_alpha` at all pixels: `composite_tiles` makes
    the same image of fewer pairs. Splats of equal depth keep their order.

    Args:
        means2d: [..., N, 2] centres of the splats in pixels, x then y, `...` being images; or
            [P, 2], packed, with `image_ids`.
        radii: [..., N, 2] how far they reach in x and y; one that has no positive radius is culled,
            and nothing else of it is read.
        depths: [..., N] in any unit.
        tile_size: width of the square tiles in pixels.
        tile_width, tile_height: how many tiles there are in x and in y.

    Keyword Args:
        conics: [..., N, 3] the inverse covariance (a, b, c), per pixel^2.
        opacities: [..., N] from 0 to 1.
        image_ids: [P] integers, the image of each packed splat.
        images: their number.
        min_alpha, pixel_center: those of `composite_tiles`.

    Returns:
        TileLists(tiles_per_splat [..., N] int32, flatten_ids [M] int64, tile_offsets
        [..., tile_height, tile_width] int64): ids are indices of the flattened splats, and the list
        of a tile begins at its offset and ends at the next one. `...` of the offsets is [images]
        for packed splats.

    Raises:
        ValueError: for shapes that do not match, conics without opacities, or image_ids without
            images.
        TypeError: for means2d that are not floating point, and image_ids that are not integers.

    Source:
        gsplat 1.5.3, `isect_tiles`, for the boxes; the test of ellipses is derived in
        docs/splats.md.

    Example:
        >>> import torch, rayfuse
        >>> means, radii = torch.tensor([[4.0, 4.0], [8.0, 4.0]]), torch.tensor([[2, 2], [4, 2]])
        >>> depths = torch.tensor([2.0, 1.0])
        >>> lists = rayfuse.intersect_tiles(means[None], radii[None], depths[None], 8, 2, 1)
        >>> lists.flatten_ids, lists.tile_offsets
        (tensor([1, 0, 1]), tensor([[[0, 2]]]))
    """
    leading = means2d.shape[:-1]
    if not means2d.is_floating_point():
        _fail(TypeError, "means2d", "be floating point", _plain(means2d))
    if image_ids is not None and image_ids.is_floating_point():
        _fail(TypeError, "image_ids", "be integers", _plain(image_ids))
    for name, x, inner in (
        ("means2d", means2d, (2,)),
        ("radii", radii, (2,)),
        ("depths", depths, ()),
        ("conics", conics, (3,)),
        ("opacities", opacities, ()),
        ("image_ids", image_ids, ()),
    ):
        if x is not None and x.shape != (*leading, *inner):
            _fail(ValueError, name, f"have shape {[*leading, *inner]}", [*x.shape])
    if (conics is None) != (opacities is None):
        _fail(ValueError, "conics and opacities", "be given together", "one of them")
    if image_ids is None:
        image_dims = leading[:-1]
        image = torch.arange(image_dims.numel(), device=means2d.device)
        image = image.repeat_interleave(leading[-1])
    else:
        if images is None:
            _fail(ValueError, "images", "be given with image_ids", None)
        image_dims, image = torch.Size([images]), image_ids.long()
    grid = torch.tensor([tile_width, tile_height], device=means2d.device)
    tiles = image_dims.numel() * tile_width * tile_height

    means2d, reach = means2d.reshape(-1, 2), radii.reshape(-1, 2).to(means2d.dtype)
    middle, reach_tiles = means2d / tile_size, reach / tile_size
    first, last = (middle - reach_tiles).floor(), (middle + reach_tiles).ceil()
    # no box for what is culled or not finite, whatever else it holds
    listed = (reach > 0).all(-1) & (first.isfinite() & last.isfinite()).all(-1)
    first, last = (
        x.masked_fill(~listed[:, None], 0).minimum(grid.to(x)).clamp(min=0).long()
        for x in (first, last)
    )
    extent = last - first
    count = extent.prod(-1)

    front_to_back = _sortable(depths.flatten()).sort(stable=True).indices
    count = count[front_to_back]
    splat = front_to_back.repeat_interleave(count)
    place = torch.arange(len(splat), device=splat.device)
    place -= (count.cumsum(0) - count).repeat_interleave(count, output_size=len(splat))
    width = extent[:, 0][splat]
    row, column = place // width, place % width
    column += first[:, 0][splat]
    row += first[:, 1][splat]
    tile = (image[splat] * tile_height + row) * tile_width + column
    if conics is not None and opacities is not None:
        corner = torch.stack([column, row], -1) * tile_size + pixel_center
        near = corner.to(means2d) - means2d[splat]
        most = torch.log(opacities.flatten() / min_alpha)[splat]
        kept = _least_sigma(near, near + (tile_size - 1), conics.reshape(-1, 3)[splat]) <= most
        splat, tile = splat[kept], tile[kept]

    # a radix sort for integers, in half the time for half the width
    sorted_tile, order = tile.to(_narrowest(tiles)).sort(stable=True)
    lengths = torch.bincount(sorted_tile, minlength=tiles)
    tiles_per_splat = torch.bincount(splat, minlength=leading.numel())
    return TileLists(
        tiles_per_splat.int().view(leading),
        splat[order],
        (lengths.cumsum(0) - lengths).view(*image_dims, tile_height, tile_width),
    )


def _least_sigma(near: Tensor, far: Tensor, conic: Tensor) -> Tensor:
    """The least sigma in a rectangle, from its corners as seen from the splat, less the slack.

    sigma grows along every ray from the splat, so that where it is outside, the least is on one of
    the two sides that face it; on each sigma is a parabola.
    """
    (x0, y0), (x1, y1), (a, b, c) = near.unbind(-1), far.unbind(-1), conic.unbind(-1)
    facing_x, facing_y = x0.clamp(min=0) + x1.clamp(max=0), y0.clamp(min=0) + y1.clamp(max=0)
    least = torch.full_like(a, torch.inf)
    for x, y in (
        (facing_x, (-b * facing_x / c).maximum(y0).minimum(y1)),
        ((-b * facing_y / a).maximum(x0).minimum(x1), facing_y),
    ):
        squares = 0.5 * (a * x * x + c * y * y)
        sigma = squares + b * x * y - _ROUNDINGS * torch.finfo(a.dtype).eps * squares
        least = least.minimum(sigma)
    return least - _SLACK


def _sortable(x: Tensor) -> Tensor:
    """Integers in the order of floating point values, which are sorted 20 times as fast."""
    x = x if x.dtype == torch.float64 else x.float()
    bits = x.contiguous().view(torch.int64 if x.dtype == torch.float64 else torch.int32)
    # of negative values those of greater magnitude come first
    negative = bits >> (8 * bits.element_size() - 1)
    return bits ^ (negative & torch.iinfo(bits.dtype).max)


def _narrowest(most: int) -> torch.dtype:
    return torch.int32 if most <= torch.iinfo(torch.int32).max else torch.int64


def _plain(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _fail(error: type[Exception], name: str, rule: str, got: Any) -> NoReturn:
    raise error(f"intersect_tiles: {name} must {rule}, got {got}")
