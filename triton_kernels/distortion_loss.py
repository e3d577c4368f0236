# Distortion loss, the formulas of csrc/cpu/distortion_loss.cpp: L = sum_j w_j (spread_j +
# 1/3 w_j dt_j), d_w_j = spread_j + sum_{k>j} gap_k (w_k + right_k) + 2/3 w_j dt_j,
# d_t_j = (w_{j-1} + w_j) (left_j - 2/3 w_{j-1} - 1/3 w_j - right_j).
# A program owns BLOCK_R rays and takes BLOCK_S samples of each at a time. Forward: once from the
# left. Backward: once from the right; rays of several blocks are first read from the left, for
# what each block starts with. The shifted loads hit the L1 cache. Derivation: docs/distortion.md.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, empty_gradient, launch, sums_of_loaded


@triton.jit
def distortion_loss_fwd_kernel(
    loss_ptr,  # [R]
    t_ptr,  # [R, S+1]
    w_ptr,  # [R, S]
    R,
    S,
    t_stride_r,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    A: tl.constexpr = loss_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    t_ptrs, w_ptrs = t_ptr + (r * t_stride_r)[:, None], w_ptr + (r * S)[:, None]
    ray = (r < R)[:, None]
    weight = tl.zeros([BLOCK_R], A)
    spread = tl.zeros([BLOCK_R], A)
    loss = tl.zeros([BLOCK_R], A)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[None, :]
        here = ray & (s < S)
        w_before, left = _left(w_ptrs, s, here, weight, A)
        step = _gap(t_ptrs, s, here, A) * left
        spread_left = spread[:, None] + tl.cumsum(step, 1)
        w = _load(w_ptrs + s, here, A)
        # after the loss these two spill 8 bytes in fp16 on sm_100
        weight += sums_of_loaded(w_before)
        spread += tl.sum(step, 1)
        loss += tl.sum(w * (spread_left + (1 / 3) * (w * _width(t_ptrs, s, here, A))), 1)
    tl.store(loss_ptr + r, loss, mask=r < R)


@triton.jit
def distortion_loss_bwd_kernel(
    d_t_ptr,  # [R, S+1]
    d_w_ptr,  # [R, S]
    d_loss_ptr,  # [R]
    t_ptr,  # [R, S+1]
    w_ptr,  # [R, S]
    R,
    S,
    t_stride_r,
    NEEDS_D_T: tl.constexpr,
    NEEDS_D_W: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    A: tl.constexpr = d_loss_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    t_ptrs, w_ptrs = t_ptr + (r * t_stride_r)[:, None], w_ptr + (r * S)[:, None]
    ray = (r < R)[:, None]
    blocks = tl.cdiv(S, BLOCK_S)

    # the sums before each block, in registers: a block's own are not found by subtraction, which
    # would lose the small ones
    block = tl.arange(0, MAX_BLOCKS)[None, :]
    weights_before = tl.zeros([BLOCK_R, MAX_BLOCKS], A)
    spreads_before = tl.zeros([BLOCK_R, MAX_BLOCKS], A)
    if MAX_BLOCKS > 1:
        weight = tl.zeros([BLOCK_R], A)
        spread = tl.zeros([BLOCK_R], A)
        for b in range(blocks):
            s = b * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
            here = ray & (s < S)
            w_before, left = _left(w_ptrs, s, here, weight, A)
            weights_before = tl.where(block == b, weight[:, None], weights_before)
            weight += sums_of_loaded(w_before)
            if NEEDS_D_W:
                spreads_before = tl.where(block == b, spread[:, None], spreads_before)
                spread += tl.sum(_gap(t_ptrs, s, here, A) * left, 1)

    d_loss = tl.load(d_loss_ptr + r, mask=r < R, other=0.0)
    weight_right = tl.zeros([BLOCK_R], A)
    spread_right = tl.zeros([BLOCK_R], A)
    for i in range(blocks):
        b = blocks - 1 - i
        s = b * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
        here = ray & (s < S)
        weight = tl.sum(tl.where(block == b, weights_before, 0.0), 1)
        w_before, left = _left(w_ptrs, s, here, weight, A)
        w = _load(w_ptrs + s, here, A)
        w_after = _load(w_ptrs + s + 1, ray & (s + 1 < S), A)
        right = weight_right[:, None] + tl.cumsum(w_after, 1, reverse=True)
        weight_right += sums_of_loaded(w_after)
        if NEEDS_D_T:
            pull = left - (2 / 3) * w_before - (1 / 3) * w - right
            d_t = d_loss[:, None] * ((w_before + w) * pull)
            tl.store(d_t_ptr + (r * t_stride_r)[:, None] + s, d_t, mask=here)
        if NEEDS_D_W:
            spread = tl.sum(tl.where(block == b, spreads_before, 0.0), 1)
            from_left = spread[:, None] + tl.cumsum(_gap(t_ptrs, s, here, A) * left, 1)
            # sample k pulls on all before it by the gap of sample k + 1
            step = _gap(t_ptrs, s + 1, ray & (s + 1 < S), A) * right
            from_right = spread_right[:, None] + tl.cumsum(step, 1, reverse=True)
            spread_right += tl.sum(step, 1)
            within = (2 / 3) * (w * _width(t_ptrs, s, here, A))
            d_w = d_loss[:, None] * (from_left + from_right + within)
            tl.store(d_w_ptr + (r * S)[:, None] + s, d_w, mask=here)

    if NEEDS_D_T:
        has_weight = r < R * tl.minimum(S, 1)
        w_first = _load(w_ptr + r * S, has_weight, A)
        w_last = _load(w_ptr + r * S + S - 1, has_weight, A)
        d_t_last = d_loss * (w_last * (w_first + weight_right - (2 / 3) * w_last))
        tl.store(d_t_ptr + r * t_stride_r + S, d_t_last, mask=r < R)


@triton.jit
def _load(ptrs, mask, A: tl.constexpr):
    return tl.load(ptrs, mask=mask, other=0.0).to(A)


@triton.jit
def _left(w_ptrs, s, here, weight, A: tl.constexpr):
    """The weights one sample before, and the sums of all before: `weight` is that of the block."""
    w_before = _load(w_ptrs + s - 1, here & (s > 0), A)
    return w_before, weight[:, None] + tl.cumsum(w_before, 1)


@triton.jit
def _gap(t_ptrs, s, here, A: tl.constexpr):
    # before the first edge any finite value will do: no weight lies there
    return _load(t_ptrs + s + 1, here, A) - _load(t_ptrs + s - 1, here & (s > 0), A)


@triton.jit
def _width(t_ptrs, s, here, A: tl.constexpr):
    return _load(t_ptrs + s + 1, here, A) - _load(t_ptrs + s, here, A)


def fwd(t: Tensor, w: Tensor) -> Tensor:
    S = w.shape[-1]
    loss = w.new_empty(w.shape[:-1], dtype=accumulator(w.dtype))
    R = loss.numel()
    grid, tile = launch(R, S, w.dtype)
    distortion_loss_fwd_kernel[grid](loss, t, w, R, S, S + 1, **tile)
    return loss


def bwd(d_loss: Tensor, t: Tensor, w: Tensor, needs: int) -> tuple[Tensor, Tensor]:
    S, R = w.shape[-1], d_loss.numel()
    d_t, d_w = empty_gradient(t, needs, 0), empty_gradient(w, needs, 1)
    grid, tile = launch(R, S, w.dtype)
    distortion_loss_bwd_kernel[grid](
        d_t,
        d_w,
        d_loss,
        t,
        w,
        R,
        S,
        S + 1,
        NEEDS_D_T=bool(needs & 1),
        NEEDS_D_W=bool(needs & 2),
        MAX_BLOCKS=triton.next_power_of_2(max(triton.cdiv(S, tile["BLOCK_S"]), 1)),
        **tile,
    )
    return d_t, d_w
