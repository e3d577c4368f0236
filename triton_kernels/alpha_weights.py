# Weights from opacities, the formulas of csrc/cpu/alpha_weights.cpp: w_i = T_i a_i, T_{i+1} =
# T_i (1 - a_i), d_a_i = T_i (d_w_i - B_i), B_i = d_w_{i+1} a_{i+1} + d_T_{i+1} +
# (1 - a_{i+1}) B_{i+1}, a scan of affine maps that divides by nothing.
# A program owns BLOCK_R rays and takes BLOCK_S samples of each at a time. Forward: once from the
# left. Backward: once from the right; rays of several blocks are first read from the left.
# The shifted loads hit the L1 cache. docs/compositing.md
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, empty_gradient, launch, load, of_block


@triton.jit
def alpha_weights_fwd_kernel(
    w_ptr,  # [R, S]
    transmittance_ptr,  # [R, S+1]
    alpha_ptr,  # [R, S]
    R,
    S,
    t_stride_r,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    A: tl.constexpr = w_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    alpha_ptrs = alpha_ptr + (r * S)[:, None]
    ray = (r < R)[:, None]
    light_of_block = tl.zeros([BLOCK_R], A) + 1.0
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[None, :]
        here = ray & (s < S)
        inside = _light(alpha_ptrs, s, here, A)
        light = light_of_block[:, None] * inside
        alpha = load(alpha_ptrs + s, here, A)
        tl.store(w_ptr + (r * S)[:, None] + s, light * alpha, mask=here)
        tl.store(transmittance_ptr + (r * t_stride_r)[:, None] + s, light, mask=here)
        light_of_block *= _end(inside, BLOCK_S)
    last = load(alpha_ptr + r * S + S - 1, r < R * tl.minimum(S, 1), A)
    tl.store(transmittance_ptr + r * t_stride_r + S, light_of_block * (1.0 - last), mask=r < R)


@triton.jit
def alpha_weights_bwd_kernel(
    d_alpha_ptr,  # [R, S]
    d_w_ptr,  # [R, S]
    d_transmittance_ptr,  # [R, S+1]
    alpha_ptr,  # [R, S]
    R,
    S,
    t_stride_r,
    HAS_D_W: tl.constexpr,
    HAS_D_TRANSMITTANCE: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    A: tl.constexpr = d_w_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    alpha_ptrs, d_w_ptrs = alpha_ptr + (r * S)[:, None], d_w_ptr + (r * S)[:, None]
    d_light_ptrs = d_transmittance_ptr + (r * t_stride_r)[:, None]
    ray = (r < R)[:, None]
    blocks = tl.cdiv(S, BLOCK_S)

    # the light that reaches each block, in registers
    block = tl.arange(0, MAX_BLOCKS)[None, :]
    lights = tl.zeros([BLOCK_R, MAX_BLOCKS], A) + 1.0
    if MAX_BLOCKS > 1:
        light_of_block = tl.zeros([BLOCK_R], A) + 1.0
        for b in range(blocks):
            s = b * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
            lights = tl.where(block == b, light_of_block[:, None], lights)
            light_of_block *= _end(_light(alpha_ptrs, s, ray & (s < S), A), BLOCK_S)

    behind_block = tl.zeros([BLOCK_R], A)
    if HAS_D_TRANSMITTANCE:
        behind_block = load(d_transmittance_ptr + r * t_stride_r + S, r < R, A)
    for i in range(blocks):
        b = blocks - 1 - i
        s = b * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
        here, next = ray & (s < S), ray & (s + 1 < S)
        light = of_block(lights, block, b)[:, None] * _light(alpha_ptrs, s, here, A)
        alpha_next = load(alpha_ptrs + s + 1, next, A)
        d_w = tl.zeros([BLOCK_R, BLOCK_S], A)
        d_w_next = tl.zeros([BLOCK_R, BLOCK_S], A)
        d_light_next = tl.zeros([BLOCK_R, BLOCK_S], A)
        if HAS_D_W:
            d_w = load(d_w_ptrs + s, here, A)
            d_w_next = load(d_w_ptrs + s + 1, next, A)
        if HAS_D_TRANSMITTANCE:
            d_light_next = load(d_light_ptrs + s + 1, next, A)
        scale, add = tl.associative_scan(
            (1.0 - alpha_next, d_w_next * alpha_next + d_light_next), 1, _join, reverse=True
        )
        behind = add + scale * behind_block[:, None]
        d_alpha = light * (d_w - behind)
        tl.store(d_alpha_ptr + (r * S)[:, None] + s, d_alpha, mask=here)
        behind_block = tl.sum(tl.where(s == b * BLOCK_S, behind, 0.0), 1)


@triton.jit
def _join(scale, add, scale_next, add_next):
    return scale_next * scale, add_next + scale_next * add


@triton.jit
def _light(alpha_ptrs, s, here, A: tl.constexpr):
    """What the samples before let through, from the last of the block before on."""
    return tl.cumprod(1.0 - load(alpha_ptrs + s - 1, here & (s > 0), A), 1)


@triton.jit
def _end(x, BLOCK_S: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BLOCK_S)[None, :] == BLOCK_S - 1, x, 0.0), 1)


def fwd(alpha: Tensor) -> tuple[Tensor, Tensor]:
    dtype, S = accumulator(alpha.dtype), alpha.shape[-1]
    w = alpha.new_empty(alpha.shape, dtype=dtype)
    transmittance = alpha.new_empty((*alpha.shape[:-1], S + 1), dtype=dtype)
    R = transmittance.numel() // (S + 1)
    grid, tile = launch(R, S, alpha.dtype)
    alpha_weights_fwd_kernel[grid](w, transmittance, alpha, R, S, S + 1, **tile)
    return w, transmittance


def bwd(d_w: Tensor | None, d_transmittance: Tensor | None, alpha: Tensor, needs: int) -> Tensor:
    S = alpha.shape[-1]
    d_alpha = empty_gradient(alpha, needs, 0)
    R = d_alpha.numel() // max(S, 1)
    grid, tile = launch(R, S, alpha.dtype)
    absent = alpha.new_empty(0, dtype=accumulator(alpha.dtype))
    alpha_weights_bwd_kernel[grid](
        d_alpha,
        absent if d_w is None else d_w,
        absent if d_transmittance is None else d_transmittance,
        alpha,
        R,
        S,
        S + 1,
        HAS_D_W=d_w is not None,
        HAS_D_TRANSMITTANCE=d_transmittance is not None,
        MAX_BLOCKS=triton.next_power_of_2(max(triton.cdiv(S, tile["BLOCK_S"]), 1)),
        **tile,
    )
    return d_alpha
