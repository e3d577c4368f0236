# Distortion loss of packed rays, the formulas of csrc/cpu/packed_distortion_loss.cpp: L = sum_j w_j
# (spread_j + 1/3 w_j dt_j), d_w_j = spread_j + sum_{k>j} gap_k (w_k + right_k) + 2/3 w_j dt_j,
# d_m_j = 2 w_j (left_j - right_j), d_dt_j = 1/3 w_j^2.
# A program owns BLOCK_R rays and takes BLOCK_S samples of each at a time, then the long ones among
# them by themselves. Forward: once from the left. Backward: once from the right; rays of several
# blocks are first read from the left, for what each block starts with. The shifted loads hit the
# L1 cache. Derivation: docs/distortion.md.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    accumulator,
    add_exactly,
    empty_gradient,
    launch_packed,
    packed_rays,
    packed_values,
)


@triton.jit
def packed_distortion_loss_fwd_kernel(
    loss_ptr,  # [R]
    t_starts_ptr,  # [P]
    t_ends_ptr,  # [P]
    w_ptr,  # [P]
    offsets_ptr,  # [R+1]
    R,
    P,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    r = first + tl.arange(0, BLOCK_R)
    begin, n = packed_rays(offsets_ptr, r, R, P)
    short = n <= BLOCK_LONG
    loss = _losses(loss_ptr, t_starts_ptr, t_ends_ptr, w_ptr, begin, tl.where(short, n, 0), BLOCK_S)
    tl.store(loss_ptr + r, loss, mask=(r < R) & short)
    if tl.max(n, 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            one = first + i + tl.arange(0, 1)
            begin_one, n_one = packed_rays(offsets_ptr, one, R, P)
            n_one = tl.where(n_one > BLOCK_LONG, n_one, 0)
            loss_one = _losses(
                loss_ptr, t_starts_ptr, t_ends_ptr, w_ptr, begin_one, n_one, BLOCK_LONG
            )
            tl.store(loss_ptr + one, loss_one, mask=(one < R) & (n_one > 0))


@triton.jit
def _losses(loss_ptr, t_starts_ptr, t_ends_ptr, w_ptr, begin, n, BLOCK: tl.constexpr):
    A: tl.constexpr = loss_ptr.dtype.element_ty
    weight = tl.zeros(n.shape, A)
    weight_lost = tl.zeros(n.shape, A)
    spread = tl.zeros(n.shape, A)
    spread_lost = tl.zeros(n.shape, A)
    loss = tl.zeros(n.shape, A)
    loss_lost = tl.zeros(n.shape, A)
    for b in range(tl.cdiv(tl.max(n, 0), BLOCK)):
        s = tl.cast(b, tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
        k, here, inner = begin[:, None] + s, s < n[:, None], (s > 0) & (s < n[:, None])
        w_before = _load(w_ptr + k - 1, inner, A)
        step = _gap(t_starts_ptr, t_ends_ptr, k, inner, A) * (
            weight[:, None] + tl.cumsum(w_before, 1)
        )
        spread_left = spread[:, None] + tl.cumsum(step, 1)
        w = _load(w_ptr + k, here, A)
        width = _load(t_ends_ptr + k, here, A) - _load(t_starts_ptr + k, here, A)
        term = tl.sum(w * (spread_left + (1 / 3) * (w * width)), 1)
        loss, loss_lost = add_exactly(loss, loss_lost, term)
        weight, weight_lost = add_exactly(weight, weight_lost, tl.sum(w_before, 1))
        spread, spread_lost = add_exactly(spread, spread_lost, tl.sum(step, 1))
    return loss


@triton.jit
def packed_distortion_loss_bwd_kernel(
    d_t_starts_ptr,  # [P]
    d_t_ends_ptr,  # [P]
    d_w_ptr,  # [P]
    kept_ptr,  # [2, P // BLOCK_S + 1]
    d_loss_ptr,  # [R]
    t_starts_ptr,  # [P]
    t_ends_ptr,  # [P]
    w_ptr,  # [P]
    offsets_ptr,  # [R+1]
    R,
    P,
    NEEDS_D_T_STARTS: tl.constexpr,
    NEEDS_D_T_ENDS: tl.constexpr,
    NEEDS_D_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
):
    # one ray less: the samples before offsets[0]
    first = tl.program_id(0).to(tl.int64) * BLOCK_R - 1
    r = first + tl.arange(0, BLOCK_R)
    begin, n = packed_rays(offsets_ptr, r, R, P)
    longest = tl.max(n, 0)
    n = tl.where(n <= BLOCK_LONG, n, 0)
    d_loss = packed_values(d_loss_ptr, r, R)
    _gradients(
        d_t_starts_ptr, d_t_ends_ptr, d_w_ptr, kept_ptr, d_loss, t_starts_ptr, t_ends_ptr, w_ptr,
        begin, n, P, NEEDS_D_T_STARTS, NEEDS_D_T_ENDS, NEEDS_D_W, BLOCK_S, BLOCK_S,
    )  # fmt: skip
    if longest > BLOCK_LONG:
        for i in range(BLOCK_R):
            one = first + i + tl.arange(0, 1)
            begin_one, n_one = packed_rays(offsets_ptr, one, R, P)
            n_one = tl.where(n_one > BLOCK_LONG, n_one, 0)
            d_loss_one = packed_values(d_loss_ptr, one, R)
            _gradients(
                d_t_starts_ptr, d_t_ends_ptr, d_w_ptr, kept_ptr, d_loss_one, t_starts_ptr,
                t_ends_ptr, w_ptr, begin_one, n_one, P, NEEDS_D_T_STARTS, NEEDS_D_T_ENDS,
                NEEDS_D_W, BLOCK_S, BLOCK_LONG,
            )  # fmt: skip


@triton.jit
def _gradients(
    d_t_starts_ptr,
    d_t_ends_ptr,
    d_w_ptr,
    kept_ptr,
    d_loss,
    t_starts_ptr,
    t_ends_ptr,
    w_ptr,
    begin,
    n,
    P,
    NEEDS_D_T_STARTS: tl.constexpr,
    NEEDS_D_T_ENDS: tl.constexpr,
    NEEDS_D_W: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    A: tl.constexpr = d_loss.dtype
    # the sums before each block but a ray's first; rays have room for them where they begin
    place = begin // BLOCK_S - 1
    spreads_ptr = kept_ptr + P // BLOCK_S + 1
    blocks = tl.cdiv(tl.max(n, 0), BLOCK)
    weight = tl.zeros(n.shape, A)
    weight_lost = tl.zeros(n.shape, A)
    spread = tl.zeros(n.shape, A)
    spread_lost = tl.zeros(n.shape, A)
    for i in range(1, blocks):
        b = tl.cast(i, tl.int64)
        s = (b - 1) * BLOCK + tl.arange(0, BLOCK)[None, :]
        k, inner = begin[:, None] + s, (s > 0) & (s < n[:, None])
        w_before = _load(w_ptr + k - 1, inner, A)
        left = weight[:, None] + tl.cumsum(w_before, 1)
        step = _gap(t_starts_ptr, t_ends_ptr, k, inner, A) * left
        weight, weight_lost = add_exactly(weight, weight_lost, tl.sum(w_before, 1))
        spread, spread_lost = add_exactly(spread, spread_lost, tl.sum(step, 1))
        tl.store(kept_ptr + place + b, weight, mask=b * BLOCK < n)
        tl.store(spreads_ptr + place + b, spread, mask=b * BLOCK < n)
    # other threads read them
    tl.debug_barrier()

    weight_right = tl.zeros(n.shape, A)
    weight_right_lost = tl.zeros(n.shape, A)
    spread_right = tl.zeros(n.shape, A)
    spread_right_lost = tl.zeros(n.shape, A)
    for i in range(blocks):
        b = blocks - 1 - tl.cast(i, tl.int64)
        s = b * BLOCK + tl.arange(0, BLOCK)[None, :]
        k, here, inner = begin[:, None] + s, s < n[:, None], (s > 0) & (s < n[:, None])
        # not the first block, and one that exists
        kept = tl.minimum(b, n - b * BLOCK) > 0
        kept_at = tl.where(kept, place + b, 0)
        weight = tl.where(kept, tl.load(kept_ptr + kept_at), 0.0)
        w = _load(w_ptr + k, here, A)
        left = weight[:, None] + tl.cumsum(_load(w_ptr + k - 1, inner, A), 1)
        followed = s + 1 < n[:, None]
        w_after = _load(w_ptr + k + 1, followed, A)
        right = weight_right[:, None] + tl.cumsum(w_after, 1, reverse=True)
        weight_right, weight_right_lost = add_exactly(
            weight_right, weight_right_lost, tl.sum(w_after, 1)
        )
        balance = left - right
        if NEEDS_D_T_STARTS:
            d_t_starts = d_loss[:, None] * (w * (balance - (1 / 3) * w))
            tl.store(d_t_starts_ptr + k, d_t_starts, mask=here)
        if NEEDS_D_T_ENDS:
            d_t_ends = d_loss[:, None] * (w * (balance + (1 / 3) * w))
            tl.store(d_t_ends_ptr + k, d_t_ends, mask=here)
        if NEEDS_D_W:
            spread = tl.where(kept, tl.load(spreads_ptr + kept_at), 0.0)
            gap = _gap(t_starts_ptr, t_ends_ptr, k, inner, A)
            from_left = spread[:, None] + tl.cumsum(gap * left, 1)
            # sample k pulls on all before it by the gap of sample k + 1
            step = _gap(t_starts_ptr, t_ends_ptr, k + 1, followed, A) * right
            from_right = spread_right[:, None] + tl.cumsum(step, 1, reverse=True)
            spread_right, spread_right_lost = add_exactly(
                spread_right, spread_right_lost, tl.sum(step, 1)
            )
            width = _load(t_ends_ptr + k, here, A) - _load(t_starts_ptr + k, here, A)
            d_w = d_loss[:, None] * (from_left + from_right + (2 / 3) * (w * width))
            tl.store(d_w_ptr + k, d_w, mask=here)


@triton.jit
def _load(ptrs, mask, A: tl.constexpr):
    return tl.load(ptrs, mask=mask, other=0.0).to(A)


@triton.jit
def _gap(t_starts_ptr, t_ends_ptr, k, inner, A: tl.constexpr):
    """Twice the distance between the midpoints of samples k - 1 and k."""
    starts = _load(t_starts_ptr + k, inner, A) - _load(t_starts_ptr + k - 1, inner, A)
    return starts + (_load(t_ends_ptr + k, inner, A) - _load(t_ends_ptr + k - 1, inner, A))


def fwd(t_starts: Tensor, t_ends: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    R, P = len(offsets) - 1, len(w)
    loss = w.new_empty(R, dtype=accumulator(w.dtype))
    grid, tile = launch_packed(R, P, w.dtype)
    packed_distortion_loss_fwd_kernel[grid](loss, t_starts, t_ends, w, offsets, R, P, **tile)
    return loss


def bwd(
    d_loss: Tensor, t_starts: Tensor, t_ends: Tensor, w: Tensor, offsets: Tensor, needs: int
) -> tuple[Tensor, Tensor, Tensor]:
    R, P = len(offsets) - 1, len(w)
    grads = tuple(empty_gradient(x, needs, i) for i, x in enumerate((t_starts, t_ends, w)))
    if R == 0:
        return tuple(grad.zero_() for grad in grads)
    grid, tile = launch_packed(R + 2, P, w.dtype)
    kept = d_loss.new_empty(2, P // tile["BLOCK_S"] + 1)
    packed_distortion_loss_bwd_kernel[grid](
        *grads,
        kept,
        d_loss,
        t_starts,
        t_ends,
        w,
        offsets,
        R,
        P,
        NEEDS_D_T_STARTS=bool(needs & 1),
        NEEDS_D_T_ENDS=bool(needs & 2),
        NEEDS_D_W=bool(needs & 4),
        **tile,
    )
    return grads
