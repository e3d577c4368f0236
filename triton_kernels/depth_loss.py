# Losses of a measured depth D, the formulas of csrc/cpu/depth_loss.cpp: L = sum_i l_i f_i +
# (D - D_pred)^2 with z = s - D and a bell K = a exp(-z^2 / (2 v)). DS-NeRF: f = -log(w + eps) K.
# Urban Radiance Fields: f = e^2 with e = w - K within sigma of D, w before it and 0 behind.
# d_w = -l K / (w + eps), or 2 l e; d_s = l log(w + eps) K z / v, or 2 l e K z / v near D.
# A program owns BLOCK_R rays and goes over each once, BLOCK_S samples at a time. docs/depth.md.
from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, empty_gradient, launch


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
    sigma: tl.float64,
    eps: tl.float64,
    URBAN: tl.constexpr,
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
        w, _, bell, error = _sample(
            w_ptr, s_ptr, at, here, depth[:, None], curve, height, sigma, URBAN, A
        )
        f = error * error if URBAN else -tl.log(w + tl.full([], eps, A)) * bell
        if LENGTHS:
            f *= tl.load(lengths_ptr + at, mask=here, other=0.0).to(A)
        loss += tl.sum(tl.where(here, f, 0.0), 1)
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
    sigma: tl.float64,
    eps: tl.float64,
    URBAN: tl.constexpr,
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
        w, z, bell, error = _sample(
            w_ptr, s_ptr, at, here, depth[:, None], curve, height, sigma, URBAN, A
        )
        w_eps = w + tl.full([], eps, A)
        scale = d_loss[:, None]
        if NEEDS_D_LENGTHS:
            f = error * error if URBAN else -tl.log(w_eps) * bell
            tl.store(d_lengths_ptr + at, tl.where(here, scale * f, 0.0), mask=exists)
        if LENGTHS:
            scale *= tl.load(lengths_ptr + at, mask=here, other=0.0).to(A)
        if NEEDS_D_W:
            d_w = 2 * error if URBAN else -bell / w_eps
            tl.store(d_w_ptr + at, tl.where(here, scale * d_w, 0.0), mask=exists)
        if NEEDS_D_S:
            d_bell = tl.full([], curve, A) * z * bell
            d_s = -2 * error * d_bell if URBAN else -tl.log(w_eps) * d_bell
            tl.store(d_s_ptr + at, tl.where(here, scale * d_s, 0.0), mask=exists)
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
    w_ptr, s_ptr, at, here, depth, curve, height, sigma, URBAN: tl.constexpr, A: tl.constexpr
):
    w = tl.load(w_ptr + at, mask=here, other=0.0).to(A)
    s = tl.load(s_ptr + at, mask=here, other=0.0).to(A)
    z = s - depth
    bell = tl.full([], height, A) * tl.exp(0.5 * (tl.full([], curve, A) * z * z))
    error = w
    if URBAN:
        # a NaN is neither before nor behind
        bell = tl.where(s < depth - tl.full([], sigma, A), 0.0, bell)
        error = tl.where(s > depth + tl.full([], sigma, A), 0.0, w - bell)
    return w, z, bell, error


def _constants(form: int, sigma: float, eps: float) -> tuple[float, float, float, float, bool]:
    """-1 / v, a, sigma and eps, and whether the form is the second one."""
    if form == 1:
        return -9 / sigma**2, 3 / (sigma * math.sqrt(2 * math.pi)), sigma, eps, True
    return -1 / sigma, 1.0, sigma, eps, False


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
