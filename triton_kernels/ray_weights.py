# Ray weights, the formulas of csrc/cpu/ray_weights.cpp: x_i = sigma_i dt_i, T_i = exp(-sum_{j<i}
# x_j), w_i = T_i (1 - exp(-x_i)), d_x_i = (d_w_i - d_T_{i+1}) T_{i+1} - sum_{j>i} later_j with
# later_j = d_w_j w_j + d_T_{j+1} T_{j+1}, d_sigma = d_x dt, d_t_i = d_x_{i-1} sigma_{i-1} - d_x_i
# sigma_i. A program owns BLOCK_R rays and takes BLOCK_S samples of each at a time. Forward: once
# from the left. Backward: once from the right; rays of several blocks are first read from the left.
# The shifted loads hit the L1 cache. docs/compositing.md
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    accumulator,
    empty_gradient,
    is_wall,
    launch,
    light_at,
    load,
    of_block,
    optical_depth,
    stopped,
)


@triton.jit
def ray_weights_fwd_kernel(
    w_ptr,  # [R, S]
    transmittance_ptr,  # [R, S+1]
    sigma_ptr,  # [R, S]
    t_ptr,  # [R, S+1]
    R,
    S,
    t_stride_r,
    OPAQUE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    A: tl.constexpr = w_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    sigma_ptrs, t_ptrs = sigma_ptr + (r * S)[:, None], t_ptr + (r * t_stride_r)[:, None]
    ray = (r < R)[:, None]
    depth = tl.zeros([BLOCK_R], A)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[None, :]
        here = ray & (s < S)
        x_before = optical_depth(sigma_ptrs, t_ptrs, s - 1, here & (s > 0), A)
        light = light_at(depth[:, None] + tl.cumsum(x_before, 1), A)
        x = _depth(sigma_ptrs, t_ptrs, s, here, S, OPAQUE, A)
        tl.store(w_ptr + (r * S)[:, None] + s, light * stopped(x, A), mask=here)
        tl.store(transmittance_ptr + (r * t_stride_r)[:, None] + s, light, mask=here)
        depth += tl.sum(x_before, 1)
    last = S - 1 + tl.zeros([1, 1], tl.int32)
    x_last = tl.sum(_depth(sigma_ptrs, t_ptrs, last, ray & (last >= 0), S, OPAQUE, A), 1)
    tl.store(transmittance_ptr + r * t_stride_r + S, light_at(depth + x_last, A), mask=r < R)


@triton.jit
def ray_weights_bwd_kernel(
    d_sigma_ptr,  # [R, S]
    d_t_ptr,  # [R, S+1]
    d_w_ptr,  # [R, S]
    d_transmittance_ptr,  # [R, S+1]
    sigma_ptr,  # [R, S]
    t_ptr,  # [R, S+1]
    R,
    S,
    t_stride_r,
    HAS_D_W: tl.constexpr,
    HAS_D_TRANSMITTANCE: tl.constexpr,
    NEEDS_D_SIGMA: tl.constexpr,
    NEEDS_D_T: tl.constexpr,
    OPAQUE: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    A: tl.constexpr = d_w_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    sigma_ptrs, t_ptrs = sigma_ptr + (r * S)[:, None], t_ptr + (r * t_stride_r)[:, None]
    d_w_ptrs = d_w_ptr + (r * S)[:, None]
    d_light_ptrs = d_transmittance_ptr + (r * t_stride_r)[:, None]
    ray = (r < R)[:, None]
    blocks = tl.cdiv(S, BLOCK_S)

    # how deep each block lies, in registers
    block = tl.arange(0, MAX_BLOCKS)[None, :]
    depths = tl.zeros([BLOCK_R, MAX_BLOCKS], A)
    if MAX_BLOCKS > 1:
        depth = tl.zeros([BLOCK_R], A)
        for b in range(blocks):
            s = b * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
            depths = tl.where(block == b, depth[:, None], depths)
            before = ray & (s < S) & (s > 0)
            depth += tl.sum(optical_depth(sigma_ptrs, t_ptrs, s - 1, before, A), 1)

    right = tl.zeros([BLOCK_R], A)
    d_t_last = tl.zeros([BLOCK_R], A)
    for i in range(blocks):
        b = blocks - 1 - i
        s = b * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
        here = ray & (s < S)
        before = here & (s > 0)
        x_before = optical_depth(sigma_ptrs, t_ptrs, s - 1, before, A)
        deep = of_block(depths, block, b)[:, None] + tl.cumsum(x_before, 1)
        x = _depth(sigma_ptrs, t_ptrs, s, here, S, OPAQUE, A)
        light, passed = light_at(deep, A), light_at(deep + x, A)
        d_w = tl.zeros([BLOCK_R, BLOCK_S], A)
        d_w_before = tl.zeros([BLOCK_R, BLOCK_S], A)
        d_light = tl.zeros([BLOCK_R, BLOCK_S], A)
        d_passed = tl.zeros([BLOCK_R, BLOCK_S], A)
        if HAS_D_W:
            d_w = load(d_w_ptrs + s, here, A)
            d_w_before = load(d_w_ptrs + s - 1, before, A)
        if HAS_D_TRANSMITTANCE:
            d_light = load(d_light_ptrs + s, here, A)
            d_passed = load(d_light_ptrs + s + 1, here, A)
        later = d_w * light * stopped(x, A) + d_passed * passed
        from_here = right[:, None] + tl.cumsum(later, 1, reverse=True)
        right += tl.sum(later, 1)
        d_x = (d_w - d_passed) * passed - (from_here - later)
        if NEEDS_D_SIGMA:
            width = load(t_ptrs + s + 1, here, A) - load(t_ptrs + s, here, A)
            tl.store(d_sigma_ptr + (r * S)[:, None] + s, d_x * width, mask=here)
        if NEEDS_D_T:
            d_x_before = (d_w_before - d_light) * light - from_here
            d_width = _d_width(d_x, load(sigma_ptrs + s, here, A), A)
            given = _d_width(d_x_before, load(sigma_ptrs + s - 1, before, A), A)
            tl.store(d_t_ptr + (r * t_stride_r)[:, None] + s, given - d_width, mask=here)
            d_t_last += tl.sum(tl.where(here & (s == S - 1), d_width, 0.0), 1)
    if NEEDS_D_T:
        tl.store(d_t_ptr + r * t_stride_r + S, d_t_last, mask=r < R)


@triton.jit
def _depth(sigma_ptrs, t_ptrs, s, mask, S, OPAQUE: tl.constexpr, A: tl.constexpr):
    x = optical_depth(sigma_ptrs, t_ptrs, s, mask, A)
    if OPAQUE:
        x = tl.where(mask & (s == S - 1), float("inf"), x)
    return x


@triton.jit
def _d_width(d_x, sigma, A: tl.constexpr):
    # a wall stays one, however thick it is
    return tl.where(is_wall(sigma, A), 0.0, d_x * sigma)


def fwd(sigma: Tensor, t: Tensor, opaque_background: bool) -> tuple[Tensor, Tensor]:
    dtype = accumulator(sigma.dtype)
    w, transmittance = sigma.new_empty(sigma.shape, dtype=dtype), t.new_empty(t.shape, dtype=dtype)
    S = sigma.shape[-1]
    R = t.numel() // (S + 1)
    grid, tile = launch(R, S, sigma.dtype)
    ray_weights_fwd_kernel[grid](
        w, transmittance, sigma, t, R, S, S + 1, OPAQUE=opaque_background, **tile
    )
    return w, transmittance


def bwd(
    d_w: Tensor | None,
    d_transmittance: Tensor | None,
    sigma: Tensor,
    t: Tensor,
    opaque_background: bool,
    needs: int,
) -> tuple[Tensor, Tensor]:
    S = sigma.shape[-1]
    R = t.numel() // (S + 1)
    d_sigma, d_t = empty_gradient(sigma, needs, 0), empty_gradient(t, needs, 1)
    grid, tile = launch(R, S, sigma.dtype)
    absent = sigma.new_empty(0, dtype=accumulator(sigma.dtype))
    ray_weights_bwd_kernel[grid](
        d_sigma,
        d_t,
        absent if d_w is None else d_w,
        absent if d_transmittance is None else d_transmittance,
        sigma,
        t,
        R,
        S,
        S + 1,
        HAS_D_W=d_w is not None,
        HAS_D_TRANSMITTANCE=d_transmittance is not None,
        NEEDS_D_SIGMA=bool(needs & 1),
        NEEDS_D_T=bool(needs & 2),
        OPAQUE=opaque_background,
        MAX_BLOCKS=triton.next_power_of_2(max(triton.cdiv(S, tile["BLOCK_S"]), 1)),
        **tile,
    )
    return d_sigma, d_t
