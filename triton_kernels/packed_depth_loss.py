# Losses of a measured depth D of packed rays, the formulas of csrc/cpu/packed_depth_loss.cpp: L =
# sum_i l_i f_i + (D - D_pred)^2 with z = s - D and a bell K = a exp(-z^2 / (2 v)). DS-NeRF: f =
# -log(w + eps) K. Urban Radiance Fields: f = e^2 with e = w - K within sigma of D, w before it and
# 0 behind. d_w = -l K / (w + eps), or 2 l e; d_s = l log(w + eps) K z / v, or 2 l e K z / v near D.
# By mass: e = w - m, m the integral of K over the interval s -+ l / 2, 0 where it begins behind.
# A program owns BLOCK_R rays and takes BLOCK_S samples of each at a time, then the long ones among
# them by themselves. docs/depth.md.
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
from .depth_loss import _constants as constants
from .depth_loss import _sample as sample


@triton.jit
def packed_depth_loss_fwd_kernel(
    loss_ptr,  # [R]
    w_ptr,  # [P]
    s_ptr,  # [P]
    depth_ptr,  # [R]
    offsets_ptr,  # [R+1]
    lengths_ptr,  # [P]
    depth_pred_ptr,  # [R]
    R,
    P,
    curve: tl.float64,
    height: tl.float64,
    scale: tl.float64,
    sigma: tl.float64,
    eps: tl.float64,
    FORM: tl.constexpr,
    LENGTHS: tl.constexpr,
    DEPTH_PRED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
):
    A: tl.constexpr = loss_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    r = first + tl.arange(0, BLOCK_R)
    begin, n = packed_rays(offsets_ptr, r, R, P)
    short = n <= BLOCK_LONG
    loss = _losses(
        w_ptr, s_ptr, depth_ptr, lengths_ptr, depth_pred_ptr, r, R, begin, tl.where(short, n, 0),
        curve, height, scale, sigma, eps, FORM, LENGTHS, DEPTH_PRED, BLOCK_S, A,
    )  # fmt: skip
    tl.store(loss_ptr + r, loss, mask=(r < R) & short)
    if tl.max(n, 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            one = first + i + tl.arange(0, 1)
            begin_one, n_one = packed_rays(offsets_ptr, one, R, P)
            n_one = tl.where(n_one > BLOCK_LONG, n_one, 0)
            loss_one = _losses(
                w_ptr, s_ptr, depth_ptr, lengths_ptr, depth_pred_ptr, one, R, begin_one, n_one,
                curve, height, scale, sigma, eps, FORM, LENGTHS, DEPTH_PRED, BLOCK_LONG, A,
            )  # fmt: skip
            tl.store(loss_ptr + one, loss_one, mask=(one < R) & (n_one > 0))


@triton.jit
def _losses(
    w_ptr,
    s_ptr,
    depth_ptr,
    lengths_ptr,
    depth_pred_ptr,
    r,
    R,
    begin,
    n,
    curve,
    height,
    scale,
    sigma,
    eps,
    FORM: tl.constexpr,
    LENGTHS: tl.constexpr,
    DEPTH_PRED: tl.constexpr,
    BLOCK: tl.constexpr,
    A: tl.constexpr,
):
    depth, valid = _depth(depth_ptr, r, R, A)
    n = tl.where(valid, n, 0)
    loss = tl.zeros(n.shape, A)
    lost = tl.zeros(n.shape, A)
    for b in range(tl.cdiv(tl.max(n, 0), BLOCK)):
        i = tl.cast(b, tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
        here, at = i < n[:, None], begin[:, None] + i
        term, _, _, _ = sample(
            w_ptr, s_ptr, lengths_ptr, at, here, depth[:, None],
            curve, height, scale, sigma, eps, FORM, LENGTHS, A,
        )  # fmt: skip
        loss, lost = add_exactly(loss, lost, tl.sum(tl.where(here, term, 0.0), 1))
    if DEPTH_PRED:
        off = depth - packed_values(depth_pred_ptr, r, R).to(A)
        loss += tl.where(valid, off * off, 0.0)
    return loss


@triton.jit
def packed_depth_loss_bwd_kernel(
    d_w_ptr,  # [P]
    d_s_ptr,  # [P]
    d_lengths_ptr,  # [P]
    d_depth_pred_ptr,  # [R]
    d_loss_ptr,  # [R]
    w_ptr,  # [P]
    s_ptr,  # [P]
    depth_ptr,  # [R]
    offsets_ptr,  # [R+1]
    lengths_ptr,  # [P]
    depth_pred_ptr,  # [R]
    R,
    P,
    curve: tl.float64,
    height: tl.float64,
    scale: tl.float64,
    sigma: tl.float64,
    eps: tl.float64,
    FORM: tl.constexpr,
    LENGTHS: tl.constexpr,
    NEEDS_D_W: tl.constexpr,
    NEEDS_D_S: tl.constexpr,
    NEEDS_D_LENGTHS: tl.constexpr,
    NEEDS_D_DEPTH_PRED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
):
    # one ray less: the samples before offsets[0]
    first = tl.program_id(0).to(tl.int64) * BLOCK_R - 1
    r = first + tl.arange(0, BLOCK_R)
    begin, n = packed_rays(offsets_ptr, r, R, P)
    A: tl.constexpr = d_loss_ptr.dtype.element_ty
    if NEEDS_D_DEPTH_PRED:
        depth, valid = _depth(depth_ptr, r, R, A)
        off = packed_values(depth_pred_ptr, r, R).to(A) - depth
        d_off = tl.where(valid, 2 * packed_values(d_loss_ptr, r, R) * off, 0.0)
        tl.store(d_depth_pred_ptr + r, d_off, mask=(r >= 0) & (r < R))
    _gradients(
        d_w_ptr, d_s_ptr, d_lengths_ptr, d_loss_ptr, w_ptr, s_ptr, depth_ptr, lengths_ptr, r, R,
        begin, tl.where(n <= BLOCK_LONG, n, 0), curve, height, scale, sigma, eps, FORM, LENGTHS,
        NEEDS_D_W, NEEDS_D_S, NEEDS_D_LENGTHS, BLOCK_S,
    )  # fmt: skip
    if tl.max(n, 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            one = first + i + tl.arange(0, 1)
            begin_one, n_one = packed_rays(offsets_ptr, one, R, P)
            _gradients(
                d_w_ptr, d_s_ptr, d_lengths_ptr, d_loss_ptr, w_ptr, s_ptr, depth_ptr, lengths_ptr,
                one, R, begin_one, tl.where(n_one > BLOCK_LONG, n_one, 0), curve, height, scale,
                sigma, eps, FORM, LENGTHS, NEEDS_D_W, NEEDS_D_S, NEEDS_D_LENGTHS, BLOCK_LONG,
            )  # fmt: skip


@triton.jit
def _gradients(
    d_w_ptr,
    d_s_ptr,
    d_lengths_ptr,
    d_loss_ptr,
    w_ptr,
    s_ptr,
    depth_ptr,
    lengths_ptr,
    r,
    R,
    begin,
    n,
    curve,
    height,
    scale,
    sigma,
    eps,
    FORM: tl.constexpr,
    LENGTHS: tl.constexpr,
    NEEDS_D_W: tl.constexpr,
    NEEDS_D_S: tl.constexpr,
    NEEDS_D_LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    A: tl.constexpr = d_loss_ptr.dtype.element_ty
    depth, valid = _depth(depth_ptr, r, R, A)
    d_loss = packed_values(d_loss_ptr, r, R)
    for b in range(tl.cdiv(tl.max(n, 0), BLOCK)):
        i = tl.cast(b, tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
        exists, at = i < n[:, None], begin[:, None] + i
        here = exists & valid[:, None]
        _, d_w, d_s, d_lengths = sample(
            w_ptr, s_ptr, lengths_ptr, at, here, depth[:, None],
            curve, height, scale, sigma, eps, FORM, LENGTHS, A,
        )  # fmt: skip
        g = d_loss[:, None]
        if NEEDS_D_LENGTHS:
            tl.store(d_lengths_ptr + at, tl.where(here, g * d_lengths, 0.0), mask=exists)
        if NEEDS_D_W:
            tl.store(d_w_ptr + at, tl.where(here, g * d_w, 0.0), mask=exists)
        if NEEDS_D_S:
            tl.store(d_s_ptr + at, tl.where(here, g * d_s, 0.0), mask=exists)


@triton.jit
def _depth(depth_ptr, r, R, A: tl.constexpr):
    """The depth of each ray, and whether it has one."""
    depth = packed_values(depth_ptr, r, R).to(A)
    return depth, (depth > 0) & (depth < float("inf"))


def fwd(
    w: Tensor,
    s: Tensor,
    depth: Tensor,
    offsets: Tensor,
    lengths: Tensor | None,
    depth_pred: Tensor | None,
    form: int,
    sigma: float,
    eps: float,
) -> Tensor:
    R, P = len(offsets) - 1, len(w)
    loss = w.new_empty(R, dtype=accumulator(w.dtype))
    grid, tile = launch_packed(R, P, w.dtype)
    packed_depth_loss_fwd_kernel[grid](
        loss,
        w,
        s,
        depth,
        offsets,
        w if lengths is None else lengths,
        w if depth_pred is None else depth_pred,
        R,
        P,
        *constants(form, sigma, eps),
        LENGTHS=lengths is not None,
        DEPTH_PRED=depth_pred is not None,
        **tile,
    )
    return loss


def bwd(
    d_loss: Tensor,
    w: Tensor,
    s: Tensor,
    depth: Tensor,
    offsets: Tensor,
    lengths: Tensor | None,
    depth_pred: Tensor | None,
    form: int,
    sigma: float,
    eps: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    R, P = len(offsets) - 1, len(w)
    d_w, d_s = empty_gradient(w, needs, 0), empty_gradient(s, needs, 1)
    d_lengths = w.new_empty(0) if lengths is None else empty_gradient(lengths, needs, 2)
    d_depth_pred = w.new_empty(0) if depth_pred is None else empty_gradient(depth_pred, needs, 3)
    if R == 0:
        return d_w.zero_(), d_s.zero_(), d_lengths.zero_(), d_depth_pred
    grid, tile = launch_packed(R + 2, P, w.dtype)
    packed_depth_loss_bwd_kernel[grid](
        d_w,
        d_s,
        d_lengths,
        d_depth_pred,
        d_loss,
        w,
        s,
        depth,
        offsets,
        w if lengths is None else lengths,
        w if depth_pred is None else depth_pred,
        R,
        P,
        *constants(form, sigma, eps),
        LENGTHS=lengths is not None,
        NEEDS_D_W=bool(needs & 1),
        NEEDS_D_S=bool(needs & 2),
        NEEDS_D_LENGTHS=bool(needs & 4 and lengths is not None),
        NEEDS_D_DEPTH_PRED=bool(needs & 8 and depth_pred is not None),
        **tile,
    )
    return d_w, d_s, d_lengths, d_depth_pred
