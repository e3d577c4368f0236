# Feature distillation of packed rays, loss = mean_c e_c^2 with the error
# e = sum_s w_s f_s - target. A program owns BLOCK_R rays with all their channels, and takes the
# long ones by themselves, as in packed_render_features.py. Forward: some channels at a time, once
# over f for their part of e, and once more, from the L1 cache, for their part of the products
# p_s = <e, f_s>; both are kept. Backward: no features. With scale = 2 d_loss / C,
# d_w_s = scale p_s, d_f_s = w_s scale e, d_target = -scale e.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, bounded, empty_gradient, load, packed_rays, packed_values
from .feature_distillation_loss import _CHANNELS
from .packed_render_features import launch, load_rows, long_ray, places, rendered, store_rows
from .render_features import channels


@triton.jit
def packed_feature_distillation_loss_fwd_kernel(
    loss_ptr,  # [R]
    error_ptr,  # [R, C]
    product_ptr,  # [P]
    w_ptr,  # [P]
    f_ptr,  # [P, C]
    target_ptr,  # [R, C]
    offsets_ptr,  # [R+1]
    R,
    P,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
):
    # one ray less: the samples before offsets[0]
    first = tl.program_id(0).to(tl.int64) * BLOCK_R - 1
    r = first + tl.arange(0, BLOCK_R)
    begin, n = packed_rays(offsets_ptr, r, R, P)
    short = n <= BLOCK_LONG
    _losses(
        loss_ptr, error_ptr, product_ptr, w_ptr, f_ptr, target_ptr, r, begin,
        tl.where(short, n, 0), short, R, C, BLOCK_S, BLOCK_C,
    )  # fmt: skip
    if tl.max(n, 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            one, begin_one, n_one = long_ray(offsets_ptr, first + i, R, P, BLOCK_LONG)
            _losses(
                loss_ptr, error_ptr, product_ptr, w_ptr, f_ptr, target_ptr, one, begin_one, n_one,
                n_one > 0, R, C, BLOCK_LONG, BLOCK_C,
            )  # fmt: skip


@triton.jit
def _losses(
    loss_ptr,
    error_ptr,
    product_ptr,
    w_ptr,
    f_ptr,
    target_ptr,
    r,
    begin,
    n,
    mask,
    R,
    C,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    A: tl.constexpr = loss_ptr.dtype.element_ty
    is_ray = (r >= 0) & (r < R)
    square = tl.zeros([r.shape[0]], A)
    for first in range(0, C, BLOCK_C):
        c = channels(first, BLOCK_C)
        error = rendered(w_ptr, f_ptr, begin, n, c, C, A, BLOCK_S)
        error = tl.where(is_ray[:, None], error - load_rows(target_ptr, r, c, R, C, A), 0.0)
        store_rows(error_ptr, r, c, error, mask & is_ray, C)
        square += tl.sum(error * error, 1)
        for b in range(tl.cdiv(tl.max(n, 0), BLOCK_S)):
            k, sample, at, value = places(begin, n, b, c, C, BLOCK_S)
            product = tl.sum(error[:, None, :] * load(f_ptr + at, value, A), 2)
            if first > 0:
                product += load(product_ptr + k, sample, A)
            tl.store(product_ptr + k, product, mask=sample)
        # other threads may add to these products
        tl.debug_barrier()
    tl.store(loss_ptr + r, square / C, mask=mask & is_ray)


@triton.jit
def packed_feature_distillation_loss_bwd_kernel(
    d_w_ptr,  # [P]
    d_f_ptr,  # [P, C]
    d_target_ptr,  # [R, C]
    d_loss_ptr,  # [R]
    error_ptr,  # [R, C]
    product_ptr,  # [P]
    w_ptr,  # [P]
    offsets_ptr,  # [R+1]
    R,
    P,
    C,
    NEEDS_D_W: tl.constexpr,
    NEEDS_D_F: tl.constexpr,
    NEEDS_D_TARGET: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
):
    # one ray less: the samples before offsets[0]
    first = tl.program_id(0).to(tl.int64) * BLOCK_R - 1
    r = first + tl.arange(0, BLOCK_R)
    begin, n = packed_rays(offsets_ptr, r, R, P)
    short = n <= BLOCK_LONG
    _gradients(
        d_w_ptr, d_f_ptr, d_target_ptr, d_loss_ptr, error_ptr, product_ptr, w_ptr, r, begin,
        tl.where(short, n, 0), short, R, C, NEEDS_D_W, NEEDS_D_F, NEEDS_D_TARGET, BLOCK_S, BLOCK_C,
    )  # fmt: skip
    if tl.max(n, 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            one, begin_one, n_one = long_ray(offsets_ptr, first + i, R, P, BLOCK_LONG)
            _gradients(
                d_w_ptr, d_f_ptr, d_target_ptr, d_loss_ptr, error_ptr, product_ptr, w_ptr, one,
                begin_one, n_one, n_one > 0, R, C, NEEDS_D_W, NEEDS_D_F, NEEDS_D_TARGET,
                BLOCK_LONG, BLOCK_C,
            )  # fmt: skip


@triton.jit
def _gradients(
    d_w_ptr,
    d_f_ptr,
    d_target_ptr,
    d_loss_ptr,
    error_ptr,
    product_ptr,
    w_ptr,
    r,
    begin,
    n,
    mask,
    R,
    C,
    NEEDS_D_W: tl.constexpr,
    NEEDS_D_F: tl.constexpr,
    NEEDS_D_TARGET: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    A: tl.constexpr = d_loss_ptr.dtype.element_ty
    scale = 2 * packed_values(d_loss_ptr, r, R) / C
    c = channels(0, BLOCK_C)
    g = scale[:, None] * load_rows(error_ptr, r, c, R, C, A)
    if NEEDS_D_TARGET:
        store_rows(d_target_ptr, r, c, -g, mask & (r >= 0) & (r < R), C)
    for b in range(tl.cdiv(tl.max(n, 0), BLOCK_S)):
        k, sample, at, value = places(begin, n, b, c, C, BLOCK_S)
        if NEEDS_D_W:
            product = load(product_ptr + k, sample, A)
            tl.store(d_w_ptr + k, scale[:, None] * product, mask=sample)
        if NEEDS_D_F:
            w = load(w_ptr + k, sample, A)
            tl.store(d_f_ptr + at, w[:, :, None] * g[:, None, :], mask=value)


def fwd(w: Tensor, f: Tensor, target: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    R, (P, C) = len(offsets) - 1, f.shape
    dtype = accumulator(w.dtype)
    loss, error, product = (w.new_empty(shape, dtype=dtype) for shape in (R, target.shape, P))
    if R == 0:
        return loss, error, product.zero_()
    grid, tile = launch(R, P, min(C, _CHANNELS), w.dtype, strays=2)
    packed_feature_distillation_loss_fwd_kernel[grid](
        loss, error, product, w, f, target, offsets, R, P, C, **tile, **bounded(96, w)
    )
    return loss, error, product


def bwd(
    d_loss: Tensor,
    error: Tensor,
    product: Tensor,
    w: Tensor,
    f: Tensor,
    target: Tensor,
    offsets: Tensor,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    R, (P, C) = len(offsets) - 1, f.shape
    grads = tuple(empty_gradient(x, needs, i) for i, x in enumerate((w, f, target)))
    if R == 0:
        return tuple(grad.zero_() for grad in grads)
    grid, tile = launch(R, P, C, w.dtype, strays=2)
    packed_feature_distillation_loss_bwd_kernel[grid](
        *grads,
        d_loss,
        error,
        product,
        w,
        offsets,
        R,
        P,
        C,
        NEEDS_D_W=bool(needs & 1),
        NEEDS_D_F=bool(needs & 2),
        NEEDS_D_TARGET=bool(needs & 4),
        **tile,
        **bounded(80, w),
    )
    return grads
