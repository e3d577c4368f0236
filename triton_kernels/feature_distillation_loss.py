# Feature distillation, loss = mean_c e_c^2 with the error e = sum_s w_s f_s - target.
# A program owns BLOCK_R rays with all their channels, as in render_features.py. Forward: some
# channels at a time, once over f for their part of e, and once more, from the L1 cache, for their
# part of the products p_s = <e, f_s>; both are kept. Backward: no features. With
# scale = 2 d_loss / C, d_w_s = scale p_s, d_f_s = w_s scale e, d_target = -scale e.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, empty_gradient
from .render_features import channels, launch, places, rendered

# of a forward at a time: 48 samples are 12 KB in float32, and the second look at them meets the L1
# cache; all of 768 channels would pass through it, and of all rays at work through the L2 cache
_CHANNELS = 64


@triton.jit
def feature_distillation_loss_fwd_kernel(
    loss_ptr,  # [R]
    error_ptr,  # [R, C]
    product_ptr,  # [R, S]
    w_ptr,  # [R, S]
    f_ptr,  # [R, S, C]
    target_ptr,  # [R, C]
    R,
    S,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    A: tl.constexpr = loss_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    square = tl.zeros([BLOCK_R], A)
    for first in range(0, C, BLOCK_C):
        c = channels(first, BLOCK_C)
        here = (r < R)[:, None] & (c < C)[None, :]
        at = (r * C)[:, None] + c[None, :]
        error = rendered(w_ptr, f_ptr, r, c, R, S, C, A, BLOCK_R, BLOCK_S, BLOCK_C)
        error -= tl.load(target_ptr + at, mask=here, other=0.0).to(A)
        tl.store(error_ptr + at, error, mask=here)
        square += tl.sum(error * error, 1)
        for start in range(0, S, BLOCK_S):
            row, sample, value = places(r, c, start, R, S, C, BLOCK_S)
            f = tl.load(f_ptr + (row * C)[:, :, None] + c[None, None, :], mask=value, other=0.0)
            product = tl.sum(error[:, None, :] * f.to(A), 2)
            if first > 0:
                product += tl.load(product_ptr + row, mask=sample, other=0.0)
            tl.store(product_ptr + row, product, mask=sample)
        # other threads may add to these products
        tl.debug_barrier()
    tl.store(loss_ptr + r, square / C, mask=r < R)


@triton.jit
def feature_distillation_loss_bwd_kernel(
    d_w_ptr,  # [R, S]
    d_f_ptr,  # [R, S, C]
    d_target_ptr,  # [R, C]
    d_loss_ptr,  # [R]
    error_ptr,  # [R, C]
    product_ptr,  # [R, S]
    w_ptr,  # [R, S]
    R,
    S,
    C,
    NEEDS_D_W: tl.constexpr,
    NEEDS_D_F: tl.constexpr,
    NEEDS_D_TARGET: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = channels(0, BLOCK_C)
    here = (r < R)[:, None] & (c < C)[None, :]
    at = (r * C)[:, None] + c[None, :]
    scale = 2 * tl.load(d_loss_ptr + r, mask=r < R, other=0.0) / C
    g = scale[:, None] * tl.load(error_ptr + at, mask=here, other=0.0)
    if NEEDS_D_TARGET:
        tl.store(d_target_ptr + at, -g, mask=here)
    for start in range(0, S, BLOCK_S):
        row, sample, value = places(r, c, start, R, S, C, BLOCK_S)
        if NEEDS_D_W:
            product = tl.load(product_ptr + row, mask=sample, other=0.0)
            tl.store(d_w_ptr + row, scale[:, None] * product, mask=sample)
        if NEEDS_D_F:
            w = tl.load(w_ptr + row, mask=sample, other=0.0).to(g.dtype)
            d_f_ptrs = d_f_ptr + (row * C)[:, :, None] + c[None, None, :]
            tl.store(d_f_ptrs, w[:, :, None] * g[:, None, :], mask=value)


def fwd(w: Tensor, f: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    S, C = f.shape[-2:]
    dtype = accumulator(w.dtype)
    loss, error, product = (
        w.new_empty(shape, dtype=dtype) for shape in (w.shape[:-1], target.shape, w.shape)
    )
    R = loss.numel()
    grid, tile = launch(R, S, min(C, _CHANNELS), w.dtype)
    feature_distillation_loss_fwd_kernel[grid](loss, error, product, w, f, target, R, S, C, **tile)
    return loss, error, product


def bwd(
    d_loss: Tensor,
    error: Tensor,
    product: Tensor,
    w: Tensor,
    f: Tensor,
    target: Tensor,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    S, C = f.shape[-2:]
    d_w, d_f, d_target = (empty_gradient(x, needs, i) for i, x in enumerate((w, f, target)))
    R = d_loss.numel()
    grid, tile = launch(R, S, C, w.dtype)
    feature_distillation_loss_bwd_kernel[grid](
        d_w,
        d_f,
        d_target,
        d_loss,
        error,
        product,
        w,
        R,
        S,
        C,
        NEEDS_D_W=bool(needs & 1),
        NEEDS_D_F=bool(needs & 2),
        NEEDS_D_TARGET=bool(needs & 4),
        **tile,
    )
    return d_w, d_f, d_target
