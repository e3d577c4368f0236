# Interlevel loss, the formulas of csrc/cpu/interlevel_loss.cpp: L = 1/S sum_i r_i u_i with
# r_i = max(0, w_i - w_outer_i), u_i = r_i / (w_i + eps). A program owns BLOCK_R rays and compares
# BLOCK_S samples with BLOCK_E bins at a time, as in outer_bound.py. Forward: the bounds, then the
# comparison again the other way, for what is kept: dL/dw_i = u_i (2 - u_i) / S, and dL/dw_env,
# where each bin gets the -2 u_i / S of the samples it bounds; between them u is in registers, or,
# of rays of several blocks, where the former will be. Backward: d_loss times these. See
# docs/interlevel.md.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, bounded, empty_gradient
from .outer_bound import blocks_that_meet, bound, launch, load, touched

# values of a gradient in a program
_BLOCK = 1024


@triton.jit
def interlevel_loss_fwd_kernel(
    loss_ptr,  # [R]
    slope_ptr,  # [R, S]
    slope_env_ptr,  # [R, E]
    t_ptr,  # [R, S+1]
    w_ptr,  # [R, S]
    t_env_ptr,  # [R, E+1]
    w_env_ptr,  # [R, E]
    R,
    S,
    E,
    t_stride_r,
    t_env_stride_r,
    EPS: tl.constexpr,
    OUTSIDE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    A: tl.constexpr = loss_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    ray = r < R
    t_ptrs, t_env_ptrs = t_ptr + r * t_stride_r, t_env_ptr + r * t_env_stride_r
    n = tl.maximum(S, 1)
    loss = tl.zeros([BLOCK_R, BLOCK_S], A)
    u = tl.zeros([BLOCK_R, BLOCK_S], A)
    until = tl.zeros([BLOCK_R, 1], tl.int32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[None, :]
        here = ray & (s < S)
        behind = tl.minimum(start + BLOCK_S, S)
        first, last, until = blocks_that_meet(
            t_env_ptrs, E, t_ptrs, behind, S, until, ray, True, ONE_BLOCK, STEPS, BLOCK_E, A
        )
        w_outer = bound(
            t_ptrs, s, here, t_env_ptrs, w_env_ptr + r * E, ray, E, first, last, OUTSIDE, BLOCK_E, A
        )
        rest, u = _uncovered(load(w_ptr + r * S + s, here, A), w_outer, EPS)
        loss += rest * u
        kept = u * (2 - u) / n if ONE_BLOCK else u
        tl.store(slope_ptr + r * S + s, kept, mask=here)
    loss = tl.sum(loss, 1)[:, None]
    tl.store(loss_ptr + r, loss / n, mask=ray)

    if not ONE_BLOCK:
        tl.debug_barrier()
    until = tl.zeros([BLOCK_R, 1], tl.int32)
    for start in range(0, E, BLOCK_E):
        k = start + tl.arange(0, BLOCK_E)[None, :]
        u_around = tl.zeros([BLOCK_R, BLOCK_E], A)
        behind = tl.minimum(start + BLOCK_E, E)
        first, last, until = blocks_that_meet(
            t_ptrs, S, t_env_ptrs, behind, E, until, ray, False, ONE_BLOCK, STEPS, BLOCK_S, A
        )
        for block in range(first, last, BLOCK_S):
            s = block + tl.arange(0, BLOCK_S)[None, :]
            here = ray & (s < S)
            if not ONE_BLOCK:
                u = load(slope_ptr + r * S + s, here, A)
            met = touched(t_ptrs, s, here, t_env_ptrs, k, ray, E, OUTSIDE, A)
            u_around += tl.sum(tl.where(met, u[:, :, None], 0.0), 1)
        tl.store(slope_env_ptr + r * E + k, -2 * u_around / n, mask=ray & (k < E))

    if not ONE_BLOCK:
        tl.debug_barrier()
        for start in range(0, S, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)[None, :]
            here = ray & (s < S)
            u = load(slope_ptr + r * S + s, here, A)
            tl.store(slope_ptr + r * S + s, u * (2 - u) / n, mask=here)


@triton.jit
def interlevel_loss_bwd_kernel(
    d_w_ptr,  # [R, S] or [0]
    d_w_env_ptr,  # [R, E] or [0]
    d_loss_ptr,  # [R]
    slope_ptr,  # [R, S]
    slope_env_ptr,  # [R, E]
    wanted,
    wanted_env,
    S,
    E,
    BLOCK: tl.constexpr,
):
    _scale(d_w_ptr, d_loss_ptr, slope_ptr, wanted, S, BLOCK)
    _scale(d_w_env_ptr, d_loss_ptr, slope_env_ptr, wanted_env, E, BLOCK)


@triton.jit
def _scale(d_x_ptr, d_loss_ptr, slope_ptr, wanted, n, BLOCK: tl.constexpr):
    """A block of the gradient to an input that has n values for each ray."""
    A: tl.constexpr = d_loss_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK
    n = tl.maximum(n, 1)
    r = first // n
    i = tl.arange(0, BLOCK)
    here = first + i < wanted
    d_loss = load(d_loss_ptr + r + ((first - r * n).to(tl.int32) + i) // n, here, A)
    tl.store(d_x_ptr + first + i, d_loss * load(slope_ptr + first + i, here, A), mask=here)


@triton.jit
def _uncovered(w, w_outer, EPS: tl.constexpr):
    """What of samples is not covered, and its ratio to their weight; exactly 0 where all is."""
    rest = w - w_outer
    covered = rest <= 0
    return tl.where(covered, 0.0, rest), tl.where(covered, 0.0, rest / (w + EPS))


def fwd(
    t: Tensor, w: Tensor, t_env: Tensor, w_env: Tensor, outside: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    S, E = w.shape[-1], w_env.shape[-1]
    dtype = accumulator(w.dtype)
    loss = w.new_empty(w.shape[:-1], dtype=dtype)
    slope, slope_env = torch.empty_like(w, dtype=dtype), torch.empty_like(w_env, dtype=dtype)
    R = loss.numel()
    grid, tile = launch(R, S, E)
    # spilled 6 bytes for 72 registers (sm_100); in float64 long rays 8 for 80 (sm_90), and more
    # bound to 80 (sm_80)
    tile |= bounded(128 if w.dtype == torch.float64 else 80, w)
    interlevel_loss_fwd_kernel[grid](
        loss,
        slope,
        slope_env,
        t,
        w,
        t_env,
        w_env,
        R,
        S,
        E,
        S + 1,
        E + 1,
        EPS=eps,
        OUTSIDE=outside,
        **tile,
    )
    return loss, slope, slope_env


def bwd(
    d_loss: Tensor,
    slope: Tensor,
    slope_env: Tensor,
    t: Tensor,
    w: Tensor,
    t_env: Tensor,
    w_env: Tensor,
    outside: int,
    eps: float,
    needs: int,
) -> tuple[Tensor, Tensor]:
    d_w, d_w_env = empty_gradient(w, needs, 0), empty_gradient(w_env, needs, 1)
    grid = (triton.cdiv(max(d_w.numel(), d_w_env.numel()), _BLOCK),)
    interlevel_loss_bwd_kernel[grid](
        d_w,
        d_w_env,
        d_loss,
        slope,
        slope_env,
        d_w.numel(),
        d_w_env.numel(),
        w.shape[-1],
        w_env.shape[-1],
        BLOCK=_BLOCK,
    )
    return d_w, d_w_env
