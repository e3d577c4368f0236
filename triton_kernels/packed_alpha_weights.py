# Weights of packed rays from opacities, the formulas of csrc/cpu/packed_alpha_weights.cpp: w_i =
# T_i a_i, T_{i+1} = T_i (1 - a_i), d_a_i = T_i (d_w_i - B_i), B_i = d_w_{i+1} a_{i+1} + d_T_{i+1} +
# (1 - a_{i+1}) B_{i+1}, a scan of affine maps that divides by nothing.
# A program owns BLOCK_R rays and takes BLOCK_S samples of each at a time, then the long ones among
# them by themselves. Forward: once from the left. Backward: once from the right; rays of several
# blocks are first read from the left, for the light that reaches each block. The shifted loads hit
# the L1 cache. docs/compositing.md
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .alpha_weights import _end, _join
from .common import (
    accumulator,
    bounded_warp,
    empty_gradient,
    launch_packed,
    load,
    packed_rays,
    packed_values,
)


@triton.jit
def packed_alpha_weights_fwd_kernel(
    w_ptr,  # [P]
    light_ptr,  # [P]
    remaining_ptr,  # [R]
    alpha_ptr,  # [P]
    offsets_ptr,  # [R+1]
    R,
    P,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
):
    # one ray less: the samples before offsets[0]
    first = tl.program_id(0).to(tl.int64) * BLOCK_R - 1
    r = first + tl.arange(0, BLOCK_R)
    begin, n = packed_rays(offsets_ptr, r, R, P)
    short = n <= BLOCK_LONG
    remaining = _weights(w_ptr, light_ptr, alpha_ptr, begin, tl.where(short, n, 0), BLOCK_S)
    tl.store(remaining_ptr + r, remaining, mask=(r >= 0) & (r < R) & short)
    if tl.max(n, 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            one = first + i + tl.arange(0, 1)
            begin_one, n_one = packed_rays(offsets_ptr, one, R, P)
            n_one = tl.where(n_one > BLOCK_LONG, n_one, 0)
            remaining_one = _weights(w_ptr, light_ptr, alpha_ptr, begin_one, n_one, BLOCK_LONG)
            tl.store(remaining_ptr + one, remaining_one, mask=(one >= 0) & (one < R) & (n_one > 0))


@triton.jit
def _weights(w_ptr, light_ptr, alpha_ptr, begin, n, BLOCK: tl.constexpr):
    A: tl.constexpr = w_ptr.dtype.element_ty
    light_of_block = tl.zeros(n.shape, A) + 1.0
    for b in range(tl.cdiv(tl.max(n, 0), BLOCK)):
        s = tl.cast(b, tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
        k, here = begin[:, None] + s, s < n[:, None]
        light = light_of_block[:, None] * _light(alpha_ptr, k, s <= n[:, None], BLOCK, A)
        alpha = load(alpha_ptr + k, here, A)
        tl.store(w_ptr + k, light * alpha, mask=here)
        tl.store(light_ptr + k, light, mask=here)
        light_of_block = _end(light * (1.0 - alpha), BLOCK)
    return light_of_block


@triton.jit
def packed_alpha_weights_bwd_kernel(
    d_alpha_ptr,  # [P]
    kept_ptr,  # [P // BLOCK_S + 1]
    d_w_ptr,  # [P]
    d_light_ptr,  # [P]
    d_remaining_ptr,  # [R]
    alpha_ptr,  # [P]
    offsets_ptr,  # [R+1]
    R,
    P,
    HAS_D_W: tl.constexpr,
    HAS_D_LIGHT: tl.constexpr,
    HAS_D_REMAINING: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
):
    A: tl.constexpr = kept_ptr.dtype.element_ty
    # one ray less: the samples before offsets[0]
    first = tl.program_id(0).to(tl.int64) * BLOCK_R - 1
    r = first + tl.arange(0, BLOCK_R)
    begin, n = packed_rays(offsets_ptr, r, R, P)
    longest = tl.max(n, 0)
    n = tl.where(n <= BLOCK_LONG, n, 0)
    d_remaining = tl.zeros([BLOCK_R], A)
    if HAS_D_REMAINING:
        d_remaining = packed_values(d_remaining_ptr, r, R)
    _gradients(
        d_alpha_ptr, kept_ptr, d_w_ptr, d_light_ptr, d_remaining, alpha_ptr, begin, n, HAS_D_W,
        HAS_D_LIGHT, BLOCK_S, BLOCK_S,
    )  # fmt: skip
    if longest > BLOCK_LONG:
        for i in range(BLOCK_R):
            one = first + i + tl.arange(0, 1)
            begin_one, n_one = packed_rays(offsets_ptr, one, R, P)
            n_one = tl.where(n_one > BLOCK_LONG, n_one, 0)
            d_remaining_one = tl.zeros([1], A)
            if HAS_D_REMAINING:
                d_remaining_one = packed_values(d_remaining_ptr, one, R)
            _gradients(
                d_alpha_ptr, kept_ptr, d_w_ptr, d_light_ptr, d_remaining_one, alpha_ptr, begin_one,
                n_one, HAS_D_W, HAS_D_LIGHT, BLOCK_S, BLOCK_LONG,
            )  # fmt: skip


@triton.jit
def _gradients(
    d_alpha_ptr,
    kept_ptr,
    d_w_ptr,
    d_light_ptr,
    d_remaining,
    alpha_ptr,
    begin,
    n,
    HAS_D_W: tl.constexpr,
    HAS_D_LIGHT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    A: tl.constexpr = kept_ptr.dtype.element_ty
    # the light that reaches each block but a ray's first; rays have room for it where they begin
    place = begin // BLOCK_S - 1
    blocks = tl.cdiv(tl.max(n, 0), BLOCK)
    light_of_block = tl.zeros(n.shape, A) + 1.0
    for i in range(1, blocks):
        b = tl.cast(i, tl.int64)
        s = (b - 1) * BLOCK + tl.arange(0, BLOCK)[None, :]
        alpha = load(alpha_ptr + begin[:, None] + s, s < n[:, None], A)
        light_of_block *= _end(tl.cumprod(1.0 - alpha, 1), BLOCK)
        tl.store(kept_ptr + place + b, light_of_block, mask=b * BLOCK < n)
    # other threads read them
    tl.debug_barrier()

    behind_block = d_remaining
    for i in range(blocks):
        b = blocks - 1 - tl.cast(i, tl.int64)
        s = b * BLOCK + tl.arange(0, BLOCK)[None, :]
        k, here, followed = begin[:, None] + s, s < n[:, None], s + 1 < n[:, None]
        # not the first block, and one that exists
        kept = tl.minimum(b, n - b * BLOCK) > 0
        light_of_block = tl.where(kept, tl.load(kept_ptr + tl.where(kept, place + b, 0)), 1.0)
        light = light_of_block[:, None] * _light(alpha_ptr, k, here, BLOCK, A)
        alpha_next = load(alpha_ptr + k + 1, followed, A)
        d_w = tl.zeros(light.shape, A)
        given = tl.zeros(light.shape, A)
        if HAS_D_W:
            d_w = load(d_w_ptr + k, here, A)
            given += load(d_w_ptr + k + 1, followed, A) * alpha_next
        if HAS_D_LIGHT:
            given += load(d_light_ptr + k + 1, followed, A)
        scale, add = tl.associative_scan((1.0 - alpha_next, given), 1, _join, reverse=True)
        behind = add + scale * behind_block[:, None]
        tl.store(d_alpha_ptr + k, light * (d_w - behind), mask=here)
        behind_block = tl.sum(tl.where(s == b * BLOCK, behind, 0.0), 1)


@triton.jit
def _light(alpha_ptr, k, here, BLOCK: tl.constexpr, A: tl.constexpr):
    """What the samples before, of the same block, let through."""
    inner = (tl.arange(0, BLOCK)[None, :] > 0) & here
    return tl.cumprod(1.0 - load(alpha_ptr + k - 1, inner, A), 1)


def fwd(alpha: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    R, P, dtype = len(offsets) - 1, len(alpha), accumulator(alpha.dtype)
    w, transmittance, remaining = (alpha.new_empty(n, dtype=dtype) for n in (P, P, R))
    grid, tile = launch_packed(R + 2, P, alpha.dtype)
    packed_alpha_weights_fwd_kernel[grid](w, transmittance, remaining, alpha, offsets, R, P, **tile)
    return w, transmittance, remaining


def bwd(
    d_w: Tensor | None,
    d_transmittance: Tensor | None,
    d_remaining: Tensor | None,
    alpha: Tensor,
    offsets: Tensor,
    needs: int,
) -> Tensor:
    R, P = len(offsets) - 1, len(alpha)
    d_alpha = empty_gradient(alpha, needs, 0)
    if d_alpha.numel() == 0:
        return d_alpha
    grid, tile = launch_packed(R + 2, P, alpha.dtype)
    absent = alpha.new_empty(0, dtype=accumulator(alpha.dtype))
    packed_alpha_weights_bwd_kernel[grid](
        d_alpha,
        absent.new_empty(P // tile["BLOCK_S"] + 1),
        absent if d_w is None else d_w,
        absent if d_transmittance is None else d_transmittance,
        absent if d_remaining is None else d_remaining,
        alpha,
        offsets,
        R,
        P,
        HAS_D_W=d_w is not None,
        HAS_D_LIGHT=d_transmittance is not None,
        # there is nothing to read where there are no rays
        HAS_D_REMAINING=d_remaining is not None and R > 0,
        **tile,
        **bounded_warp(96, tile, alpha),
    )
    return d_alpha
