# Tile compositing, the formulas of csrc/cpu/composite_tiles.cpp: w_i = alpha_i T_i, T_{i+1} = T_i
# (1 - alpha_i); image = sum_i w_i c_i + T bg, alpha = sum_i w_i, depth = sum_i w_i z_i / alpha,
# median = z_i of the last i with T_i > 1/2.
# A program of one warp owns PIXELS of a tile, and goes along its list splat by splat, BLOCK_K of
# them unrolled. A kernel before packs splats; what is not finite loses its opacity. Forward: a
# program for every BLOCK_C channels. Backward: once forward for T before each BLOCK_K, once back
# with u_i, what lies behind splat i: d_alpha_i = T_i (<c_i, g> - u_i), u_{i-1} = u_i + alpha_i
# (<c_i, g> - u_i); sums of a splat meet in the order of tiles. docs/splats.md
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import empty_gradient, light_at, ratio

_MOMENTS = 6
# a packed splat has its mean, conic and opacity, and from the last of these on its channels
_VALUES = tl.constexpr(6)
_CHANNELS = tl.constexpr(8)
_BLOCK_P = 128
_BLOCK_K = 4
# of a pixel for each thread: four in 32 bits
_PIXEL_BYTES = 512
_MOST_CHANNELS = 8
# sums of a splat that a program adds up at a time
_BLOCK_V = 32


@triton.jit
def composite_tiles_pack_kernel(
    packed_ptr,  # [P, stride]
    means_ptr,  # [P, 2]
    conics_ptr,  # [P, 3]
    colors_ptr,  # [P, D]
    opacities_ptr,  # [P]
    depths_ptr,  # [P]
    P, D, stride,
    HAS_DEPTHS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = means_ptr.dtype.element_ty
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = p < P
    values = ()
    for i in tl.static_range(2):
        values = values + (tl.load(means_ptr + 2 * p + i, mask=exists, other=0.0),)
    for i in tl.static_range(3):
        values = values + (tl.load(conics_ptr + 3 * p + i, mask=exists, other=0.0),)
    values = values + (tl.load(opacities_ptr + p, mask=exists, other=0.0),)
    # what is not finite, times 0, is NaN
    nothing = tl.zeros((BLOCK_P,), A)
    for i in tl.static_range(_VALUES):
        nothing += 0 * values[i]
    depth = tl.zeros((BLOCK_P,), A)
    if HAS_DEPTHS:
        depth = tl.load(depths_ptr + p, mask=exists, other=0.0)
        nothing += 0 * depth
    for c in range(D):
        nothing += 0 * tl.load(colors_ptr + p * D + c, mask=exists, other=0.0).to(A)
    to = packed_ptr + p * stride
    for i in tl.static_range(_VALUES):
        tl.store(to + i, tl.where(nothing == 0, values[i], 0.0), mask=exists)
    colors = tl.where(exists, D, 0)
    for c in range(stride - _CHANNELS):
        value = tl.load(colors_ptr + p * D + c, mask=c < colors, other=0.0).to(A)
        value += tl.where(c == D, depth, 0.0)
        tl.store(to + _CHANNELS + c, tl.where(nothing == 0, value, 0.0), mask=exists)


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
def _pixels(t, part, Y, X, H, W, SIZE: tl.constexpr, PIXELS: tl.constexpr):
    """Image, index, column, row and existence of pixels of a tile."""
    image = t // (Y * X)
    tile = t % (Y * X)
    rank = part * PIXELS + tl.arange(0, PIXELS)
    column = tile % X * SIZE + rank % SIZE
    row = tile // X * SIZE + rank // SIZE
    exists = (rank < SIZE * SIZE) & (column < W) & (row < H)
    return image, (image * H + row) * W + column, column, row, exists


@triton.jit
def _splats(packed_ptr, ids_ptr, begin, i, n, P, stride, BLOCK_K: tl.constexpr):
    """The splats of a list from i on, and their values; no opacity behind the end of the list."""
    splats = ()
    for k in tl.static_range(BLOCK_K):
        g = tl.load(ids_ptr + begin + tl.minimum(i + k, n - 1))
        splats = splats + (packed_ptr + tl.minimum(tl.maximum(g, 0), P - 1) * stride,)
    values = ()
    for k in tl.static_range(BLOCK_K):
        own = ()
        for v in tl.static_range(_VALUES - 1):
            own = own + (tl.load(splats[k] + v),)
        opacity = tl.load(splats[k] + (_VALUES - 1))
        values = values + (own + (tl.where(i + k < n, opacity, 0.0),),)
    return splats, values


@triton.jit
def _slopes(values, x, y):
    """dx and dy of pixels, and how sigma changes with them."""
    dx, dy = values[0] - x, values[1] - y
    a, b, c = values[2], values[3], values[4]
    return dx, dy, tl.fma(a, dx, b * dy), tl.fma(b, dx, c * dy)


@triton.jit
def _meet(values, x, y, passing, live, min_alpha, max_alpha, ending, A: tl.constexpr):
    """alpha of a splat at pixels, its weight, T behind it and which pixels go on."""
    dx, dy, slope_x, slope_y = _slopes(values, x, y)
    sigma = 0.5 * tl.fma(dx, slope_x, dy * slope_y)
    most = values[5] * light_at(sigma, A)
    alpha = tl.where((sigma >= 0) & (most >= min_alpha), tl.minimum(most, max_alpha), 0.0)
    after = passing * (1 - alpha)
    live = live & (after > ending)
    weight = tl.where(live, alpha * passing, 0.0)
    return alpha, weight, tl.where(live, after, passing), live


@triton.jit
def composite_tiles_fwd_kernel(
    image_ptr,  # [I, H, W, D]
    opacity_ptr,  # [I, H, W]
    depth_ptr,  # [I, H, W]
    median_ptr,  # [I, H, W]
    constants_ptr,  # [4]
    packed_ptr,  # [P, stride]
    offsets_ptr,  # [I, Y, X]
    ids_ptr,  # [M]
    depths_ptr,  # [P]
    background_ptr,  # [I, D], [I, H, W, D]
    masks_ptr,  # [I, Y, X]
    P, D, stride, Y, X, M, H, W, TILES,
    SIZE: tl.constexpr, HAS_DEPTHS: tl.constexpr, HAS_MASKS: tl.constexpr,
    BACKGROUND: tl.constexpr, PARTS: tl.constexpr, PIXELS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = packed_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    t = program // PARTS
    channel = tl.program_id(1) * BLOCK_C
    max_alpha, min_alpha = tl.load(constants_ptr), tl.load(constants_ptr + 1)
    center, ending = tl.load(constants_ptr + 2), tl.load(constants_ptr + 3)
    begin, _listed, n = _tile(offsets_ptr, masks_ptr, t, TILES, M, HAS_MASKS)
    image, pixel, column, row, exists = _pixels(t, program % PARTS, Y, X, H, W, SIZE, PIXELS)
    x, y = column.to(A) + center, row.to(A) + center
    passing = tl.full((PIXELS,), 1.0, A)
    met = tl.zeros((PIXELS,), A)
    live = exists
    totals = ()
    for _ in tl.static_range(BLOCK_C):
        totals = totals + (tl.zeros((PIXELS,), A),)
    # the place in the list of the median
    halfway = tl.full((PIXELS,), -1, tl.int32)
    i = tl.zeros((), tl.int32)
    going = n > 0
    while going:
        splats, values = _splats(packed_ptr, ids_ptr, begin, i, n, P, stride, BLOCK_K)
        for k in tl.static_range(BLOCK_K):
            before = passing
            _alpha, weight, passing, live = _meet(
                values[k], x, y, passing, live, min_alpha, max_alpha, ending, A
            )
            met += weight
            if HAS_DEPTHS:
                halfway = tl.where((weight > 0) & (before > 0.5), i + k, halfway)
            more = ()
            for c in tl.static_range(BLOCK_C):
                color = tl.load(splats[k] + _CHANNELS + channel + c)
                more = more + (totals[c] + weight * color,)
            totals = more
        i += BLOCK_K
        going = (i < n) & (tl.max(live.to(tl.int32), 0) > 0)
    owner = pixel if BACKGROUND == "pixels" else image + 0 * pixel
    colors = tl.where(exists, D, -1)
    for c in tl.static_range(BLOCK_C):
        total = totals[c]
        if HAS_DEPTHS:
            mean = ratio(total, tl.where(met > 0, met, 1.0), A)
            tl.store(depth_ptr + pixel, mean, mask=channel + c == colors)
        colored = channel + c < colors
        if BACKGROUND != "none":
            behind = tl.load(background_ptr + owner * D + channel + c, mask=colored, other=0.0)
            total += passing * behind
        tl.store(image_ptr + pixel * D + channel + c, total, mask=colored)
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
def composite_tiles_bwd_kernel(
    partial_ptr,  # [PARTS, M, MOMENTS + C]
    kept_ptr,  # [M // BLOCK_K + tiles, PARTS, PIXELS]
    of_tiles_ptr,  # [tiles, PARTS, D]
    d_background_ptr,  # [I, H, W, D]
    d_image_ptr,  # [I, H, W, D]
    d_opacity_ptr,  # [I, H, W]
    d_depth_ptr,  # [I, H, W]
    d_median_ptr,  # [I, H, W]
    constants_ptr,  # [4]
    packed_ptr,  # [P, stride]
    offsets_ptr,  # [I, Y, X]
    ids_ptr,  # [M]
    _depths_ptr,
    background_ptr,  # [I, D], [I, H, W, D]
    masks_ptr,  # [I, Y, X]
    P, D, stride, Y, X, M, H, W, TILES,
    SIZE: tl.constexpr, HAS_DEPTHS: tl.constexpr, HAS_MASKS: tl.constexpr,
    BACKGROUND: tl.constexpr, NEEDS_D_BACKGROUND: tl.constexpr, MOMENTS: tl.constexpr,
    ONE_CHUNK: tl.constexpr, PARTS: tl.constexpr, PIXELS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = packed_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    t, part = program // PARTS, program % PARTS
    max_alpha, min_alpha = tl.load(constants_ptr), tl.load(constants_ptr + 1)
    center, ending = tl.load(constants_ptr + 2), tl.load(constants_ptr + 3)
    begin, listed_here, n = _tile(offsets_ptr, masks_ptr, t, TILES, M, HAS_MASKS)
    image, pixel, column, row, exists = _pixels(t, part, Y, X, H, W, SIZE, PIXELS)
    x, y = column.to(A) + center, row.to(A) + center
    C = D + HAS_DEPTHS
    width = MOMENTS + C
    partial_ptr += (part * M + begin) * width
    # negative in pixels that have ended
    kept_ptr += (begin // BLOCK_K + t) * PARTS * PIXELS + part * PIXELS + tl.arange(0, PIXELS)

    passing = tl.full((PIXELS,), 1.0, A)
    met = tl.zeros((PIXELS,), A)
    distance = tl.zeros((PIXELS,), A)
    halfway = tl.full((PIXELS,), -1, tl.int32)
    live = exists
    i = tl.zeros((), tl.int32)
    going = n > 0
    while going:
        tl.store(kept_ptr + i // BLOCK_K * (PARTS * PIXELS), tl.where(live, passing, -1.0))
        splats, values = _splats(packed_ptr, ids_ptr, begin, i, n, P, stride, BLOCK_K)
        for k in tl.static_range(BLOCK_K):
            before = passing
            _alpha, weight, passing, live = _meet(
                values[k], x, y, passing, live, min_alpha, max_alpha, ending, A
            )
            met += weight
            if HAS_DEPTHS:
                halfway = tl.where((weight > 0) & (before > 0.5), i + k, halfway)
                distance += weight * tl.load(splats[k] + _CHANNELS + D)
        i += BLOCK_K
        going = (i < n) & (tl.max(live.to(tl.int32), 0) > 0)

    behind = -tl.load(d_opacity_ptr + pixel, mask=exists, other=0.0)
    d_distance = tl.zeros((PIXELS,), A)
    d_median = tl.zeros((PIXELS,), A)
    if HAS_DEPTHS:
        d_median = tl.load(d_median_ptr + pixel, mask=exists, other=0.0)
        d_depth = tl.load(d_depth_ptr + pixel, mask=exists & (met > 0), other=0.0)
        most = tl.where(met > 0, met, 1.0)
        d_distance = ratio(d_depth, most, A)
        behind += d_distance * ratio(distance, most, A)
    if BACKGROUND != "none":
        owner = pixel if BACKGROUND == "pixels" else image + 0 * pixel
        for c in range(D):
            d_image = tl.load(d_image_ptr + pixel * D + c, mask=exists, other=0.0)
            behind += d_image * tl.load(background_ptr + owner * D + c, mask=exists, other=0.0)
            if NEEDS_D_BACKGROUND:
                own = passing * d_image
                if BACKGROUND == "pixels":
                    tl.store(d_background_ptr + pixel * D + c, own, mask=exists)
                else:
                    tl.store(of_tiles_ptr + program * D + c, tl.sum(own, 0))

    # nothing came to what follows the last splat that was met
    for start in range(tl.minimum(i, n) * width, listed_here * width, PIXELS):
        rest = start + tl.arange(0, PIXELS)
        tl.store(partial_ptr + rest, tl.zeros((PIXELS,), A), mask=rest < listed_here * width)
    tl.debug_barrier()
    if ONE_CHUNK:
        d_colors = _d_channels(0, d_image_ptr, d_distance, pixel, exists, D, HAS_DEPTHS, BLOCK_C)
    while i > 0:
        i -= BLOCK_K
        splats, values = _splats(packed_ptr, ids_ptr, begin, i, n, P, stride, BLOCK_K)
        kept = tl.load(kept_ptr + i // BLOCK_K * (PARTS * PIXELS))
        passing, live = tl.abs(kept), kept >= 0
        alphas, weights = (), ()
        for k in tl.static_range(BLOCK_K):
            alpha, weight, passing, live = _meet(
                values[k], x, y, passing, live, min_alpha, max_alpha, ending, A
            )
            alphas, weights = alphas + (alpha,), weights + (weight,)
        for k in tl.static_range(BLOCK_K - 1, -1, -1):
            alpha, weight = alphas[k], weights[k]
            listed = i + k < n
            row_ptr = partial_ptr + tl.cast(i + k, tl.int64) * width
            d_own = tl.where(halfway == i + k, d_median, 0.0)
            if ONE_CHUNK:
                shade = _shade(
                    row_ptr + MOMENTS, 0, d_colors, weight, d_own, listed, splats[k], D,
                    HAS_DEPTHS, BLOCK_C,
                )  # fmt: skip
            else:
                shade = tl.zeros((PIXELS,), A)
                for first in range(0, C, BLOCK_C):
                    d_here = _d_channels(
                        first, d_image_ptr, d_distance, pixel, exists, D, HAS_DEPTHS, BLOCK_C
                    )
                    shade += _shade(
                        row_ptr + MOMENTS, first, d_here, weight, d_own, listed, splats[k], D,
                        HAS_DEPTHS, BLOCK_C,
                    )  # fmt: skip
            excess = shade - behind
            behind += tl.where(weight > 0, alpha, 0.0) * excess
            h = tl.where(alpha < max_alpha, weight * excess, 0.0)
            dx, dy, slope_x, slope_y = _slopes(values[k], x, y)
            # sums of h dx and h dy would leave little in those that move a mean
            to_x, to_y = h * slope_x, h * slope_y
            tl.store(row_ptr, tl.sum(h, 0), mask=listed)
            tl.store(row_ptr + 1, tl.sum(to_x, 0), mask=listed)
            tl.store(row_ptr + 2, tl.sum(to_y, 0), mask=listed)
            tl.store(row_ptr + 3, tl.sum(h * dx * dx, 0), mask=listed)
            tl.store(row_ptr + 4, tl.sum(h * dx * dy, 0), mask=listed)
            tl.store(row_ptr + 5, tl.sum(h * dy * dy, 0), mask=listed)
            if MOMENTS > 6:
                tl.store(row_ptr + 6, tl.sum(tl.abs(to_x), 0), mask=listed)
                tl.store(row_ptr + 7, tl.sum(tl.abs(to_y), 0), mask=listed)


@triton.jit
def _d_channels(
    first, d_image_ptr, d_distance, pixel, exists, D, HAS_DEPTHS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of the sums of channels from the first on."""
    found = ()
    colors = tl.where(exists, D, -1)
    for c in tl.static_range(BLOCK_C):
        at = d_image_ptr + pixel * D + first + c
        d_color = tl.load(at, mask=first + c < colors, other=0.0)
        if HAS_DEPTHS:
            d_color += tl.where(first + c == D, d_distance, 0.0)
        found = found + (d_color,)
    return found


@triton.jit
def _shade(
    row_ptr, first, d_colors, weight, d_depth, listed, splat_ptr, D, HAS_DEPTHS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """<c, g> of channels from the first on, of a splat whose sums for them go to memory."""
    shade = 0 * weight
    for c in tl.static_range(BLOCK_C):
        shade += tl.load(splat_ptr + _CHANNELS + first + c) * d_colors[c]
        own = weight * d_colors[c]
        if HAS_DEPTHS:
            own += tl.where(first + c == D, d_depth, 0.0)
        tl.store(row_ptr + first + c, tl.sum(own, 0), mask=listed & (first + c < D + HAS_DEPTHS))
    return shade


@triton.jit
def composite_tiles_bwd_splats_kernel(
    sums_ptr,  # [P, width]
    starts_ptr,  # [P+1]
    places_ptr,  # [M]
    partial_ptr,  # [PARTS, M, width]
    M,
    width,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    A: tl.constexpr = sums_ptr.dtype.element_ty
    p = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.cast(M, tl.int64) * width * tl.arange(0, PARTS)[:, None]
    here = (v < width)[None, :] & (part >= 0)
    total = tl.zeros((PARTS, BLOCK), A)
    for k in range(tl.load(starts_ptr + p), tl.load(starts_ptr + p + 1)):
        row = tl.load(places_ptr + k) * width
        total += tl.load(partial_ptr + part + row + v[None, :], mask=here, other=0.0)
    tl.store(sums_ptr + p * width + v, tl.sum(total, 0), mask=v < width)


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
        far = means2d if depths is None else depths
        P = len(means2d)
        block_c = min(max(self.C, 1), _MOST_CHANNELS)
        self.chunks = max(triton.cdiv(self.C, block_c), 1)
        stride = _CHANNELS.value + self.chunks * block_c
        packed = means2d.new_empty(P, stride)
        if P:
            composite_tiles_pack_kernel[(triton.cdiv(P, _BLOCK_P),)](
                packed, means2d, conics, colors, opacities, far, P, self.D, stride,
                HAS_DEPTHS=depths is not None, BLOCK_P=_BLOCK_P, enable_fp_fusion=True,
            )  # fmt: skip
        self.arguments = (
            torch.tensor(values, dtype=means2d.dtype, device=means2d.device),
            packed,
            tile_offsets,
            flatten_ids,
            far,
            means2d if background is None else background,
            tile_offsets if masks is None else masks,
            P,
            self.D,
            stride,
            Y,
            X,
            len(flatten_ids) if self.tiles else 0,
            height,
            width,
            self.tiles,
        )
        pixels = triton.next_power_of_2(size * size)
        self.pixels = min(pixels, _PIXEL_BYTES // means2d.itemsize)
        self.parts = pixels // self.pixels
        self.programs = self.tiles * self.parts
        of_images = background is not None and len(background) == self.images
        self.background = "none" if background is None else "images" if of_images else "pixels"
        self.options: dict[str, Any] = {
            "SIZE": size,
            "HAS_DEPTHS": depths is not None,
            "HAS_MASKS": masks is not None,
            "BACKGROUND": self.background,
            "PARTS": self.parts,
            "PIXELS": self.pixels,
            "BLOCK_K": _BLOCK_K,
            "BLOCK_C": block_c,
            "num_warps": 1,
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
        grid = launch.programs, launch.chunks
        composite_tiles_fwd_kernel[grid](*outputs, *launch.arguments, **launch.options)
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
    partial = means2d.new_empty(launch.parts, M, W)
    of_images = launch.background == "images"
    of_tiles = means2d.new_empty(launch.programs if of_images else 0, launch.D)
    absent = means2d.new_empty(0)
    d_background = absent
    if background is not None:
        d_background = empty_gradient(background, needs, 5)
    if launch.tiles:
        composite_tiles_bwd_kernel[(launch.programs,)](
            partial,
            means2d.new_empty(M // _BLOCK_K + launch.tiles, launch.parts, launch.pixels),
            of_tiles,
            d_background,
            *d_outputs,
            *launch.arguments,
            NEEDS_D_BACKGROUND=bool(needs & 32) and background is not None,
            MOMENTS=moments,
            ONE_CHUNK=launch.chunks == 1,
            **launch.options,
        )
    if of_images and needs & 32:
        d_background = of_tiles.view(
            launch.images, launch.tiles_of_image * launch.parts, launch.D
        ).sum(1)
    ids, places = flatten_ids.sort(stable=True)
    starts = torch.searchsorted(ids, torch.arange(P + 1, device=ids.device))
    sums = means2d.new_empty(P, W)
    if P:
        block = triton.next_power_of_2(min(W, _BLOCK_V))
        grid = P, triton.cdiv(W, block)
        composite_tiles_bwd_splats_kernel[grid](
            sums,
            starts,
            places,
            partial,
            M,
            W,
            PARTS=launch.parts,
            BLOCK=block,
            enable_fp_fusion=True,
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
