# Interlevel loss of packed rays, the formulas of csrc/cpu/packed_interlevel_loss.cpp: L = 1/n sum_i
# r_i u_i over a ray's n samples, r_i = max(0, w_i - w_outer_i), u_i = r_i / (w_i + eps). A program
# owns BLOCK_R rays and takes BLOCK_S samples or bins of each at a time, then the long ones among
# them by themselves. Forward: running sums of w_env go to global memory in double, where samples
# look up what lies between the bins that they find by bisection, then the same of u, where bins
# look: kept are dL/dw_i = u_i (2 - u_i) / n and dL/dw_env, the sums of -2 u_i / n. Backward: d_loss
# times these. Source: Mip-NeRF 360, eq. 13; docs/interlevel.md.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    accumulator,
    bounded,
    empty_gradient,
    launch_packed,
    load,
    packed_rays,
    packed_values,
    sums_of_loaded,
)
from .interlevel_loss import _uncovered as uncovered


@triton.jit
def packed_interlevel_loss_fwd_kernel(
    loss_ptr,  # [R]
    slope_ptr,  # [P]
    slope_env_ptr,  # [Q]
    until_ptr,  # [Q]
    u_until_ptr,  # [P]
    t_starts_ptr,  # [P]
    t_ends_ptr,  # [P]
    w_ptr,  # [P]
    offsets_ptr,  # [R+1]
    t_env_starts_ptr,  # [Q]
    t_env_ends_ptr,  # [Q]
    w_env_ptr,  # [Q]
    offsets_env_ptr,  # [R+1]
    R,
    P,
    Q,
    EPS: tl.constexpr,
    OUTSIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
):
    # one ray less: the samples before offsets[0]
    first = tl.program_id(0).to(tl.int64) * BLOCK_R - 1
    r = first + tl.arange(0, BLOCK_R)
    begin, n = packed_rays(offsets_ptr, r, R, P)
    begin_env, m = packed_rays(offsets_env_ptr, r, R, Q)
    short = tl.maximum(n, m) <= BLOCK_LONG
    is_ray = (r >= 0) & (r < R)
    loss = _losses(
        loss_ptr, slope_ptr, slope_env_ptr, until_ptr, u_until_ptr, t_starts_ptr, t_ends_ptr, w_ptr,
        t_env_starts_ptr, t_env_ends_ptr, w_env_ptr, is_ray, begin, tl.where(short, n, 0),
        begin_env, tl.where(short, m, 0), EPS, OUTSIDE, BLOCK_S, BLOCK_E,
    )  # fmt: skip
    tl.store(loss_ptr + r, loss, mask=is_ray & short)
    if tl.max(tl.maximum(n, m), 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            one = first + i + tl.arange(0, 1)
            begin_one, n_one = packed_rays(offsets_ptr, one, R, P)
            begin_env_one, m_one = packed_rays(offsets_env_ptr, one, R, Q)
            long = tl.maximum(n_one, m_one) > BLOCK_LONG
            one_is_ray = (one >= 0) & (one < R)
            loss_one = _losses(
                loss_ptr, slope_ptr, slope_env_ptr, until_ptr, u_until_ptr, t_starts_ptr,
                t_ends_ptr, w_ptr, t_env_starts_ptr, t_env_ends_ptr, w_env_ptr, one_is_ray,
                begin_one, tl.where(long, n_one, 0), begin_env_one, tl.where(long, m_one, 0), EPS,
                OUTSIDE, BLOCK_LONG, BLOCK_LONG,
            )  # fmt: skip
            tl.store(loss_ptr + one, loss_one, mask=one_is_ray & long)


@triton.jit
def _losses(
    loss_ptr,
    slope_ptr,
    slope_env_ptr,
    until_ptr,
    u_until_ptr,
    t_starts_ptr,
    t_ends_ptr,
    w_ptr,
    t_env_starts_ptr,
    t_env_ends_ptr,
    w_env_ptr,
    is_ray,
    begin,
    n,
    begin_env,
    m,
    EPS: tl.constexpr,
    OUTSIDE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    A: tl.constexpr = loss_ptr.dtype.element_ty
    # rays are shorter than 2^31
    n, m = n.to(tl.int32), m.to(tl.int32)
    most, most_env = _power_of_two(n), _power_of_two(m)
    _add_up(until_ptr, w_env_ptr, begin_env, m, BLOCK_E)
    # what is in no ray has no slope
    mean = tl.where(is_ray, 1 / tl.maximum(n, 1).to(A), 0.0)[:, None]
    loss, u_sum = tl.zeros(n.shape, tl.float64), tl.zeros(n.shape, tl.float64)
    for start in range(0, tl.max(n, 0), BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[None, :]
        rest, u = _uncovered(
            until_ptr, t_starts_ptr, t_ends_ptr, w_ptr, t_env_starts_ptr, t_env_ends_ptr, begin, n,
            begin_env, m, most_env, s, EPS, OUTSIDE, A,
        )  # fmt: skip
        loss += tl.sum((rest * u).to(tl.float64), 1)
        here, at = s < n[:, None], begin[:, None] + s
        tl.store(slope_ptr + at, mean * (u * (2 - u)), mask=here)
        wide = u.to(tl.float64)
        tl.store(u_until_ptr + at, u_sum[:, None] + tl.cumsum(wide, 1), mask=here)
        u_sum += tl.sum(wide, 1)
    loss = (loss / tl.maximum(n, 1)).to(A)

    # other threads read the sums
    tl.debug_barrier()
    n, m = n[:, None], m[:, None]
    begin, begin_env = begin[:, None], begin_env[:, None]
    for start in range(0, tl.max(m), BLOCK_E):
        k = start + tl.arange(0, BLOCK_E)[None, :]
        here = k < m
        # a bin bounds the samples that end at or beyond the end of the one before it, and
        # start before the start of the next one
        inner, outer = here & (k > 0), here & (k < m - 1)
        at = begin_env + k
        before = load(t_env_ends_ptr + at - 1, inner, A)
        behind = load(t_env_starts_ptr + at + 1, outer, A)
        if OUTSIDE != 0:
            before = tl.where(k > 0, before, load(t_env_starts_ptr + at, here & (k == 0), A))
            inner = here
        if OUTSIDE == 1:
            last = here & (k == m - 1)
            behind = tl.where(last, load(t_env_ends_ptr + at, last, A), behind)
            outer = here
        from_ = _count(t_ends_ptr + begin, n, most, before, inner, False, A)
        until = _count(t_starts_ptr + begin, n, most, behind, outer, False, A)
        until = tl.where(outer, until, n)
        d = _up_to(u_until_ptr + begin, until, here) - _up_to(u_until_ptr + begin, from_, here)
        tl.store(slope_env_ptr + at, -2 * mean * d.to(A), mask=here)
    return loss


@triton.jit
def packed_interlevel_loss_bwd_kernel(
    d_w_ptr,  # [P]
    d_w_env_ptr,  # [Q]
    d_loss_ptr,  # [R]
    slope_ptr,  # [P]
    slope_env_ptr,  # [Q]
    offsets_ptr,  # [R+1]
    offsets_env_ptr,  # [R+1]
    R,
    P,
    Q,
    NEEDS_D_W: tl.constexpr,
    NEEDS_D_W_ENV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
):
    if NEEDS_D_W:
        _scale(d_w_ptr, d_loss_ptr, slope_ptr, offsets_ptr, R, P, BLOCK_R, BLOCK_S, BLOCK_LONG)
    if NEEDS_D_W_ENV:
        _scale(
            d_w_env_ptr, d_loss_ptr, slope_env_ptr, offsets_env_ptr, R, Q, BLOCK_R, BLOCK_S,
            BLOCK_LONG,
        )  # fmt: skip


@triton.jit
def _scale(
    d_x_ptr,
    d_loss_ptr,
    slope_ptr,
    offsets_ptr,
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
    _scale_rays(d_x_ptr, d_loss_ptr, slope_ptr, r, R, begin, tl.where(short, n, 0), BLOCK_S)
    if tl.max(n, 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            one = first + i + tl.arange(0, 1)
            begin_one, n_one = packed_rays(offsets_ptr, one, R, P)
            long = n_one > BLOCK_LONG
            _scale_rays(
                d_x_ptr, d_loss_ptr, slope_ptr, one, R, begin_one, tl.where(long, n_one, 0),
                BLOCK_LONG,
            )  # fmt: skip


@triton.jit
def _scale_rays(d_x_ptr, d_loss_ptr, slope_ptr, r, R, begin, n, BLOCK: tl.constexpr):
    A: tl.constexpr = d_loss_ptr.dtype.element_ty
    d_loss = packed_values(d_loss_ptr, r, R)[:, None]
    for b in range(tl.cdiv(tl.max(n, 0), BLOCK)):
        s = tl.cast(b, tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
        here, at = s < n[:, None], begin[:, None] + s
        tl.store(d_x_ptr + at, d_loss * load(slope_ptr + at, here, A), mask=here)


@triton.jit
def _add_up(until_ptr, w_env_ptr, begin_env, m, BLOCK: tl.constexpr):
    """Running sums of the weights of bins, each with its own, for all threads."""
    sums = tl.zeros(m.shape, tl.float64)
    for start in range(0, tl.max(m, 0), BLOCK):
        k = start + tl.arange(0, BLOCK)[None, :]
        here = k < m[:, None]
        w_env = load(w_env_ptr + begin_env[:, None] + k, here, tl.float64)
        tl.store(until_ptr + begin_env[:, None] + k, sums[:, None] + tl.cumsum(w_env, 1), mask=here)
        sums += sums_of_loaded(w_env)
    tl.debug_barrier()


@triton.jit
def _uncovered(
    until_ptr,
    t_starts_ptr,
    t_ends_ptr,
    w_ptr,
    t_env_starts_ptr,
    t_env_ends_ptr,
    begin,
    n,
    begin_env,
    m,
    most_env,
    s,
    EPS: tl.constexpr,
    OUTSIDE: tl.constexpr,
    A: tl.constexpr,
):
    """What of samples s is not covered, and its ratio to their weight; exactly 0 where all is."""
    here = s < n[:, None]
    at, m, begin_env = begin[:, None] + s, m[:, None], begin_env[:, None]
    start, end = load(t_starts_ptr + at, here, A), load(t_ends_ptr + at, here, A)
    starts_ptrs, ends_ptrs = t_env_starts_ptr + begin_env, t_env_ends_ptr + begin_env
    first = tl.maximum(_count(starts_ptrs, m, most_env, start, here, True, A) - 1, 0)
    behind = tl.minimum(_count(ends_ptrs, m, most_env, end, here, True, A) + 1, m)
    if OUTSIDE != 0:
        behind = tl.where(load(starts_ptrs, m > 0, A) > end, 0, behind)
    if OUTSIDE == 1:
        first = tl.where(load(ends_ptrs + m - 1, m > 0, A) > start, first, m)
    until_ptrs = until_ptr + begin_env
    w_outer = (_up_to(until_ptrs, behind, here) - _up_to(until_ptrs, first, here)).to(A)
    return uncovered(load(w_ptr + at, here, A), w_outer, EPS)


@triton.jit
def _up_to(sums_ptrs, count, here):
    """The sum of so many of the first values."""
    return load(sums_ptrs + count - 1, here & (count > 0), tl.float64)


@triton.jit
def _count(ptrs, n, most, x, here, RIGHT: tl.constexpr, A: tl.constexpr):
    """How many of n values that do not decrease are below x, with RIGHT also those at x; the first
    step is `most`."""
    count = tl.zeros(x.shape, tl.int32)
    step = most
    while step > 0:
        last = count + step - 1
        inside = here & (last < n)
        value = load(ptrs + last, inside, A)
        passed = ~(value > x) if RIGHT else value < x
        count = tl.where(inside & passed, last + 1, count)
        step //= 2
    return count


@triton.jit
def _power_of_two(n):
    """The largest that is not above the largest n; 0 where there is none."""
    most = tl.max(n, 0)
    power = tl.minimum(most, 1)
    while (power > 0) & (power <= most - power):
        power *= 2
    return power


def fwd(
    t_starts: Tensor,
    t_ends: Tensor,
    w: Tensor,
    offsets: Tensor,
    t_env_starts: Tensor,
    t_env_ends: Tensor,
    w_env: Tensor,
    offsets_env: Tensor,
    outside: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    R, P, Q = len(offsets) - 1, len(w), len(w_env)
    loss, slope, slope_env = (w.new_empty(n, dtype=accumulator(w.dtype)) for n in (R, P, Q))
    until, u_until = (w.new_empty(n, dtype=torch.float64) for n in (Q, P))
    grid, tile = launch_packed(R + 2, max(P, Q), w.dtype)
    # a block of samples and one of bins for the average ray
    tile["BLOCK_E"], tile["BLOCK_S"] = (
        min(max(triton.next_power_of_2(triton.cdiv(x, R + 2)), 16), tile["BLOCK_S"]) for x in (Q, P)
    )
    # 4 samples a thread: 8 took 146 registers (sm_90), and spilled 8 bytes where ptxas chose 128
    tile["BLOCK_LONG"] //= 2
    packed_interlevel_loss_fwd_kernel[grid](
        loss,
        slope,
        slope_env,
        until,
        u_until,
        t_starts,
        t_ends,
        w,
        offsets,
        t_env_starts,
        t_env_ends,
        w_env,
        offsets_env,
        R,
        P,
        Q,
        EPS=eps,
        OUTSIDE=outside,
        **tile,
        **bounded(128, w),
    )
    return loss, slope, slope_env


def bwd(
    d_loss: Tensor,
    slope: Tensor,
    slope_env: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    w: Tensor,
    offsets: Tensor,
    t_env_starts: Tensor,
    t_env_ends: Tensor,
    w_env: Tensor,
    offsets_env: Tensor,
    outside: int,
    eps: float,
    needs: int,
) -> tuple[Tensor, Tensor]:
    R, P, Q = len(offsets) - 1, len(w), len(w_env)
    d_w, d_w_env = empty_gradient(w, needs, 0), empty_gradient(w_env, needs, 1)
    if R == 0:
        return d_w.zero_(), d_w_env.zero_()
    grid, tile = launch_packed(R + 2, max(P, Q), w.dtype)
    packed_interlevel_loss_bwd_kernel[grid](
        d_w,
        d_w_env,
        d_loss,
        slope,
        slope_env,
        offsets,
        offsets_env,
        R,
        P,
        Q,
        NEEDS_D_W=bool(needs & 1),
        NEEDS_D_W_ENV=bool(needs & 2),
        **tile,
    )
    return d_w, d_w_env
