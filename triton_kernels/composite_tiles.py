# Tile compositing, the formulas of csrc/cpu/composite_tiles.cpp: w_i = alpha_i T_i, T_{i+1} = T_i
# (1 - alpha_i); image = sum_i w_i c_i + T bg, alpha = sum_i w_i, depth = sum_i w_i z_i / alpha,
# median = z_i of the last i with T_i > 1/2.
# A program owns a tile, and goes along its list BLOCK_K splats at a time with all pixels of the
# tile: alphas, and sums over channels or pixels, of a block at once, T along it splat by splat.
# Forward: a program for every BLOCK_C channels. Backward: once forward for T before each block,
# once back with u_i, what lies behind splat i: d_alpha_i = T_i (<c_i, g> - u_i), u_{i-1} = u_i +
# alpha_i (<c_i, g> - u_i); sums of a splat meet in the order of tiles. docs/splats.md
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import bounded, empty_gradient, light_at

_MOMENTS = 6
# 8 splats, or twice the channels, spilled (sm_90)
_BLOCK_K = 4
_CHANNEL_BYTES = 32
# sums of a splat that a program adds up at a time
_BLOCK_V = 32


@triton.jit
def _tile(offsets_ptr, masks_ptr, t, TILES, M, HAS_MASKS: tl.constexpr):
    """Where the list of a tile begins, how long it is, and how many of it the tile has; within
    flatten_ids whatever the offsets."""
    begin = tl.minimum(tl.maximum(tl.load(offsets_ptr + t), 0), M)
    end = tl.load(offsets_ptr + tl.minimum(t + 1, TILES - 1))
    end = tl.minimum(tl.where(t + 1 < TILES, end, M), M)
    listed = tl.maximum(end - begin, 0)
    n = listed
    if HAS_MASKS:
        n = tl.where(tl.load(masks_ptr + t) != 0, listed, 0)
    # a list is shorter than 2^31
    return begin, listed, n.to(tl.int32)


@triton.jit
def _pixels(t, Y, X, H, W, SIZE: tl.constexpr, PIXELS: tl.constexpr):
    """Image, index, column, row and existence of a tile's pixels."""
    image = t // (Y * X)
    tile = t % (Y * X)
    rank = tl.arange(0, PIXELS)
    column = tile % X * SIZE + rank % SIZE
    row = tile // X * SIZE + rank // SIZE
    exists = (rank < SIZE * SIZE) & (column < W) & (row < H)
    return image, (image * H + row) * W + column, column, row, exists


@triton.jit
def _splats(ids_ptr, begin, i, n, P, BLOCK_K: tl.constexpr):
    """Places in flatten_ids from i on, which of them are of the list, and the splats there."""
    k = i + tl.arange(0, BLOCK_K)
    listed = k < n
    g = tl.load(ids_ptr + begin + k, mask=listed, other=0)
    return begin + k, listed, tl.minimum(tl.maximum(g, 0), P - 1)


@triton.jit
def _channels(colors_ptr, depths_ptr, g, listed, c, D, HAS_DEPTHS: tl.constexpr, A: tl.constexpr):
    """Channels c of splats, the depth behind their colours, [splats, channels]."""
    colored = listed[:, None] & (c < D)[None, :]
    value = tl.load(colors_ptr + g[:, None] * D + c[None, :], mask=colored, other=0.0).to(A)
    if HAS_DEPTHS:
        depth = tl.load(depths_ptr + g, mask=listed, other=0.0)
        value += tl.where((c == D)[None, :], depth[:, None], 0.0)
    return value


@triton.jit
def _finite(x):
    # what is not finite, times 0, is NaN
    return tl.where(x * 0 == 0, x, 0.0)


@triton.jit
def _ratio(x, y, A: tl.constexpr):
    """x / y rounded once; triton's own is off by two units of the last digit in 32 bits."""
    if tl.float64 == A:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _alpha(
    means_ptr, conics_ptr, colors_ptr, opacities_ptr, depths_ptr, g, listed, x, y, D, min_alpha,
    max_alpha, HAS_DEPTHS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """alpha of splats at pixels, 0 where they are passed over; dx and dy, and how sigma changes
    with them. [splats, pixels]"""
    A: tl.constexpr = means_ptr.dtype.element_ty
    mean_x = tl.load(means_ptr + 2 * g, mask=listed, other=0.0)
    mean_y = tl.load(means_ptr + 2 * g + 1, mask=listed, other=0.0)
    a = tl.load(conics_ptr + 3 * g, mask=listed, other=0.0)
    b = tl.load(conics_ptr + 3 * g + 1, mask=listed, other=0.0)
    c = tl.load(conics_ptr + 3 * g + 2, mask=listed, other=0.0)
    opacity = tl.load(opacities_ptr + g, mask=listed, other=0.0)
    nothing = 0 * (mean_x + mean_y + a + b + c + opacity)
    for first in range(0, D + HAS_DEPTHS, BLOCK_C):
        at = first + tl.arange(0, BLOCK_C)
        nothing += tl.sum(0 * _channels(colors_ptr, depths_ptr, g, listed, at, D, HAS_DEPTHS, A), 1)
    seen = (listed & (nothing == 0))[:, None]
    dx = _finite(mean_x)[:, None] - x[None, :]
    dy = _finite(mean_y)[:, None] - y[None, :]
    a, b, c = _finite(a)[:, None], _finite(b)[:, None], _finite(c)[:, None]
    slope_x, slope_y = a * dx + b * dy, b * dx + c * dy
    sigma = 0.5 * (dx * slope_x + dy * slope_y)
    seen = seen & (sigma >= 0)
    most = opacity[:, None] * light_at(tl.where(seen, sigma, 0.0), A)
    alpha = tl.where(seen & (most >= min_alpha), tl.minimum(most, max_alpha), 0.0)
    return alpha, dx, dy, slope_x, slope_y


@triton.jit
def _moved(x, by: tl.constexpr, edge):
    """Row k + by of a block in the place of row k."""
    K: tl.constexpr = x.shape[0]
    from_ = tl.broadcast_to((tl.arange(0, K) + by)[:, None], x.shape)
    inside = (from_ >= 0) & (from_ < K)
    return tl.where(inside, tl.gather(x, tl.minimum(tl.maximum(from_, 0), K - 1), 0), edge)


@triton.jit
def _weigh(alpha, passing, live, ending):
    """Weights of a block of splats, T before each, and T and who goes on behind the block."""
    K: tl.constexpr = alpha.shape[0]
    k = tl.arange(0, K)[:, None]
    through = tl.cumprod(1 - alpha, 0)
    after = passing[None, :] * through
    end = tl.min(tl.where(live[None, :] & (after > ending), K, k), 0)
    met = k < end[None, :]
    before = passing[None, :] * _moved(through, -1, 1.0)
    weight = tl.where(met, alpha * before, 0.0)
    # which falls along the block
    passing = tl.min(tl.where(met, after, passing[None, :]), 0)
    return weight, before, passing, end == K


@triton.jit
def _halfway(halfway, weight, before, i):
    """The place in the list of the median, -1 for none, after a block of splats from i on."""
    k = i + tl.arange(0, weight.shape[0])
    early = (weight > 0) & (before > 0.5)
    return tl.maximum(halfway, tl.max(tl.where(early, k[:, None], -1), 0))


@triton.jit
def composite_tiles_fwd_kernel(
    image_ptr,  # [I, H, W, D]
    opacity_ptr,  # [I, H, W]
    depth_ptr,  # [I, H, W]
    median_ptr,  # [I, H, W]
    constants_ptr,  # [4]
    means_ptr,  # [P, 2]
    conics_ptr,  # [P, 3]
    colors_ptr,  # [P, D]
    opacities_ptr,  # [P]
    offsets_ptr,  # [I, Y, X]
    ids_ptr,  # [M]
    depths_ptr,  # [P]
    background_ptr,  # [I, D], [I, H, W, D]
    masks_ptr,  # [I, Y, X]
    P, D, Y, X, M, H, W, TILES,
    SIZE: tl.constexpr, HAS_DEPTHS: tl.constexpr, HAS_MASKS: tl.constexpr,
    BACKGROUND: tl.constexpr, PIXELS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = means_ptr.dtype.element_ty
    t = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    max_alpha, min_alpha = tl.load(constants_ptr), tl.load(constants_ptr + 1)
    center, ending = tl.load(constants_ptr + 2), tl.load(constants_ptr + 3)
    begin, _listed, n = _tile(offsets_ptr, masks_ptr, t, TILES, M, HAS_MASKS)
    image, pixel, column, row, exists = _pixels(t, Y, X, H, W, SIZE, PIXELS)
    x, y = column.to(A) + center, row.to(A) + center
    passing = tl.full((PIXELS,), 1.0, A)
    met = tl.zeros((PIXELS,), A)
    live = exists
    total = tl.zeros((BLOCK_C, PIXELS), A)
    halfway = tl.full((PIXELS,), -1, tl.int32)
    i = tl.zeros((), tl.int32)
    going = n > 0
    while going:
        _place, listed, g = _splats(ids_ptr, begin, i, n, P, BLOCK_K)
        alpha, _dx, _dy, _slope_x, _slope_y = _alpha(
            means_ptr, conics_ptr, colors_ptr, opacities_ptr, depths_ptr, g, listed, x, y, D,
            min_alpha, max_alpha, HAS_DEPTHS, BLOCK_C,
        )  # fmt: skip
        weight, before, passing, live = _weigh(alpha, passing, live, ending)
        met += tl.sum(weight, 0)
        if HAS_DEPTHS:
            halfway = _halfway(halfway, weight, before, i)
        color = _channels(colors_ptr, depths_ptr, g, listed, channel, D, HAS_DEPTHS, A)
        total += tl.sum(_finite(color)[:, :, None] * weight[:, None, :], 0)
        i += BLOCK_K
        going = (i < n) & (tl.max(live.to(tl.int32), 0) > 0)
    if HAS_DEPTHS:
        mean = _ratio(total, tl.where(met > 0, met, 1.0)[None, :], A)
        stored = exists[None, :] & (channel == D)[:, None]
        tl.store(depth_ptr + pixel[None, :] + 0 * channel[:, None], mean, mask=stored)
    at, colored = _image(pixel, exists, channel, D)
    if BACKGROUND != "none":
        owner = pixel if BACKGROUND == "pixels" else image + 0 * pixel
        behind, _colored = _image(owner, exists, channel, D)
        total += passing[None, :] * tl.load(background_ptr + behind, mask=colored, other=0.0)
    tl.store(image_ptr + at, total, mask=colored)
    if tl.program_id(1) == 0:
        tl.store(opacity_ptr + pixel, met, mask=exists)
        median = tl.zeros((PIXELS,), A)
        if HAS_DEPTHS:
            g = tl.load(ids_ptr + begin + halfway, mask=halfway >= 0, other=0)
            g = tl.minimum(tl.maximum(g, 0), P - 1)
            median = tl.load(depths_ptr + g, mask=halfway >= 0, other=0.0)
        else:
            tl.store(depth_ptr + pixel, median, mask=exists)
        tl.store(median_ptr + pixel, median, mask=exists)


@triton.jit
def _image(pixel, exists, c, D):
    """Where channels c of pixels are, and which of them there are, [channels, pixels]."""
    return pixel[None, :] * D + c[:, None], exists[None, :] & (c < D)[:, None]


@triton.jit
def composite_tiles_bwd_kernel(
    partial_ptr,  # [M, MOMENTS + C]
    kept_ptr,  # [M // BLOCK_K + tiles, PIXELS]
    of_tiles_ptr,  # [tiles, D]
    d_background_ptr,  # [I, H, W, D]
    d_image_ptr,  # [I, H, W, D]
    d_opacity_ptr,  # [I, H, W]
    d_depth_ptr,  # [I, H, W]
    d_median_ptr,  # [I, H, W]
    constants_ptr,  # [4]
    means_ptr,  # [P, 2]
    conics_ptr,  # [P, 3]
    colors_ptr,  # [P, D]
    opacities_ptr,  # [P]
    offsets_ptr,  # [I, Y, X]
    ids_ptr,  # [M]
    depths_ptr,  # [P]
    background_ptr,  # [I, D], [I, H, W, D]
    masks_ptr,  # [I, Y, X]
    P, D, Y, X, M, H, W, TILES,
    SIZE: tl.constexpr, HAS_DEPTHS: tl.constexpr, HAS_MASKS: tl.constexpr,
    BACKGROUND: tl.constexpr, NEEDS_D_BACKGROUND: tl.constexpr, MOMENTS: tl.constexpr,
    PIXELS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = means_ptr.dtype.element_ty
    t = tl.program_id(0).to(tl.int64)
    max_alpha, min_alpha = tl.load(constants_ptr), tl.load(constants_ptr + 1)
    center, ending = tl.load(constants_ptr + 2), tl.load(constants_ptr + 3)
    begin, listed_here, n = _tile(offsets_ptr, masks_ptr, t, TILES, M, HAS_MASKS)
    image, pixel, column, row, exists = _pixels(t, Y, X, H, W, SIZE, PIXELS)
    x, y = column.to(A) + center, row.to(A) + center
    C = D + HAS_DEPTHS
    width = MOMENTS + C
    # negative in pixels that have ended
    kept_ptr += (begin // BLOCK_K + t) * PIXELS + tl.arange(0, PIXELS)

    passing = tl.full((PIXELS,), 1.0, A)
    met = tl.zeros((PIXELS,), A)
    distance = tl.zeros((PIXELS,), A)
    halfway = tl.full((PIXELS,), -1, tl.int32)
    live = exists
    i = tl.zeros((), tl.int32)
    going = n > 0
    while going:
        tl.store(kept_ptr + i // BLOCK_K * PIXELS, tl.where(live, passing, -1.0))
        _place, listed, g = _splats(ids_ptr, begin, i, n, P, BLOCK_K)
        alpha, _dx, _dy, _slope_x, _slope_y = _alpha(
            means_ptr, conics_ptr, colors_ptr, opacities_ptr, depths_ptr, g, listed, x, y, D,
            min_alpha, max_alpha, HAS_DEPTHS, BLOCK_C,
        )  # fmt: skip
        weight, before, passing, live = _weigh(alpha, passing, live, ending)
        met += tl.sum(weight, 0)
        if HAS_DEPTHS:
            halfway = _halfway(halfway, weight, before, i)
            depth = _finite(tl.load(depths_ptr + g, mask=listed, other=0.0))
            distance += tl.sum(weight * depth[:, None], 0)
        i += BLOCK_K
        going = (i < n) & (tl.max(live.to(tl.int32), 0) > 0)

    behind = -tl.load(d_opacity_ptr + pixel, mask=exists, other=0.0)
    d_distance = tl.zeros((PIXELS,), A)
    if HAS_DEPTHS:
        d_depth = tl.load(d_depth_ptr + pixel, mask=exists & (met > 0), other=0.0)
        d_distance = d_depth / tl.where(met > 0, met, 1.0)
        behind += d_distance * (distance / tl.where(met > 0, met, 1.0))
    if BACKGROUND != "none":
        owner = pixel if BACKGROUND == "pixels" else image + 0 * pixel
        for first in range(0, D, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            at, colored = _image(pixel, exists, c, D)
            of_owner, _colored = _image(owner, exists, c, D)
            d_image = tl.load(d_image_ptr + at, mask=colored, other=0.0)
            background = tl.load(background_ptr + of_owner, mask=colored, other=0.0)
            behind += tl.sum(background * d_image, 0)
            if NEEDS_D_BACKGROUND:
                own = passing[None, :] * d_image
                if BACKGROUND == "pixels":
                    tl.store(d_background_ptr + at, own, mask=colored)
                else:
                    tl.store(of_tiles_ptr + t * D + c, tl.sum(own, 1), mask=c < D)

    # nothing came to what follows the last splat that was met
    for start in range(tl.minimum(i, n) * width, listed_here * width, PIXELS):
        rest = start + tl.arange(0, PIXELS)
        zeros = tl.zeros((PIXELS,), A)
        tl.store(partial_ptr + begin * width + rest, zeros, mask=rest < listed_here * width)
    tl.debug_barrier()
    while i > 0:
        i -= BLOCK_K
        place, listed, g = _splats(ids_ptr, begin, i, n, P, BLOCK_K)
        alpha, dx, dy, slope_x, slope_y = _alpha(
            means_ptr, conics_ptr, colors_ptr, opacities_ptr, depths_ptr, g, listed, x, y, D,
            min_alpha, max_alpha, HAS_DEPTHS, BLOCK_C,
        )  # fmt: skip
        kept = tl.load(kept_ptr + i // BLOCK_K * PIXELS)
        weight, _before, _passing, _live = _weigh(alpha, tl.abs(kept), kept >= 0, ending)
        row_ptrs = partial_ptr + place * width
        if HAS_DEPTHS:
            at = halfway[None, :] == (i + tl.arange(0, BLOCK_K))[:, None]
            d_halfway = tl.sum(tl.load(d_median_ptr + pixel[None, :], mask=at, other=0.0), 1)
        shade = tl.zeros((BLOCK_K, PIXELS), A)
        for first in range(0, C, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            d_color = _d_channels(d_image_ptr, d_distance, pixel, exists, c, D, HAS_DEPTHS)
            color = _channels(colors_ptr, depths_ptr, g, listed, c, D, HAS_DEPTHS, A)
            shade += tl.sum(_finite(color)[:, :, None] * d_color[None, :, :], 1)
            d_sum = tl.sum(weight[:, None, :] * d_color[None, :, :], 2)
            if HAS_DEPTHS:
                d_sum += tl.where((c == D)[None, :], d_halfway[:, None], 0.0)
            stored = listed[:, None] & (c < C)[None, :]
            tl.store(row_ptrs[:, None] + MOMENTS + c[None, :], d_sum, mask=stored)
        counted = tl.where(weight > 0, alpha, 0.0)
        through = tl.cumprod(1 - counted, 0)
        own = counted * _moved(through, -1, 1.0) * shade
        end = tl.min(through, 0) * behind
        # u where an alpha of 1 stands before it, or is it: nothing needs it
        passes = through > 0
        later = _moved(tl.cumsum(own, 0, reverse=True), 1, 0.0) + end[None, :]
        excess = shade - tl.where(passes, later / tl.where(passes, through, 1.0), 0.0)
        behind = tl.sum(own, 0) + end
        h = tl.where(alpha < max_alpha, weight * excess, 0.0)
        # what is summed for means is not a sum of h dx and h dy, of which little may be left
        to_x, to_y = h * slope_x, h * slope_y
        tl.store(row_ptrs, tl.sum(h, 1), mask=listed)
        tl.store(row_ptrs + 1, tl.sum(to_x, 1), mask=listed)
        tl.store(row_ptrs + 2, tl.sum(to_y, 1), mask=listed)
        tl.store(row_ptrs + 3, tl.sum(h * dx * dx, 1), mask=listed)
        tl.store(row_ptrs + 4, tl.sum(h * dx * dy, 1), mask=listed)
        tl.store(row_ptrs + 5, tl.sum(h * dy * dy, 1), mask=listed)
        if MOMENTS > 6:
            tl.store(row_ptrs + 6, tl.sum(tl.abs(to_x), 1), mask=listed)
            tl.store(row_ptrs + 7, tl.sum(tl.abs(to_y), 1), mask=listed)


@triton.jit
def _d_channels(d_image_ptr, d_distance, pixel, exists, c, D, HAS_DEPTHS: tl.constexpr):
    """Gradients of the sums of channels c, [channels, pixels]."""
    at, colored = _image(pixel, exists, c, D)
    d_color = tl.load(d_image_ptr + at, mask=colored, other=0.0)
    if HAS_DEPTHS:
        d_color += tl.where((c == D)[:, None], d_distance[None, :], 0.0)
    return d_color


@triton.jit
def composite_tiles_bwd_splats_kernel(
    sums_ptr,  # [P, width]
    starts_ptr,  # [P+1]
    places_ptr,  # [M]
    partial_ptr,  # [M, width]
    width,
    BLOCK: tl.constexpr,
):
    A: tl.constexpr = sums_ptr.dtype.element_ty
    p = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), A)
    for k in range(tl.load(starts_ptr + p), tl.load(starts_ptr + p + 1)):
        place = tl.load(places_ptr + k)
        total += tl.load(partial_ptr + place * width + v, mask=v < width, other=0.0)
    tl.store(sums_ptr + p * width + v, total, mask=v < width)


class _Launch:
    """What both directions are started with."""

    def __init__(
        self,
        means2d: Tensor,
        conics: Tensor,
        colors: Tensor,
        opacities: Tensor,
        tile_offsets: Tensor,
        flatten_ids: Tensor,
        depths: Tensor | None,
        background: Tensor | None,
        masks: Tensor | None,
        absgrad: Tensor | None,
        width: int,
        height: int,
        size: int,
        max_alpha: float,
        min_alpha: float,
        min_transmittance: float,
        center: float,
        stop_at_min: bool,
    ) -> None:
        self.images, Y, X = tile_offsets.shape
        self.tiles_of_image, self.tiles = Y * X, tile_offsets.numel()
        self.D = colors.shape[1]
        self.C = self.D + (depths is not None)
        least = torch.tensor(min_transmittance, dtype=means2d.dtype)
        if not stop_at_min:
            least = torch.nextafter(least, least.new_tensor(-1.0))
        values = [max_alpha, min_alpha, center, least.item()]
        # absent tensors are never read
        self.arguments = (
            torch.tensor(values, dtype=means2d.dtype, device=means2d.device),
            means2d,
            conics,
            colors,
            opacities,
            tile_offsets,
            flatten_ids,
            means2d if depths is None else depths,
            means2d if background is None else background,
            tile_offsets if masks is None else masks,
            len(means2d),
            self.D,
            Y,
            X,
            len(flatten_ids) if self.tiles else 0,
            height,
            width,
            self.tiles,
        )
        self.pixels = triton.next_power_of_2(size * size)
        most = _CHANNEL_BYTES // means2d.itemsize
        block_c = min(triton.next_power_of_2(max(self.C, 2)), most)
        self.chunks = max(triton.cdiv(self.C, block_c), 1)
        of_images = background is not None and len(background) == self.images
        self.background = "none" if background is None else "images" if of_images else "pixels"
        self.options: dict[str, Any] = {
            "SIZE": size,
            "HAS_DEPTHS": depths is not None,
            "HAS_MASKS": masks is not None,
            "BACKGROUND": self.background,
            "PIXELS": self.pixels,
            "BLOCK_K": _BLOCK_K,
            "BLOCK_C": block_c,
            "num_warps": min(max(self.pixels // 32, 1), 8),
            # asked for, as the default changes between triton 3.9 and 3.10
            "enable_fp_fusion": True,
        }

    def outputs(self, means2d: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
        shape = self.images, height, width
        return tuple(means2d.new_empty(x) for x in ((*shape, self.D), shape, shape, shape))


def fwd(means2d: Tensor, *args: Any) -> tuple[Tensor, ...]:
    launch = _Launch(means2d, *args)
    width, height = args[9:11]
    outputs = launch.outputs(means2d, height, width)
    if launch.tiles:
        grid = launch.tiles, launch.chunks
        # at 119 to 128, and at 160 to 168 in double, no target spills
        registers = 128 if means2d.dtype == torch.float32 else 168
        composite_tiles_fwd_kernel[grid](
            *outputs, *launch.arguments, **launch.options, **bounded(registers, means2d)
        )
    return outputs


def bwd(
    d_image: Tensor | None,
    d_opacity: Tensor | None,
    d_depth: Tensor | None,
    d_median: Tensor | None,
    means2d: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *args, needs = rest
    _, colors, opacities, _, flatten_ids, depths, background, _, absgrad = args[:9]
    launch = _Launch(means2d, *args)
    width, height = args[9:11]
    absolute = bool(needs & 64) and absgrad is not None
    moments = _MOMENTS + 2 * absolute
    P, M, W = len(means2d), len(flatten_ids), moments + launch.C
    shapes = launch.outputs(means2d.to("meta"), height, width)
    d_outputs = [
        means2d.new_zeros(like.shape) if d_y is None else d_y
        for d_y, like in zip((d_image, d_opacity, d_depth, d_median), shapes, strict=True)
    ]
    partial = means2d.new_empty(M, W)
    of_images = launch.background == "images"
    of_tiles = means2d.new_empty(launch.tiles if of_images else 0, launch.D)
    absent = means2d.new_empty(0)
    d_background = absent
    if background is not None:
        d_background = empty_gradient(background, needs, 5)
    if launch.tiles:
        composite_tiles_bwd_kernel[(launch.tiles,)](
            partial,
            means2d.new_empty(M // _BLOCK_K + launch.tiles, launch.pixels),
            of_tiles,
            d_background,
            *d_outputs,
            *launch.arguments,
            NEEDS_D_BACKGROUND=bool(needs & 32) and background is not None,
            MOMENTS=moments,
            **launch.options,
        )
    if of_images and needs & 32:
        d_background = of_tiles.view(launch.images, launch.tiles_of_image, launch.D).sum(1)
    ids, places = flatten_ids.sort(stable=True)
    starts = torch.searchsorted(ids, torch.arange(P + 1, device=ids.device))
    sums = means2d.new_empty(P, W)
    if P:
        block = triton.next_power_of_2(min(W, _BLOCK_V))
        grid = P, triton.cdiv(W, block)
        composite_tiles_bwd_splats_kernel[grid](
            sums, starts, places, partial, W, BLOCK=block, enable_fp_fusion=True
        )
    h, to_x, to_y, h_xx, h_xy, h_yy = sums[:, :_MOMENTS].unbind(1)
    grads = (
        torch.stack([-to_x, -to_y], 1),
        torch.stack([-0.5 * h_xx, -h_xy, -0.5 * h_yy], 1),
        sums[:, moments : moments + launch.D].to(colors.dtype),
        torch.where(h != 0, h / opacities, 0),
        absent if depths is None else sums[:, moments + launch.D],
    )
    wanted = [x if needs >> i & 1 else x.new_empty(0) for i, x in enumerate(grads)]
    d_absgrad = sums[:, _MOMENTS:moments].contiguous() if absolute else absent
    return *(x.contiguous() for x in wanted), d_background, d_absgrad
