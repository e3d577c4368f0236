# Interlevel loss, the formulas of csrc/cpu/interlevel_loss.cpp: L = 1/S sum_i r_i u_i with
# r_i = max(0, w_i - w_outer_i), u_i = r_i / (w_i + eps); d_w_outer_i = -2 u_i,
# d_w_i = u_i (2 - u_i), each bin of w_env gets the gradients of the samples it bounds; all times
# d_loss / S. A program owns BLOCK_R rays and compares BLOCK_S samples with BLOCK_E bins at a time,
# as in outer_bound.py. Backward: the bounds, then the comparison again the other way; between them
# u is in registers, or, of rays of several blocks, in global memory. See docs/interlevel.md.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, bounded, empty_gradient
from .outer_bound import blocks_that_meet, bound, launch, load, touched


@triton.jit
def interlevel_loss_fwd_kernel(
    loss_ptr,  # [R]
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
    loss = tl.zeros([BLOCK_R, BLOCK_S], A)
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
    loss = tl.sum(loss, 1)[:, None]
    tl.store(loss_ptr + r, loss / tl.maximum(S, 1), mask=ray)


@triton.jit
def interlevel_loss_bwd_kernel(
    d_w_ptr,  # [R, S]
    d_w_env_ptr,  # [R, E]
    u_ptr,  # [R, S] of rays of several blocks
    d_loss_ptr,  # [R]
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
    NEEDS_D_W: tl.constexpr,
    NEEDS_D_W_ENV: tl.constexpr,
    OUTSIDE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    A: tl.constexpr = d_loss_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    ray = r < R
    t_ptrs, t_env_ptrs = t_ptr + r * t_stride_r, t_env_ptr + r * t_env_stride_r
    scale = load(d_loss_ptr + r, ray, A) / tl.maximum(S, 1)
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
        _, u = _uncovered(load(w_ptr + r * S + s, here, A), w_outer, EPS)
        if NEEDS_D_W:
            tl.store(d_w_ptr + r * S + s, scale * (u * (2 - u)), mask=here)
        if NEEDS_D_W_ENV and not ONE_BLOCK:
            tl.store(u_ptr + r * S + s, u, mask=here)

    if NEEDS_D_W_ENV:
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
                    u = load(u_ptr + r * S + s, here, A)
                met = touched(t_ptrs, s, here, t_env_ptrs, k, ray, E, OUTSIDE, A)
                u_around += tl.sum(tl.where(met, u[:, :, None], 0.0), 1)
            tl.store(d_w_env_ptr + r * E + k, -2 * scale * u_around, mask=ray & (k < E))


@triton.jit
def _uncovered(w, w_outer, EPS: tl.constexpr):
    """What of samples is not covered, and its ratio to their weight; exactly 0 where all is."""
    rest = w - w_outer
    covered = rest <= 0
    return tl.where(covered, 0.0, rest), tl.where(covered, 0.0, rest / (w + EPS))


def fwd(t: Tensor, w: Tensor, t_env: Tensor, w_env: Tensor, outside: int, eps: float) -> Tensor:
    S, E = w.shape[-1], w_env.shape[-1]
    loss = w.new_empty(w.shape[:-1], dtype=accumulator(w.dtype))
    R = loss.numel()
    grid, tile = launch(R, S, E)
    if w.dtype == torch.float64:
        # long rays spilled 8 bytes for 80 registers (sm_90), and more bound to 80 (sm_80)
        tile |= bounded(128, w)
    interlevel_loss_fwd_kernel[grid](
        loss, t, w, t_env, w_env, R, S, E, S + 1, E + 1, EPS=eps, OUTSIDE=outside, **tile
    )
    return loss


def bwd(
    d_loss: Tensor,
    t: Tensor,
    w: Tensor,
    t_env: Tensor,
    w_env: Tensor,
    outside: int,
    eps: float,
    needs: int,
) -> tuple[Tensor, Tensor]:
    S, E, R = w.shape[-1], w_env.shape[-1], d_loss.numel()
    d_w, d_w_env = empty_gradient(w, needs, 0), empty_gradient(w_env, needs, 1)
    grid, tile = launch(R, S, E)
    u = d_loss.new_empty(0 if tile["ONE_BLOCK"] else w.numel())
    interlevel_loss_bwd_kernel[grid](
        d_w,
        d_w_env,
        u,
        d_loss,
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
        NEEDS_D_W=bool(needs & 1),
        NEEDS_D_W_ENV=bool(needs & 2),
        OUTSIDE=outside,
        **tile,
    )
    return d_w, d_w_env
