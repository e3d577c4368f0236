# Losses of Ref-NeRF on normals, the formulas of csrc/cpu/normal_losses.cpp: orientation =
# sum_i w_i o_i^2 with o_i = max(0, n_i . d), predicted = sum_i w_i (1 - n_i . p_i). With g the
# gradients of the two losses: d_w_i = g_o o_i^2 + g_p (1 - n_i . p_i),
# d_n_i = 2 g_o w_i o_i d - g_p w_i p_i, d_p_i = -g_p w_i n_i, d_d = sum_i 2 g_o w_i o_i n_i.
# A program owns BLOCK_R rays and goes over each once, BLOCK_S samples at a time; x, y and z are
# loads of their own, which hit the L1 cache. docs/normals.md.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, empty_gradient, launch


@triton.jit
def normal_losses_fwd_kernel(
    orientation_loss_ptr,  # [R]
    predicted_normal_loss_ptr,  # [R]
    w_ptr,  # [R, S]
    n_ptr,  # [R, S, 3]
    n_pred_ptr,  # [R, S, 3]
    d_ptr,  # [R, 3]
    R,
    S,
    DROP_NAN: tl.constexpr,
    ORIENTATION: tl.constexpr,
    PREDICTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    A: tl.constexpr = orientation_loss_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    if ORIENTATION:
        dx, dy, dz = _triple((d_ptr + 3 * r)[:, None], (r < R)[:, None], A)
    orientation = tl.zeros([BLOCK_R], A)
    predicted = tl.zeros([BLOCK_R], A)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[None, :]
        here = (r < R)[:, None] & (s < S)
        at = (r * S)[:, None] + s
        w = tl.load(w_ptr + at, mask=here, other=0.0).to(A)
        nx, ny, nz = _triple(n_ptr + 3 * at, here, A)
        if ORIENTATION:
            away = _away(nx * dx + ny * dy + nz * dz, DROP_NAN)
            orientation += tl.sum(tl.where(here, w * (away * away), 0.0), 1)
        if PREDICTED:
            px, py, pz = _triple(n_pred_ptr + 3 * at, here, A)
            predicted += tl.sum(w * (1 - (nx * px + ny * py + nz * pz)), 1)
    tl.store(orientation_loss_ptr + r, orientation, mask=r < R)
    tl.store(predicted_normal_loss_ptr + r, predicted, mask=r < R)


@triton.jit
def normal_losses_bwd_kernel(
    d_w_ptr,  # [R, S]
    d_n_ptr,  # [R, S, 3]
    d_n_pred_ptr,  # [R, S, 3]
    d_d_ptr,  # [R, 3]
    d_orientation_loss_ptr,  # [R]
    d_predicted_normal_loss_ptr,  # [R]
    w_ptr,  # [R, S]
    n_ptr,  # [R, S, 3]
    n_pred_ptr,  # [R, S, 3]
    d_ptr,  # [R, 3]
    R,
    S,
    DROP_NAN: tl.constexpr,
    ORIENTATION: tl.constexpr,
    PREDICTED: tl.constexpr,
    NEEDS_D_W: tl.constexpr,
    NEEDS_D_N: tl.constexpr,
    NEEDS_D_N_PRED: tl.constexpr,
    NEEDS_D_D: tl.constexpr,
    A: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    if ORIENTATION:
        dx, dy, dz = _triple((d_ptr + 3 * r)[:, None], (r < R)[:, None], A)
        g_o = tl.load(d_orientation_loss_ptr + r, mask=r < R, other=0.0)[:, None]
    if PREDICTED:
        g_p = tl.load(d_predicted_normal_loss_ptr + r, mask=r < R, other=0.0)[:, None]
    d_dx = tl.zeros([BLOCK_R], A)
    d_dy = tl.zeros([BLOCK_R], A)
    d_dz = tl.zeros([BLOCK_R], A)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[None, :]
        here = (r < R)[:, None] & (s < S)
        at = (r * S)[:, None] + s
        w = tl.load(w_ptr + at, mask=here, other=0.0).to(A)
        nx, ny, nz = _triple(n_ptr + 3 * at, here, A)
        d_w = tl.zeros([BLOCK_R, BLOCK_S], A)
        d_nx = tl.zeros([BLOCK_R, BLOCK_S], A)
        d_ny = tl.zeros([BLOCK_R, BLOCK_S], A)
        d_nz = tl.zeros([BLOCK_R, BLOCK_S], A)
        if ORIENTATION:
            away = _away(nx * dx + ny * dy + nz * dz, DROP_NAN)
            # selected, as what is multiplied with may be NaN where a NaN was dropped
            turns = here & (away != 0)
            turn = 2 * g_o * w * away
            d_w += g_o * (away * away)
            d_nx += tl.where(turns, turn * dx, 0.0)
            d_ny += tl.where(turns, turn * dy, 0.0)
            d_nz += tl.where(turns, turn * dz, 0.0)
            if NEEDS_D_D:
                d_dx += tl.sum(tl.where(turns, turn * nx, 0.0), 1)
                d_dy += tl.sum(tl.where(turns, turn * ny, 0.0), 1)
                d_dz += tl.sum(tl.where(turns, turn * nz, 0.0), 1)
        if PREDICTED:
            px, py, pz = _triple(n_pred_ptr + 3 * at, here, A)
            pull = -g_p * w
            d_w += g_p * (1 - (nx * px + ny * py + nz * pz))
            d_nx += pull * px
            d_ny += pull * py
            d_nz += pull * pz
            if NEEDS_D_N_PRED:
                _store_triple(d_n_pred_ptr + 3 * at, pull * nx, pull * ny, pull * nz, here)
        elif NEEDS_D_N_PRED:
            zero = tl.zeros([BLOCK_R, BLOCK_S], A)
            _store_triple(d_n_pred_ptr + 3 * at, zero, zero, zero, here)
        if NEEDS_D_W:
            tl.store(d_w_ptr + at, d_w, mask=here)
        if NEEDS_D_N:
            _store_triple(d_n_ptr + 3 * at, d_nx, d_ny, d_nz, here)
    if NEEDS_D_D:
        _store_triple(d_d_ptr + 3 * r, d_dx, d_dy, d_dz, r < R)


@triton.jit
def _triple(ptrs, mask, A: tl.constexpr):
    x = tl.load(ptrs, mask=mask, other=0.0).to(A)
    y = tl.load(ptrs + 1, mask=mask, other=0.0).to(A)
    z = tl.load(ptrs + 2, mask=mask, other=0.0).to(A)
    return x, y, z


@triton.jit
def _store_triple(ptrs, x, y, z, mask):
    tl.store(ptrs, x, mask=mask)
    tl.store(ptrs + 1, y, mask=mask)
    tl.store(ptrs + 2, z, mask=mask)


@triton.jit
def _away(dot, DROP_NAN: tl.constexpr):
    """o of n . d: a NaN is 0, or stays one."""
    if DROP_NAN:
        return tl.where(dot > 0, dot, 0.0)
    return tl.where(dot <= 0, 0.0, dot)


def fwd(
    w: Tensor, n: Tensor, n_pred: Tensor | None, d: Tensor | None, nan: int
) -> tuple[Tensor, Tensor]:
    S = w.shape[-1]
    orientation = w.new_empty(w.shape[:-1], dtype=accumulator(w.dtype))
    predicted = w.new_empty(w.shape[:-1], dtype=accumulator(w.dtype))
    R = orientation.numel()
    grid, tile = launch(R, S, w.dtype)
    normal_losses_fwd_kernel[grid](
        orientation,
        predicted,
        w,
        n,
        w if n_pred is None else n_pred,
        w if d is None else d,
        R,
        S,
        DROP_NAN=nan == 0,
        ORIENTATION=d is not None,
        PREDICTED=n_pred is not None,
        **tile,
    )
    return orientation, predicted


def bwd(
    d_orientation_loss: Tensor | None,
    d_predicted_normal_loss: Tensor | None,
    w: Tensor,
    n: Tensor,
    n_pred: Tensor | None,
    d: Tensor | None,
    nan: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    S = w.shape[-1]
    R = w.shape[:-1].numel()
    d_w, d_n = empty_gradient(w, needs, 0), empty_gradient(n, needs, 1)
    d_n_pred = w.new_empty(0) if n_pred is None else empty_gradient(n_pred, needs, 2)
    d_d = w.new_empty(0) if d is None else empty_gradient(d, needs, 3)
    grid, tile = launch(R, S, w.dtype)
    normal_losses_bwd_kernel[grid](
        d_w,
        d_n,
        d_n_pred,
        d_d,
        w if d_orientation_loss is None else d_orientation_loss,
        w if d_predicted_normal_loss is None else d_predicted_normal_loss,
        w,
        n,
        w if n_pred is None else n_pred,
        w if d is None else d,
        R,
        S,
        DROP_NAN=nan == 0,
        ORIENTATION=d is not None and d_orientation_loss is not None,
        PREDICTED=n_pred is not None and d_predicted_normal_loss is not None,
        NEEDS_D_W=bool(needs & 1),
        NEEDS_D_N=bool(needs & 2),
        NEEDS_D_N_PRED=bool(needs & 4 and n_pred is not None),
        NEEDS_D_D=bool(needs & 8 and d is not None),
        A=getattr(triton.language, str(accumulator(w.dtype))[6:]),
        **tile,
    )
    return d_w, d_n, d_n_pred, d_d
