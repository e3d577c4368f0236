# Feature rendering of packed rays, features = sum_s w_s f_s; d_w_s = <d_features, f_s>, d_f_s =
# w_s d_features. A program owns BLOCK_R rays with all their channels and takes BLOCK_S samples of
# each at a time, then the long ones among them by themselves, BLOCK_LONG at a time.
# Forward: once over f. Backward: once over f, or not at all where no gradient to w is wanted.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, add_exactly, empty_gradient, load, packed_rays
from .render_features import _SHORT_ROW, channels
from .render_features import launch as launch_dense


@triton.jit
def packed_render_features_fwd_kernel(
    features_ptr,  # [R, C]
    w_ptr,  # [P]
    f_ptr,  # [P, C]
    offsets_ptr,  # [R+1]
    R,
    P,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
):
    A: tl.constexpr = features_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    r = first + tl.arange(0, BLOCK_R)
    begin, n = packed_rays(offsets_ptr, r, R, P)
    c = channels(0, BLOCK_C)
    short = n <= BLOCK_LONG
    features = rendered(w_ptr, f_ptr, begin, tl.where(short, n, 0), c, C, A, BLOCK_S)
    store_rows(features_ptr, r, c, features, (r < R) & short, C)
    if tl.max(n, 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            one, begin_one, n_one = long_ray(offsets_ptr, first + i, R, P, BLOCK_LONG)
            features_one = rendered(w_ptr, f_ptr, begin_one, n_one, c, C, A, BLOCK_LONG)
            store_rows(features_ptr, one, c, features_one, (one < R) & (n_one > 0), C)


@triton.jit
def packed_render_features_bwd_kernel(
    d_w_ptr,  # [P]
    d_f_ptr,  # [P, C]
    d_features_ptr,  # [R, C]
    w_ptr,  # [P]
    f_ptr,  # [P, C]
    offsets_ptr,  # [R+1]
    R,
    P,
    C,
    NEEDS_D_W: tl.constexpr,
    NEEDS_D_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
):
    A: tl.constexpr = d_features_ptr.dtype.element_ty
    # one ray less: the samples before offsets[0]
    first = tl.program_id(0).to(tl.int64) * BLOCK_R - 1
    r = first + tl.arange(0, BLOCK_R)
    begin, n = packed_rays(offsets_ptr, r, R, P)
    c = channels(0, BLOCK_C)
    short = tl.where(n <= BLOCK_LONG, n, 0)
    g = load_rows(d_features_ptr, r, c, R, C, A)
    spread(d_w_ptr, d_f_ptr, g, w_ptr, f_ptr, begin, short, c, C, NEEDS_D_W, NEEDS_D_F, BLOCK_S)
    if tl.max(n, 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            one, begin_one, n_one = long_ray(offsets_ptr, first + i, R, P, BLOCK_LONG)
            g_one = load_rows(d_features_ptr, one, c, R, C, A)
            spread(
                d_w_ptr, d_f_ptr, g_one, w_ptr, f_ptr, begin_one, n_one, c, C, NEEDS_D_W,
                NEEDS_D_F, BLOCK_LONG,
            )  # fmt: skip


@triton.jit
def long_ray(offsets_ptr, r, R, P, BLOCK_LONG: tl.constexpr):
    """Ray r as a block of one ray, without samples unless it has more than BLOCK_LONG."""
    one = r + tl.arange(0, 1)
    begin, n = packed_rays(offsets_ptr, one, R, P)
    return one, begin, tl.where(n > BLOCK_LONG, n, 0)


@triton.jit
def rendered(w_ptr, f_ptr, begin, n, c, C, A: tl.constexpr, BLOCK_S: tl.constexpr):
    """sum_s w_s f_s in channels c of rays of n samples from `begin` on, [rays, channels]."""
    sums = tl.zeros([n.shape[0], c.shape[0]], A)
    lost = tl.zeros([n.shape[0], c.shape[0]], A)
    for b in range(tl.cdiv(tl.max(n, 0), BLOCK_S)):
        k, sample, at, value = places(begin, n, b, c, C, BLOCK_S)
        w = load(w_ptr + k, sample, A)
        f = load(f_ptr + at, value, A)
        sums, lost = add_exactly(sums, lost, tl.sum(w[:, :, None] * f, 1))
    return sums


@triton.jit
def spread(
    d_w_ptr,
    d_f_ptr,
    g,
    w_ptr,
    f_ptr,
    begin,
    n,
    c,
    C,
    NEEDS_D_W: tl.constexpr,
    NEEDS_D_F: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """d_w_s = <g, f_s> and d_f_s = w_s g of rays of n samples from `begin` on, with g
    [rays, channels]."""
    for b in range(tl.cdiv(tl.max(n, 0), BLOCK_S)):
        k, sample, at, value = places(begin, n, b, c, C, BLOCK_S)
        if NEEDS_D_F:
            w = load(w_ptr + k, sample, g.dtype)
            tl.store(d_f_ptr + at, w[:, :, None] * g[:, None, :], mask=value)
        if NEEDS_D_W:
            f = load(f_ptr + at, value, g.dtype)
            tl.store(d_w_ptr + k, tl.sum(g[:, None, :] * f, 2), mask=sample)


@triton.jit
def places(begin, n, b, c, C, BLOCK_S: tl.constexpr):
    """Samples and values of block b, and which of them exist."""
    s = tl.cast(b, tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
    k, sample = begin[:, None] + s, s < n[:, None]
    at = (k * C)[:, :, None] + c[None, None, :]
    return k, sample, at, sample[:, :, None] & (c < C)[None, None, :]


@triton.jit
def load_rows(ptr, r, c, R, C, A: tl.constexpr):
    """Channels c of rays r; 0 for those that are none."""
    row = tl.minimum(tl.maximum(r, 0), R - 1)
    values = load(ptr + (row * C)[:, None] + c[None, :], (c < C)[None, :], A)
    return tl.where((r == row)[:, None], values, 0.0)


@triton.jit
def store_rows(ptr, r, c, rows, mask, C):
    tl.store(ptr + (r * C)[:, None] + c[None, :], rows, mask=mask[:, None] & (c < C)[None, :])


def launch(
    R: int, P: int, C: int, dtype: torch.dtype, strays: int = 0
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and the tile with its options: that of dense rays of the average length.

    `strays` rays are of samples that belong to none. The tile is the same, so that both
    directions render the same to the bit.
    """
    _, tile = launch_dense(R, triton.cdiv(P, max(R, 1)), C, dtype)
    block_long = tile["BLOCK_R"] * tile["BLOCK_S"]
    if tile["BLOCK_C"] < _SHORT_ROW:
        # 4 values a thread; 8, with the sums' rounding and 64-bit addresses, spill 16 bytes (sm_80)
        tile["num_warps"] *= 2
    return (triton.cdiv(R + strays, tile["BLOCK_R"]),), {**tile, "BLOCK_LONG": block_long}


def fwd(w: Tensor, f: Tensor, offsets: Tensor) -> Tensor:
    R, (P, C) = len(offsets) - 1, f.shape
    features = w.new_empty(R, C, dtype=accumulator(w.dtype))
    grid, tile = launch(R, P, C, w.dtype)
    packed_render_features_fwd_kernel[grid](features, w, f, offsets, R, P, C, **tile)
    return features


def bwd(
    d_features: Tensor, w: Tensor, f: Tensor, offsets: Tensor, needs: int
) -> tuple[Tensor, Tensor]:
    R, (P, C) = len(offsets) - 1, f.shape
    d_w, d_f = empty_gradient(w, needs, 0), empty_gradient(f, needs, 1)
    if R == 0:
        return d_w.zero_(), d_f.zero_()
    grid, tile = launch(R, P, C, w.dtype, strays=2)
    packed_render_features_bwd_kernel[grid](
        d_w,
        d_f,
        d_features,
        w,
        f,
        offsets,
        R,
        P,
        C,
        NEEDS_D_W=bool(needs & 1),
        NEEDS_D_F=bool(needs & 2),
        **tile,
    )
    return d_w, d_f
