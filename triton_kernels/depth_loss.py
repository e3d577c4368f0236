# Losses of a measured depth D, the formulas of csrc/cpu/depth_loss.cpp: L = sum_i l_i f_i +
# (D - D_pred)^2 with z = s - D and a bell K = a exp(-z^2 / (2 v)). DS-NeRF: f = -log(w + eps) K.
# Urban Radiance Fields: f = e^2 with e = w - K within sigma of D, w before it and 0 behind.
# d_w = -l K / (w + eps), or 2 l e; d_s = l log(w + eps) K z / v, or 2 l e K z / v near D. By mass:
# e = w - m, m the integral of K over the interval s -+ l / 2, 0 where it begins behind; no l.
# A program owns BLOCK_R rays and goes over each once, BLOCK_S samples at a time. docs/depth.md.
from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, empty_gradient, launch, load

# by their places among the choices of the op
_DS_NERF, _, _URBAN_MASS = (tl.constexpr(i) for i in range(3))


@triton.jit
def depth_loss_fwd_kernel(
    loss_ptr,  # [R]
    w_ptr,  # [R, S]
    s_ptr,  # [R, S]
    depth_ptr,  # [R]
    lengths_ptr,  # [R, S]
    depth_pred_ptr,  # [R]
    R,
    S,
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
):
    A: tl.constexpr = loss_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    depth, valid = _depth(depth_ptr, r, r < R, A)
    loss = tl.zeros([BLOCK_R], A)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[None, :]
        here = valid[:, None] & (s < S)
        at = (r * S)[:, None] + s
        term, _, _, _ = _sample(
            w_ptr, s_ptr, lengths_ptr, at, here, depth[:, None],
            curve, height, scale, sigma, eps, FORM, LENGTHS, A,
        )  # fmt: skip
        loss += tl.sum(tl.where(here, term, 0.0), 1)
    if DEPTH_PRED:
        off = depth - tl.load(depth_pred_ptr + r, mask=valid, other=0.0).to(A)
        loss += tl.where(valid, off * off, 0.0)
    tl.store(loss_ptr + r, loss, mask=r < R)


@triton.jit
def depth_loss_bwd_kernel(
    d_w_ptr,  # [R, S]
    d_s_ptr,  # [R, S]
    d_lengths_ptr,  # [R, S]
    d_depth_pred_ptr,  # [R]
    d_loss_ptr,  # [R]
    w_ptr,  # [R, S]
    s_ptr,  # [R, S]
    depth_ptr,  # [R]
    lengths_ptr,  # [R, S]
    depth_pred_ptr,  # [R]
    R,
    S,
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
):
    A: tl.constexpr = d_loss_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    depth, valid = _depth(depth_ptr, r, r < R, A)
    d_loss = tl.load(d_loss_ptr + r, mask=r < R, other=0.0)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[None, :]
        exists = (r < R)[:, None] & (s < S)
        here = valid[:, None] & exists
        at = (r * S)[:, None] + s
        _, d_w, d_s, d_lengths = _sample(
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
    if NEEDS_D_DEPTH_PRED:
        off = tl.load(depth_pred_ptr + r, mask=valid, other=0.0).to(A) - depth
        tl.store(d_depth_pred_ptr + r, tl.where(valid, 2 * d_loss * off, 0.0), mask=r < R)


@triton.jit
def _depth(depth_ptr, r, mask, A: tl.constexpr):
    """The depth of each ray, and whether it has one."""
    depth = tl.load(depth_ptr + r, mask=mask, other=0.0).to(A)
    return depth, (depth > 0) & (depth < float("inf"))


@triton.jit
def _sample(
    w_ptr,
    s_ptr,
    lengths_ptr,
    at,
    here,
    depth,
    curve,
    height,
    scale,
    sigma,
    eps,
    FORM: tl.constexpr,
    LENGTHS: tl.constexpr,
    A: tl.constexpr,
):
    """What a sample adds to the loss, and the derivatives by its w, s and length."""
    w, s = load(w_ptr + at, here, A), load(s_ptr + at, here, A)
    behind = depth + tl.full([], sigma, A)
    if FORM == _URBAN_MASS:
        half = 0.5 * load(lengths_ptr + at, here, A) if LENGTHS else tl.zeros_like(s)
        start = s - half
        begin = (start - depth) * tl.full([], scale, A)
        end = (s + half - depth) * tl.full([], scale, A)
        # a NaN is not behind
        error = tl.where(start > behind, 0.0, w - 0.5 * (tl.erf(end) - tl.erf(begin)))
        at_begin, at_end = tl.exp(-begin * begin), tl.exp(-end * end)
        # not each bell by its height: fused into a sum two equal ones would differ
        high = -tl.full([], height, A) * error
        return error * error, 2 * error, 2 * high * (at_end - at_begin), high * (at_end + at_begin)
    else:
        length = load(lengths_ptr + at, here, A) if LENGTHS else tl.full([], 1.0, A)
        z = s - depth
        bell = tl.full([], height, A) * tl.exp(0.5 * (tl.full([], curve, A) * z * z))
        if FORM == _DS_NERF:
            w_eps = w + tl.full([], eps, A)
            minus_log = -tl.log(w_eps)
            f, d_w, d_bell = minus_log * bell, -bell / w_eps, minus_log
        else:
            # a NaN is neither before nor behind
            bell = tl.where(s < depth - tl.full([], sigma, A), 0.0, bell)
            error = tl.where(s > behind, 0.0, w - bell)
            f, d_w, d_bell = error * error, 2 * error, -2 * error
        d_s = d_bell * (tl.full([], curve, A) * z * bell)
        return length * f, length * d_w, length * d_s, f


def _constants(
    form: int, sigma: float, eps: float
) -> tuple[float, float, float, float, float, int]:
    """-1 / v, a, 1 / sqrt(2 v), sigma and eps, and the form."""
    v, a = (sigma, 1.0) if form == 0 else (sigma**2 / 9, 3 / (sigma * math.sqrt(2 * math.pi)))
    return -1 / v, a, 1 / math.sqrt(2 * v), sigma, eps, form


def fwd(
    w: Tensor,
    s: Tensor,
    depth: Tensor,
    lengths: Tensor | None,
    depth_pred: Tensor | None,
    form: int,
    sigma: float,
    eps: float,
) -> Tensor:
    S = w.shape[-1]
    loss = w.new_empty(w.shape[:-1], dtype=accumulator(w.dtype))
    R = loss.numel()
    grid, tile = launch(R, S, w.dtype)
    depth_loss_fwd_kernel[grid](
        loss,
        w,
        s,
        depth,
        w if lengths is None else lengths,
        w if depth_pred is None else depth_pred,
        R,
        S,
        *_constants(form, sigma, eps),
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
    lengths: Tensor | None,
    depth_pred: Tensor | None,
    form: int,
    sigma: float,
    eps: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    S, R = w.shape[-1], d_loss.numel()
    d_w, d_s = empty_gradient(w, needs, 0), empty_gradient(s, needs, 1)
    d_lengths = w.new_empty(0) if lengths is None else empty_gradient(lengths, needs, 2)
    d_depth_pred = w.new_empty(0) if depth_pred is None else empty_gradient(depth_pred, needs, 3)
    grid, tile = launch(R, S, w.dtype)
    depth_loss_bwd_kernel[grid](
        d_w,
        d_s,
        d_lengths,
        d_depth_pred,
        d_loss,
        w,
        s,
        depth,
        w if lengths is None else lengths,
        w if depth_pred is None else depth_pred,
        R,
        S,
        *_constants(form, sigma, eps),
        LENGTHS=lengths is not None,
        NEEDS_D_W=bool(needs & 1),
        NEEDS_D_S=bool(needs & 2),
        NEEDS_D_LENGTHS=bool(needs & 4 and lengths is not None),
        NEEDS_D_DEPTH_PRED=bool(needs & 8 and depth_pred is not None),
        **tile,
    )
    return d_w, d_s, d_lengths, d_depth_pred
