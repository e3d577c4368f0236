"""Which tiles projected splats touch, and each tile's list of them, front to back."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..lookup import Lookup
from ..ops.composite_tiles import LEAST_ALPHA

__all__ = ["TileLists", "intersect_tiles"]

# an ellipse may miss a tile by this much of sigma, or by roundings of its terms, and still be
# listed: composite_tiles decides, and its own roundings differ
_SLACK = 1e-4
_ROUNDINGS = 16
# what kernels count tiles and splats with, and tiles along a side as float32
_MOST = torch.iinfo(torch.int32).max
_MOST_ALONG = 1 << 24


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
    the same image of fewer pairs. Splats of equal depth keep their order. One whose mean, radii or
    depth are not finite is in no list, nor one of an image that does not exist.

    How long the lists are is in the values: on a GPU the call waits for them once.

    Args:
        means2d: [..., N, 2] centres of the splats in pixels, x then y, `...` being images; or
            [P, 2], packed, with `image_ids`.
        radii: [..., N, 2] how far they reach in x and y; one that has no positive radius is culled,
            and nothing else of it is read.
        depths: [..., N] in any unit, told apart in the precision of means2d.
        tile_size: width of the square tiles in pixels.
        tile_width, tile_height: how many tiles there are in x and in y, 2^24 at most, and 2^31 - 1
            in all images.

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
        ValueError: for shapes and devices that do not match, conics without opacities, image_ids
            without images, and more tiles or splats than int32 counts.
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
        if x is not None and x.device != means2d.device:
            _fail(ValueError, name, f"be on {means2d.device} like means2d", x.device)
    if (conics is None) != (opacities is None):
        _fail(ValueError, "conics and opacities", "be given together", "one of them")
    if image_ids is None:
        image_dims = leading[:-1]
    else:
        if images is None:
            _fail(ValueError, "images", "be given with image_ids", None)
        image_dims, image_ids = torch.Size([images]), image_ids.long()
    if tile_size < 1:
        _fail(ValueError, "tile_size", "be > 0", tile_size)
    for name, along in (("tile_width", tile_width), ("tile_height", tile_height)):
        if not 0 <= along <= _MOST_ALONG:
            _fail(ValueError, name, f"be between 0 and {_MOST_ALONG}", along)
    tiles = image_dims.numel() * tile_width * tile_height
    for name, count in (("tiles of all images", tiles), ("splats", leading.numel())):
        if count > _MOST:
            _fail(ValueError, name, f"be {_MOST} at most", count)

    real = torch.float64 if means2d.dtype == torch.float64 else torch.float32
    most = None
    if opacities is not None:
        most = torch.log(opacities.to(real) / min_alpha) + _SLACK
    tiles_per_splat, flatten_ids, tile_offsets = _lookup(
        means2d.to(real).reshape(-1, 2),
        radii.to(real).reshape(-1, 2),
        depths.to(real).flatten(),
        None if conics is None else conics.to(real).reshape(-1, 3),
        None if most is None else most.flatten(),
        *(image_ids, image_dims.numel(), tile_size, tile_width, tile_height, pixel_center),
    )
    return TileLists(
        tiles_per_splat.view(leading),
        flatten_ids,
        tile_offsets.view(*image_dims, tile_height, tile_width),
    )


def _intersect_tiles(
    means2d: Tensor,  # [P, 2]
    radii: Tensor,  # [P, 2]
    depths: Tensor,  # [P]
    conics: Tensor | None,  # [P, 3]
    most: Tensor | None,  # [P], the sigma up to which a splat is seen
    image_ids: Tensor | None,  # [P], or as many splats of each image
    images: int,
    tile_size: int,
    tile_width: int,
    tile_height: int,
    pixel_center: float,
) -> tuple[Tensor, Tensor, Tensor]:
    device, tiles = means2d.device, images * tile_width * tile_height
    image = image_ids
    if image is None:
        image = torch.arange(images, device=device).repeat_interleave(
            len(means2d) // max(images, 1)
        )
    middle, reach = means2d / tile_size, radii / tile_size
    first, last = (middle - reach).floor(), (middle + reach).ceil()
    # no box for what is culled or not finite, whatever else it holds
    listed = (radii > 0).all(-1) & last.isfinite().all(-1) & depths.isfinite()
    listed &= (image >= 0) & (image < images)
    grid = first.new_tensor([tile_width, tile_height])
    first, last = (
        x.masked_fill(~listed[:, None], 0).minimum(grid).clamp(min=0).int() for x in (first, last)
    )
    width, height = (last - first).unbind(-1)
    count = width * height
    first_tile = (image.int() * tile_height + first[:, 1]) * tile_width + first[:, 0]

    front_to_back = _sortable(depths).sort(stable=True).indices
    splats = front_to_back[count[front_to_back] > 0]
    count, width, first_tile = (x[splats] for x in (count, width, first_tile))
    owner = torch.arange(len(splats), device=device).repeat_interleave(count)
    # in the box of its owner, row by row
    place = torch.arange(len(owner), device=device)
    place = (place - _of(count.cumsum(0) - count, owner)).int()
    row = place // _of(width, owner)
    tile = _of(first_tile, owner) + place + row * _of(tile_width - width, owner)
    if conics is not None and most is not None:
        y = tile // tile_width
        corner = torch.stack([tile - y * tile_width, y % tile_height], -1).to(means2d) * tile_size
        near = corner + pixel_center - _of(means2d[splats], owner)
        sigma = _least_sigma(near, tile_size - 1, _of(conics[splats], owner))
        kept = (sigma <= _of(most[splats], owner)).nonzero()[:, 0]
        owner, tile = _of(owner, kept), _of(tile, kept)

    # of integers a radix sort, the faster the narrower they are
    tile, order = tile.sort(stable=True)
    lengths = torch.bincount(tile, minlength=tiles)
    found = torch.bincount(owner, minlength=len(splats)).int()
    tiles_per_splat = torch.zeros(len(means2d), dtype=torch.int32, device=device)
    return (
        tiles_per_splat.index_copy_(0, splats, found),
        _of(splats, _of(owner, order)),
        (lengths.cumsum(0) - lengths).view(images, tile_height, tile_width),
    )


def _fake(means2d: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, images, _, tile_width, tile_height, _ = args
    pairs = torch.library.get_ctx().new_dynamic_size()
    return (
        means2d.new_empty(means2d.shape[0], dtype=torch.int32),
        means2d.new_empty(pairs, dtype=torch.int64),
        means2d.new_empty(images, tile_height, tile_width, dtype=torch.int64),
    )


_lookup = Lookup(
    _intersect_tiles,
    "(Tensor means2d, Tensor radii, Tensor depths, Tensor? conics, Tensor? most,"
    " Tensor? image_ids, int images, int tile_size, int tile_width, int tile_height,"
    " float pixel_center) -> (Tensor, Tensor, Tensor)",
    _fake,
)


def _of(x: Tensor, index: Tensor) -> Tensor:
    # a fifth of the time of x[index]
    return x.index_select(0, index)


def _least_sigma(near: Tensor, side: int, conic: Tensor) -> Tensor:
    """The least sigma in a square, one corner of which is `near` of the splat, less roundings.

    sigma grows along every ray from the splat, so that where it is outside, the least is on one of
    the two sides that face it; on each sigma is a parabola.
    """
    (x0, y0), (x1, y1), (a, b, c) = (x.unbind(-1) for x in (near, near + side, conic))
    facing_x, facing_y = x0.clamp(min=0) + x1.clamp(max=0), y0.clamp(min=0) + y1.clamp(max=0)
    on_x, on_y = (
        squares + b * x * y - _ROUNDINGS * torch.finfo(a.dtype).eps * squares
        for x, y in (
            (facing_x, (-b / c * facing_x).fmax(y0).fmin(y1)),
            ((-b / a * facing_y).fmax(x0).fmin(x1), facing_y),
        )
        for squares in [0.5 * (a * x * x + c * y * y)]
    )
    return torch.where(on_y < on_x, on_y, on_x)


def _sortable(x: Tensor) -> Tensor:
    """Integers in the order of floating point values, which are sorted 20 times as fast."""
    # the sum makes one zero of both
    bits = (x + 0.0).view(torch.int64 if x.dtype == torch.float64 else torch.int32)
    # of negative values those of greater magnitude come first
    negative = bits >> (8 * bits.element_size() - 1)
    return bits ^ (negative & torch.iinfo(bits.dtype).max)


def _plain(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _fail(error: type[Exception], name: str, rule: str, got: Any) -> NoReturn:
    raise error(f"intersect_tiles: {name} must {rule}, got {got}")
