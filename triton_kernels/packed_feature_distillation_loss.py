# Feature distillation of packed rays, loss = mean_c (F_c - target_c)^2 with the rendering
# F = sum_s w_s f_s. A program owns BLOCK_R rays with all their channels, and takes the long ones by
# themselves, as in packed_render_features.py. Forward: once over f. Backward: once for F, which
# gives g = d_loss 2/C (F - target) and d_target = -g, and once more, from the L2 cache, for
# d_w_s = <g, f_s>; d_f_s = w_s g.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, empty_gradient, packed_rays, packed_values
from .packed_render_features import launch, load_rows, long_ray, rendered, spread, store_rows


@triton.jit
def packed_feature_distillation_loss_fwd_kernel(
    loss_ptr,  # [R]
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
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    r = first + tl.arange(0, BLOCK_R)
    begin, n = packed_rays(offsets_ptr, r, R, P)
    short = n <= BLOCK_LONG
    _losses(
        loss_ptr, w_ptr, f_ptr, target_ptr, r, begin, tl.where(short, n, 0), (r < R) & short, R, C,
        BLOCK_S, BLOCK_C,
    )  # fmt: skip
    if tl.max(n, 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            one, begin_one, n_one = long_ray(offsets_ptr, first + i, R, P, BLOCK_LONG)
            _losses(
                loss_ptr, w_ptr, f_ptr, target_ptr, one, begin_one, n_one, (one < R) & (n_one > 0),
                R, C, BLOCK_LONG, BLOCK_C,
            )  # fmt: skip


@triton.jit
def _losses(
    loss_ptr,
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
    off = rendered(w_ptr, f_ptr, begin, n, C, A, BLOCK_S, BLOCK_C)
    off -= load_rows(target_ptr, r, R, C, A, BLOCK_C)
    tl.store(loss_ptr + r, tl.sum(off * off, 1) / C, mask=mask)


@triton.jit
def packed_feature_distillation_loss_bwd_kernel(
    d_w_ptr,  # [P]
    d_f_ptr,  # [P, C]
    d_target_ptr,  # [R, C]
    d_loss_ptr,  # [R]
    w_ptr,  # [P]
    f_ptr,  # [P, C]
    target_ptr,  # [R, C]
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
    mask = (r >= 0) & (r < R) & short
    _gradients(
        d_w_ptr, d_f_ptr, d_target_ptr, d_loss_ptr, w_ptr, f_ptr, target_ptr, r, begin,
        tl.where(short, n, 0), mask, R, C, NEEDS_D_W, NEEDS_D_F, NEEDS_D_TARGET, BLOCK_S, BLOCK_C,
    )  # fmt: skip
    if tl.max(n, 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            one, begin_one, n_one = long_ray(offsets_ptr, first + i, R, P, BLOCK_LONG)
            mask_one = (one >= 0) & (one < R) & (n_one > 0)
            _gradients(
                d_w_ptr, d_f_ptr, d_target_ptr, d_loss_ptr, w_ptr, f_ptr, target_ptr, one,
                begin_one, n_one, mask_one, R, C, NEEDS_D_W, NEEDS_D_F, NEEDS_D_TARGET, BLOCK_LONG,
                BLOCK_C,
            )  # fmt: skip


@triton.jit
def _gradients(
    d_w_ptr,
    d_f_ptr,
    d_target_ptr,
    d_loss_ptr,
    w_ptr,
    f_ptr,
    target_ptr,
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
    off = rendered(w_ptr, f_ptr, begin, n, C, A, BLOCK_S, BLOCK_C)
    off -= load_rows(target_ptr, r, R, C, A, BLOCK_C)
    g = (2 * packed_values(d_loss_ptr, r, R) / C)[:, None] * off
    if NEEDS_D_TARGET:
        store_rows(d_target_ptr, r, -g, mask, C)
    if NEEDS_D_W or NEEDS_D_F:
        spread(d_w_ptr, d_f_ptr, g, w_ptr, f_ptr, begin, n, C, NEEDS_D_W, NEEDS_D_F, BLOCK_S)


def fwd(w: Tensor, f: Tensor, target: Tensor, offsets: Tensor) -> Tensor:
    R, (P, C) = len(offsets) - 1, f.shape
    loss = w.new_empty(R, dtype=accumulator(w.dtype))
    grid, tile = launch(R, P, C, w.dtype)
    packed_feature_distillation_loss_fwd_kernel[grid](loss, w, f, target, offsets, R, P, C, **tile)
    return loss


def bwd(
    d_loss: Tensor, w: Tensor, f: Tensor, target: Tensor, offsets: Tensor, needs: int
) -> tuple[Tensor, Tensor, Tensor]:
    R, (P, C) = len(offsets) - 1, f.shape
    grads = tuple(empty_gradient(x, needs, i) for i, x in enumerate((w, f, target)))
    if R == 0:
        return tuple(grad.zero_() for grad in grads)
    grid, tile = launch(R, P, C, w.dtype, strays=2)
    packed_feature_distillation_loss_bwd_kernel[grid](
        *grads,
        d_loss,
        w,
        f,
        target,
        offsets,
        R,
        P,
        C,
        NEEDS_D_W=bool(needs & 1),
        NEEDS_D_F=bool(needs & 2),
        NEEDS_D_TARGET=bool(needs & 4),
        **tile,
    )
    return grads
