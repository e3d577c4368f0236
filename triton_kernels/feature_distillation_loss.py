# Feature distillation, loss = mean_c (F_c - target_c)^2 with the rendering F = sum_s w_s f_s.
# A program owns BLOCK_R rays with all their channels, as in render_features.py. Forward: once over
# f. Backward: once for F, which gives g = d_loss 2/C (F - target) and d_target = -g, and once more,
# from the L2 cache, for d_w_s = <g, f_s>; d_f_s = w_s g.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, empty_gradient
from .render_features import launch, rendered, spread


@triton.jit
def feature_distillation_loss_fwd_kernel(
    loss_ptr,  # [R]
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
    c = tl.arange(0, BLOCK_C)
    off = rendered(w_ptr, f_ptr, r, c, R, S, C, A, BLOCK_R, BLOCK_S, BLOCK_C)
    off -= _target(target_ptr, r, c, R, C, A)
    tl.store(loss_ptr + r, tl.sum(off * off, 1) / C, mask=r < R)


@triton.jit
def feature_distillation_loss_bwd_kernel(
    d_w_ptr,  # [R, S]
    d_f_ptr,  # [R, S, C]
    d_target_ptr,  # [R, C]
    d_loss_ptr,  # [R]
    w_ptr,  # [R, S]
    f_ptr,  # [R, S, C]
    target_ptr,  # [R, C]
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
    A: tl.constexpr = d_loss_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    off = rendered(w_ptr, f_ptr, r, c, R, S, C, A, BLOCK_R, BLOCK_S, BLOCK_C)
    off -= _target(target_ptr, r, c, R, C, A)
    scale = 2 * tl.load(d_loss_ptr + r, mask=r < R, other=0.0) / C
    g = scale[:, None] * off
    if NEEDS_D_TARGET:
        here = (r < R)[:, None] & (c < C)[None, :]
        tl.store(d_target_ptr + (r * C)[:, None] + c[None, :], -g, mask=here)
    if NEEDS_D_W or NEEDS_D_F:
        spread(d_w_ptr, d_f_ptr, g, w_ptr, f_ptr, r, c, R, S, C, NEEDS_D_W, NEEDS_D_F, BLOCK_S)


@triton.jit
def _target(target_ptr, r, c, R, C, A: tl.constexpr):
    here = (r < R)[:, None] & (c < C)[None, :]
    return tl.load(target_ptr + (r * C)[:, None] + c[None, :], mask=here, other=0.0).to(A)


def fwd(w: Tensor, f: Tensor, target: Tensor) -> Tensor:
    S, C = f.shape[-2:]
    loss = w.new_empty(w.shape[:-1], dtype=accumulator(w.dtype))
    R = loss.numel()
    grid, tile = launch(R, S, C, w.dtype)
    feature_distillation_loss_fwd_kernel[grid](loss, w, f, target, R, S, C, **tile)
    return loss


def bwd(
    d_loss: Tensor, w: Tensor, f: Tensor, target: Tensor, needs: int
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
        w,
        f,
        target,
        R,
        S,
        C,
        NEEDS_D_W=bool(needs & 1),
        NEEDS_D_F=bool(needs & 2),
        NEEDS_D_TARGET=bool(needs & 4),
        **tile,
    )
    return d_w, d_f, d_target
