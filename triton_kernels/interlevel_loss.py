# Interlevel loss, the formulas of csrc/cpu/interlevel_loss.cpp: L = 1/S sum_i r_i u_i with
# r_i = max(0, w_i - w_outer_i), u_i = r_i / (w_i + eps). A program owns a ray after the other, and
# searches as in outer_bound.py. Forward: the bounds, from running sums of w_env; then the other
# way, from running sums of u, what is kept beside dL/dw_i = u_i (2 - u_i) / S: dL/dw_env, where
# each bin gets the -2 u_i / S of the samples it bounds. Backward: d_loss times these. See
# docs/interlevel.md.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, bounded, empty_gradient, load
from .outer_bound import add_up, between, bins, launch, samples

# values of a gradient in a program
_BLOCK = 1024


@triton.jit
def interlevel_loss_fwd_kernel(
    loss_ptr,  # [R]
    slope_ptr,  # [R, S]
    slope_env_ptr,  # [R, E]
    until_ptr,  # [programs, E]
    u_until_ptr,  # [programs, S]
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
    STEPS_S: tl.constexpr,
    STEPS_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    A: tl.constexpr = loss_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    until_ptr += program * E
    u_until_ptr += program * S
    mean = 1 / tl.maximum(S, 1).to(A)
    for r in range(program, R, tl.num_programs(0)):
        t, t_env = t_ptr + r * t_stride_r, t_env_ptr + r * t_env_stride_r
        add_up(until_ptr, w_env_ptr + r * E, E, BLOCK_E)
        loss = tl.zeros((BLOCK_S,), A)
        u_sum = tl.zeros((), tl.float64)
        for start in range(0, S, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            first, behind = bins(t, start, S, t_env, E, OUTSIDE, STEPS_E, BLOCK_S, A)
            w_outer = between(until_ptr, first, behind).to(A)
            rest, u = _uncovered(load(w_ptr + r * S + s, s < S, A), w_outer, EPS)
            # of samples that there are not
            u = tl.where(s < S, u, 0.0)
            loss += rest * u
            tl.store(slope_ptr + r * S + s, mean * (u * (2 - u)), mask=s < S)
            wide = u.to(tl.float64)
            tl.store(u_until_ptr + s, u_sum + tl.cumsum(wide, 0), mask=s < S)
            u_sum += tl.sum(wide, 0)
        tl.store(loss_ptr + r, mean * tl.sum(loss, 0))
        # other threads read the sums
        tl.debug_barrier()
        for start in range(0, E, BLOCK_E):
            k = start + tl.arange(0, BLOCK_E)
            first, behind = samples(t_env, start, E, t, S, OUTSIDE, STEPS_S, BLOCK_E, A)
            u_around = between(u_until_ptr, first, behind).to(A)
            tl.store(slope_env_ptr + r * E + k, -2 * mean * u_around, mask=k < E)


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
    # half precision spilled 16 bytes for 64 registers (sm_90), double 8 for 72 (sm_100)
    tile |= bounded(80, w)
    until, u_until = (w.new_empty(grid[0], n, dtype=torch.float64) for n in (E, S))
    interlevel_loss_fwd_kernel[grid](
        loss,
        slope,
        slope_env,
        until,
        u_until,
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
