# Zip-NeRF's interlevel loss: L = 1/E sum_k r_k u_k with r_k = max(0, w_blur_k - w_env_k) and
# u_k = r_k / (w_env_k + eps). The weight up to x, blurred by a box of half-width p, is
# (I(x + p) - I(x - p)) / 2p, I the integral of the weight up to a place: a parabola in each sample.
# A program of one warp owns a ray after the other; it writes its parabolas, in double, to memory
# that stays in the cache, and bisects the samples for each edge of a bin. Backward: d_w_env_k =
# -u_k (2 + u_k) d_loss / E. Source: Zip-NeRF, section 4; docs/interlevel.md.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, empty_gradient, load
from .outer_bound import count_up_to, launch


@triton.jit
def zip_interlevel_loss_fwd_kernel(
    loss_ptr,  # [R]
    curves_ptr,  # [programs, 3, S+1]
    t_ptr,  # [R, S+1]
    w_ptr,  # [R, S]
    t_env_ptr,  # [R, E+1]
    w_env_ptr,  # [R, E]
    R,
    S,
    E,
    t_stride_r,
    t_env_stride_r,
    PULSE_WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    STEPS_S: tl.constexpr,
    STEPS_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    A: tl.constexpr = loss_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    curves_ptr += program * 3 * (S + 1)
    for r in range(program, R, tl.num_programs(0)):
        t, t_env = t_ptr + r * t_stride_r, t_env_ptr + r * t_env_stride_r
        _integrate(curves_ptr, t, w_ptr + r * S, S, BLOCK_S)
        loss = tl.zeros((BLOCK_E,), A)
        for start in range(0, E, BLOCK_E):
            k = start + tl.arange(0, BLOCK_E)
            w_blur = _blurred(curves_ptr, t, S, t_env, start, E, PULSE_WIDTH, STEPS_S, BLOCK_E, A)
            rest, u = _lacking(w_blur, load(w_env_ptr + r * E + k, k < E, A), EPS)
            loss += tl.where(k < E, rest * u, 0.0)
        tl.store(loss_ptr + r, tl.sum(loss, 0) / tl.maximum(E, 1))


@triton.jit
def zip_interlevel_loss_bwd_kernel(
    d_w_env_ptr,  # [R, E]
    curves_ptr,  # [programs, 3, S+1]
    d_loss_ptr,  # [R]
    t_ptr,  # [R, S+1]
    w_ptr,  # [R, S]
    t_env_ptr,  # [R, E+1]
    w_env_ptr,  # [R, E]
    R,
    S,
    E,
    t_stride_r,
    t_env_stride_r,
    PULSE_WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    STEPS_S: tl.constexpr,
    STEPS_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    A: tl.constexpr = d_loss_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    curves_ptr += program * 3 * (S + 1)
    for r in range(program, R, tl.num_programs(0)):
        t, t_env = t_ptr + r * t_stride_r, t_env_ptr + r * t_env_stride_r
        scale = -tl.load(d_loss_ptr + r) / tl.maximum(E, 1)
        _integrate(curves_ptr, t, w_ptr + r * S, S, BLOCK_S)
        for start in range(0, E, BLOCK_E):
            k = start + tl.arange(0, BLOCK_E)
            w_blur = _blurred(curves_ptr, t, S, t_env, start, E, PULSE_WIDTH, STEPS_S, BLOCK_E, A)
            _, u = _lacking(w_blur, load(w_env_ptr + r * E + k, k < E, A), EPS)
            tl.store(d_w_env_ptr + r * E + k, scale * (u * (2 + u)), mask=k < E)


@triton.jit
def _lacking(w_blur, w_env, EPS: tl.constexpr):
    """What bins lack, and its ratio to their weight; exactly 0 where they have enough."""
    rest = w_blur - w_env
    enough = rest <= 0
    return tl.where(enough, 0.0, rest), tl.where(enough, 0.0, rest / (w_env + EPS))


@triton.jit
def _integrate(curves_ptr, t_ptr, w_ptr, S, BLOCK: tl.constexpr):
    """The weight before each sample and its integral, and how that bends, for all threads. There is
    a sample S without weight, for what lies behind."""
    # other threads may still read those of the ray before
    tl.debug_barrier()
    integral_ptr, bend_ptr = curves_ptr + S + 1, curves_ptr + 2 * (S + 1)
    before_block, integral_block = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for start in range(0, S + 1, BLOCK):
        s = start + tl.arange(0, BLOCK)
        w = load(w_ptr + s, s < S, tl.float64)
        begin = load(t_ptr + s, s < S, tl.float64)
        width = load(t_ptr + s + 1, s < S, tl.float64) - begin
        before = before_block + (tl.cumsum(w, 0) - w)
        area = (before + w / 2) * width
        integral = integral_block + (tl.cumsum(area, 0) - area)
        wide = width > 0
        bend = tl.where(wide, w / tl.where(wide, width, 1.0) / 2, 0.0)
        tl.store(curves_ptr + s, before, mask=s <= S)
        tl.store(integral_ptr + s, integral, mask=s <= S)
        tl.store(bend_ptr + s, bend, mask=s <= S)
        before_block += tl.sum(w + 0.0, 0)
        integral_block += tl.sum(area, 0)
    tl.debug_barrier()


@triton.jit
def _blurred(
    curves_ptr, t_ptr, S, t_env_ptr, start, E, PULSE_WIDTH: tl.constexpr, STEPS: tl.constexpr,
    BLOCK: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The blurred weights in bins from `start` on."""
    k = tl.arange(0, BLOCK)
    edge = load(t_env_ptr + start + k + 1, start + k < E, tl.float64)
    until = _until(curves_ptr, t_ptr, S, edge, PULSE_WIDTH, STEPS, A)
    # the right edge of one is the left one of the next
    edge = tl.load(t_env_ptr + start).to(tl.float64)
    begin = _until(curves_ptr, t_ptr, S, edge, PULSE_WIDTH, STEPS, A)
    before = tl.where(k == 0, begin, tl.gather(until, tl.maximum(k - 1, 0), 0))
    return ((until - before) / (2 * PULSE_WIDTH)).to(A)


@triton.jit
def _until(curves_ptr, t_ptr, S, x, WIDTH: tl.constexpr, STEPS: tl.constexpr, A: tl.constexpr):
    """The integral of the weight in a box around x."""
    above = _integral(curves_ptr, t_ptr, S, x + WIDTH, STEPS, A)
    return above - _integral(curves_ptr, t_ptr, S, x - WIDTH, STEPS, A)


@triton.jit
def _integral(curves_ptr, t_ptr, S, x, STEPS: tl.constexpr, A: tl.constexpr):
    """The integral of the weight up to x. In which of two samples x is, when it is one of their
    edges but for a rounding, does not matter to it."""
    count = count_up_to(t_ptr, S, x.to(A), True, STEPS, A)
    sample = tl.maximum(count - 1, 0)
    d = tl.where(count == 0, 0.0, x - tl.load(t_ptr + sample).to(tl.float64))
    before, integral = tl.load(curves_ptr + sample), tl.load(curves_ptr + sample + S + 1)
    bend = tl.load(curves_ptr + sample + 2 * (S + 1))
    return integral + d * (before + bend * d)


def fwd(
    t: Tensor, w: Tensor, t_env: Tensor, w_env: Tensor, pulse_width: float, eps: float
) -> Tensor:
    S, E = w.shape[-1], w_env.shape[-1]
    loss = w.new_empty(w.shape[:-1], dtype=accumulator(w.dtype))
    R = loss.numel()
    grid, tile = launch(R, S, E)
    curves = w.new_empty(grid[0], 3, S + 1, dtype=torch.float64)
    widths = {"PULSE_WIDTH": pulse_width, "EPS": eps}
    zip_interlevel_loss_fwd_kernel[grid](
        loss, curves, t, w, t_env, w_env, R, S, E, S + 1, E + 1, **widths, **tile
    )
    return loss


def bwd(
    d_loss: Tensor,
    t: Tensor,
    w: Tensor,
    t_env: Tensor,
    w_env: Tensor,
    pulse_width: float,
    eps: float,
    needs: int,
) -> Tensor:
    S, E, R = w.shape[-1], w_env.shape[-1], d_loss.numel()
    d_w_env = empty_gradient(w_env, needs, 0)
    if needs & 1:
        grid, tile = launch(R, S, E)
        curves = w.new_empty(grid[0], 3, S + 1, dtype=torch.float64)
        widths = {"PULSE_WIDTH": pulse_width, "EPS": eps}
        zip_interlevel_loss_bwd_kernel[grid](
            d_w_env, curves, d_loss, t, w, t_env, w_env, R, S, E, S + 1, E + 1, **widths, **tile
        )
    return d_w_env
