"""Which tiles projected splats touch, and each tile's list of them, front to back, on any device.

Vectorised PyTorch, not an op with kernels: lists have no gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .ops.composite_tiles import LEAST_ALPHA

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
    min_alpha: float = LEAST_ALPHA,
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
    tiles = image_dims.numel() * tile_width * tile_height
    integer = torch.int32 if tiles <= torch.iinfo(torch.int32).max else torch.int64

    means2d, reach = means2d.reshape(-1, 2), radii.reshape(-1, 2).to(means2d.dtype)
    middle, reach_tiles = means2d / tile_size, reach / tile_size
    first, last = (middle - reach_tiles).floor(), (middle + reach_tiles).ceil()
    # no box for what is culled or not finite, whatever else it holds
    listed = (reach > 0).all(-1) & last.isfinite().all(-1)
    grid = first.new_tensor([tile_width, tile_height])
    first, last = (
        x.masked_fill(~listed[:, None], 0).minimum(grid).clamp(min=0).to(integer)
        for x in (first, last)
    )
    width, height = (last - first).unbind(-1)
    count = width * height
    first_tile = (image.to(integer) * tile_height + first[:, 1]) * tile_width + first[:, 0]

    front_to_back = _sortable(depths.flatten()).sort(stable=True).indices
    splats = front_to_back[count[front_to_back] > 0]
    count, width, first_tile = (x[splats] for x in (count, width, first_tile))
    owner = torch.arange(len(splats), device=splats.device).repeat_interleave(count)
    # in the box of its owner, row by row
    place = torch.arange(len(owner), device=owner.device)
    place = (place - _of(count.cumsum(0) - count, owner)).to(integer)
    row = place // _of(width, owner)
    tile = _of(first_tile, owner) + place + row * _of(tile_width - width, owner)
    if conics is not None and opacities is not None:
        y = tile // tile_width
        corner = torch.stack([tile - y * tile_width, y % tile_height], -1) * tile_size
        near = corner.to(means2d) + pixel_center - _of(means2d[splats], owner)
        most = torch.log(opacities.flatten()[splats] / min_alpha)
        sigma = _least_sigma(near, tile_size - 1, _of(conics.reshape(-1, 3)[splats], owner))
        kept = (sigma <= _of(most, owner)).nonzero()[:, 0]
        owner, tile = _of(owner, kept), _of(tile, kept)

    # of integers a radix sort, the faster the narrower they are
    tile, order = tile.sort(stable=True)
    lengths = torch.bincount(tile, minlength=tiles)
    found = torch.bincount(owner, minlength=len(splats)).int()
    tiles_per_splat = torch.zeros(leading.numel(), dtype=torch.int32, device=means2d.device)
    return TileLists(
        tiles_per_splat.index_copy_(0, splats, found).view(leading),
        _of(splats, _of(owner, order)),
        (lengths.cumsum(0) - lengths).view(*image_dims, tile_height, tile_width),
    )


def _of(x: Tensor, index: Tensor) -> Tensor:
    # a fifth of the time of x[index]
    return x.index_select(0, index)


def _least_sigma(near: Tensor, side: int, conic: Tensor) -> Tensor:
    """The least sigma in a square, one corner of which is `near` of the splat, less the slack.

    sigma grows along every ray from the splat, so that where it is outside, the least is on one of
    the two sides that face it; on each sigma is a parabola.
    """
    (x0, y0), (x1, y1), (a, b, c) = (x.unbind(-1) for x in (near, near + side, conic))
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


def _plain(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _fail(error: type[Exception], name: str, rule: str, got: Any) -> NoReturn:
    raise error(f"intersect_tiles: {name} must {rule}, got {got}")
