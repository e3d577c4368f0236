# Losses of Ref-NeRF on normals of packed rays, the formulas of csrc/cpu/normal_losses.h:
# orientation = sum_i w_i o_i^2 with o_i = max(0, n_i . d), predicted = sum_i w_i (1 - n_i . p_i).
# With g the gradients of the two losses: d_w_i = g_o o_i^2 + g_p (1 - n_i . p_i),
# d_n_i = 2 g_o w_i o_i d - g_p w_i p_i, d_p_i = -g_p w_i n_i, d_d = sum_i 2 g_o w_i o_i n_i.
# A program owns BLOCK_R rays and goes over each once, BLOCK_S samples at a time, then over the long
# ones by themselves; x, y and z are loads of their own, which hit the L1 cache. docs/normals.md.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    accumulator,
    add_exactly,
    empty_gradient,
    launch_packed,
    load,
    packed_rays,
    packed_values,
)


@triton.jit
def packed_normal_losses_fwd_kernel(
    orientation_loss_ptr,  # [R]
    predicted_normal_loss_ptr,  # [R]
    w_ptr,  # [P]
    n_ptr,  # [P, 3]
    n_pred_ptr,  # [P, 3]
    d_ptr,  # [R, 3]
    offsets_ptr,  # [R+1]
    R,
    P,
    DROP_NAN: tl.constexpr,
    ORIENTATION: tl.constexpr,
    PREDICTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    r = first + tl.arange(0, BLOCK_R)
    begin, count = packed_rays(offsets_ptr, r, R, P)
    short = count <= BLOCK_LONG
    _losses(
        orientation_loss_ptr, predicted_normal_loss_ptr, w_ptr, n_ptr, n_pred_ptr, d_ptr, r, begin,
        tl.where(short, count, 0), (r < R) & short, R, DROP_NAN, ORIENTATION, PREDICTED, BLOCK_S,
    )  # fmt: skip
    if tl.max(count, 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            one = first + i + tl.arange(0, 1)
            begin_one, count_one = packed_rays(offsets_ptr, one, R, P)
            count_one = tl.where(count_one > BLOCK_LONG, count_one, 0)
            _losses(
                orientation_loss_ptr, predicted_normal_loss_ptr, w_ptr, n_ptr, n_pred_ptr, d_ptr,
                one, begin_one, count_one, (one < R) & (count_one > 0), R, DROP_NAN, ORIENTATION,
                PREDICTED, BLOCK_LONG,
            )  # fmt: skip


@triton.jit
def _losses(
    orientation_loss_ptr,
    predicted_normal_loss_ptr,
    w_ptr,
    n_ptr,
    n_pred_ptr,
    d_ptr,
    r,
    begin,
    count,
    mask,
    R,
    DROP_NAN: tl.constexpr,
    ORIENTATION: tl.constexpr,
    PREDICTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    A: tl.constexpr = orientation_loss_ptr.dtype.element_ty
    if ORIENTATION:
        dx, dy, dz = _direction(d_ptr, r, R, A)
    orientation = tl.zeros(count.shape, A)
    orientation_lost = tl.zeros(count.shape, A)
    predicted = tl.zeros(count.shape, A)
    predicted_lost = tl.zeros(count.shape, A)
    for b in range(tl.cdiv(tl.max(count, 0), BLOCK)):
        at, here = _places(begin, count, b, BLOCK)
        w = load(w_ptr + at, here, A)
        nx, ny, nz = _triple(n_ptr + 3 * at, here, A)
        if ORIENTATION:
            away = _away(nx * dx + ny * dy + nz * dz, DROP_NAN)
            term = tl.sum(tl.where(here, w * (away * away), 0.0), 1)
            orientation, orientation_lost = add_exactly(orientation, orientation_lost, term)
        if PREDICTED:
            px, py, pz = _triple(n_pred_ptr + 3 * at, here, A)
            term = tl.sum(w * (1 - (nx * px + ny * py + nz * pz)), 1)
            predicted, predicted_lost = add_exactly(predicted, predicted_lost, term)
    tl.store(orientation_loss_ptr + r, orientation, mask=mask)
    tl.store(predicted_normal_loss_ptr + r, predicted, mask=mask)


@triton.jit
def packed_normal_losses_bwd_kernel(
    d_w_ptr,  # [P]
    d_n_ptr,  # [P, 3]
    d_n_pred_ptr,  # [P, 3]
    d_d_ptr,  # [R, 3]
    d_orientation_loss_ptr,  # [R]
    d_predicted_normal_loss_ptr,  # [R]
    w_ptr,  # [P]
    n_ptr,  # [P, 3]
    n_pred_ptr,  # [P, 3]
    d_ptr,  # [R, 3]
    offsets_ptr,  # [R+1]
    R,
    P,
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
    BLOCK_LONG: tl.constexpr,
):
    # one ray less: the samples before offsets[0]
    first = tl.program_id(0).to(tl.int64) * BLOCK_R - 1
    r = first + tl.arange(0, BLOCK_R)
    begin, count = packed_rays(offsets_ptr, r, R, P)
    short = count <= BLOCK_LONG
    _gradients(
        d_w_ptr, d_n_ptr, d_n_pred_ptr, d_d_ptr, d_orientation_loss_ptr,
        d_predicted_normal_loss_ptr, w_ptr, n_ptr, n_pred_ptr, d_ptr, r, begin,
        tl.where(short, count, 0), short, R, DROP_NAN, ORIENTATION, PREDICTED, NEEDS_D_W,
        NEEDS_D_N, NEEDS_D_N_PRED, NEEDS_D_D, A, BLOCK_S,
    )  # fmt: skip
    if tl.max(count, 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            one = first + i + tl.arange(0, 1)
            begin_one, count_one = packed_rays(offsets_ptr, one, R, P)
            count_one = tl.where(count_one > BLOCK_LONG, count_one, 0)
            _gradients(
                d_w_ptr, d_n_ptr, d_n_pred_ptr, d_d_ptr, d_orientation_loss_ptr,
                d_predicted_normal_loss_ptr, w_ptr, n_ptr, n_pred_ptr, d_ptr, one, begin_one,
                count_one, count_one > 0, R, DROP_NAN, ORIENTATION, PREDICTED, NEEDS_D_W,
                NEEDS_D_N, NEEDS_D_N_PRED, NEEDS_D_D, A, BLOCK_LONG,
            )  # fmt: skip


@triton.jit
def _gradients(
    d_w_ptr,
    d_n_ptr,
    d_n_pred_ptr,
    d_d_ptr,
    d_orientation_loss_ptr,
    d_predicted_normal_loss_ptr,
    w_ptr,
    n_ptr,
    n_pred_ptr,
    d_ptr,
    r,
    begin,
    count,
    mask,
    R,
    DROP_NAN: tl.constexpr,
    ORIENTATION: tl.constexpr,
    PREDICTED: tl.constexpr,
    NEEDS_D_W: tl.constexpr,
    NEEDS_D_N: tl.constexpr,
    NEEDS_D_N_PRED: tl.constexpr,
    NEEDS_D_D: tl.constexpr,
    A: tl.constexpr,
    BLOCK: tl.constexpr,
):
    is_ray = (r >= 0) & (r < R)
    if ORIENTATION:
        dx, dy, dz = _direction(d_ptr, r, R, A)
        g_o = packed_values(d_orientation_loss_ptr, r, R)[:, None]
    if PREDICTED:
        g_p = packed_values(d_predicted_normal_loss_ptr, r, R)[:, None]
    d_dx = tl.zeros(count.shape, A)
    d_dy = tl.zeros(count.shape, A)
    d_dz = tl.zeros(count.shape, A)
    lost_x = tl.zeros(count.shape, A)
    lost_y = tl.zeros(count.shape, A)
    lost_z = tl.zeros(count.shape, A)
    for b in range(tl.cdiv(tl.max(count, 0), BLOCK)):
        at, here = _places(begin, count, b, BLOCK)
        w = load(w_ptr + at, here, A)
        nx, ny, nz = _triple(n_ptr + 3 * at, here, A)
        zero = tl.zeros(here.shape, A)
        d_w = zero
        d_nx = zero
        d_ny = zero
        d_nz = zero
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
                d_dx, lost_x = add_exactly(d_dx, lost_x, _turned(turns, turn, nx))
                d_dy, lost_y = add_exactly(d_dy, lost_y, _turned(turns, turn, ny))
                d_dz, lost_z = add_exactly(d_dz, lost_z, _turned(turns, turn, nz))
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
            _store_triple(d_n_pred_ptr + 3 * at, zero, zero, zero, here)
        if NEEDS_D_W:
            tl.store(d_w_ptr + at, d_w, mask=here)
        if NEEDS_D_N:
            _store_triple(d_n_ptr + 3 * at, d_nx, d_ny, d_nz, here)
    if NEEDS_D_D:
        _store_triple(d_d_ptr + 3 * r, d_dx, d_dy, d_dz, is_ray & mask)


@triton.jit
def _places(begin, count, b, BLOCK: tl.constexpr):
    """Samples of block b, and which of them exist."""
    s = tl.cast(b, tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return begin[:, None] + s, s < count[:, None]


@triton.jit
def _direction(d_ptr, r, R, A: tl.constexpr):
    """[rays, 1] of each component; anything for those that are no rays."""
    ptrs = d_ptr + 3 * tl.minimum(tl.maximum(r, 0), R - 1)[:, None]
    return tl.load(ptrs).to(A), tl.load(ptrs + 1).to(A), tl.load(ptrs + 2).to(A)


@triton.jit
def _turned(turns, turn, component):
    return tl.sum(tl.where(turns, turn * component, 0.0), 1)


@triton.jit
def _triple(ptrs, mask, A: tl.constexpr):
    return load(ptrs, mask, A), load(ptrs + 1, mask, A), load(ptrs + 2, mask, A)


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
    w: Tensor, n: Tensor, offsets: Tensor, n_pred: Tensor | None, d: Tensor | None, nan: int
) -> tuple[Tensor, Tensor]:
    R, P = len(offsets) - 1, len(w)
    orientation = w.new_empty(R, dtype=accumulator(w.dtype))
    predicted = w.new_empty(R, dtype=accumulator(w.dtype))
    grid, tile = launch_packed(R, P, w.dtype)
    packed_normal_losses_fwd_kernel[grid](
        orientation,
        predicted,
        w,
        n,
        w if n_pred is None else n_pred,
        w if d is None else d,
        offsets,
        R,
        P,
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
    offsets: Tensor,
    n_pred: Tensor | None,
    d: Tensor | None,
    nan: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    R, P = len(offsets) - 1, len(w)
    d_w, d_n = empty_gradient(w, needs, 0), empty_gradient(n, needs, 1)
    d_n_pred = w.new_empty(0) if n_pred is None else empty_gradient(n_pred, needs, 2)
    d_d = w.new_empty(0) if d is None else empty_gradient(d, needs, 3)
    grads = d_w, d_n, d_n_pred, d_d
    if R == 0:
        return tuple(grad.zero_() for grad in grads)
    grid, tile = launch_packed(R + 2, P, w.dtype)
    packed_normal_losses_bwd_kernel[grid](
        *grads,
        w if d_orientation_loss is None else d_orientation_loss,
        w if d_predicted_normal_loss is None else d_predicted_normal_loss,
        w,
        n,
        w if n_pred is None else n_pred,
        w if d is None else d,
        offsets,
        R,
        P,
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
    return grads
