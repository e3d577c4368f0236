# Zip-NeRF's interlevel loss: L = 1/E sum_k r_k u_k with r_k = max(0, w_blur_k - w_env_k) and
# u_k = r_k / (w_env_k + eps). The weight up to x, blurred by a box of half-width p, is
# (I(x + p) - I(x - p)) / 2p, I the integral of the weight up to a place: a parabola in each sample.
# A program owns BLOCK_R rays and takes BLOCK_E bins at a time; a bisection finds the sample of each
# edge, tl.gather its parabola among running sums in double, which pass in blocks of BLOCK_S.
# Backward: d_w_env_k = -u_k (2 + u_k) d_loss / E. Source: Zip-NeRF, section 4; docs/interlevel.md.
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, empty_gradient
from .outer_bound import count_up_to, load

_TILE = 128
_MAX_BLOCK_S = 64
_BLOCK_E = 64


@triton.jit
def zip_interlevel_loss_fwd_kernel(
    loss_ptr,  # [R]
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
    STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    A: tl.constexpr = loss_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    ray = r < R
    loss = tl.zeros([BLOCK_R, 1], A)
    for start in range(0, E, BLOCK_E):
        k = start + tl.arange(0, BLOCK_E)[None, :]
        here = ray & (k < E)
        w_blur = _blurred(
            t_ptr + r * t_stride_r,
            w_ptr + r * S,
            t_env_ptr + r * t_env_stride_r,
            k,
            here,
            ray,
            S,
            PULSE_WIDTH,
            STEPS,
            BLOCK_S,
        ).to(A)
        rest, u = _lacking(w_blur, load(w_env_ptr + r * E + k, here, A), EPS)
        loss += tl.sum(rest * u, 1)[:, None]
    tl.store(loss_ptr + r, loss / tl.maximum(E, 1), mask=ray)


@triton.jit
def zip_interlevel_loss_bwd_kernel(
    d_w_env_ptr,  # [R, E]
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
    STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    A: tl.constexpr = d_loss_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    ray = r < R
    scale = -load(d_loss_ptr + r, ray, A) / tl.maximum(E, 1)
    for start in range(0, E, BLOCK_E):
        k = start + tl.arange(0, BLOCK_E)[None, :]
        here = ray & (k < E)
        w_blur = _blurred(
            t_ptr + r * t_stride_r,
            w_ptr + r * S,
            t_env_ptr + r * t_env_stride_r,
            k,
            here,
            ray,
            S,
            PULSE_WIDTH,
            STEPS,
            BLOCK_S,
        ).to(A)
        _, u = _lacking(w_blur, load(w_env_ptr + r * E + k, here, A), EPS)
        tl.store(d_w_env_ptr + r * E + k, scale * (u * (2 + u)), mask=here)


@triton.jit
def _lacking(w_blur, w_env, EPS: tl.constexpr):
    """What bins lack, and its ratio to their weight; exactly 0 where they have enough."""
    rest = w_blur - w_env
    enough = rest <= 0
    return tl.where(enough, 0.0, rest), tl.where(enough, 0.0, rest / (w_env + EPS))


@triton.jit
def _blurred(
    t_ptrs,
    w_ptrs,
    t_env_ptrs,
    k,
    here,
    ray,
    S,
    PULSE_WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The blurred weights in bins k, in double."""
    left, right = load(t_env_ptrs + k, here, tl.float64), load(t_env_ptrs + k + 1, here, tl.float64)
    left_below = _sample(t_ptrs, left - PULSE_WIDTH, S, here, STEPS)
    left_above = _sample(t_ptrs, left + PULSE_WIDTH, S, here, STEPS)
    right_below = _sample(t_ptrs, right - PULSE_WIDTH, S, here, STEPS)
    right_above = _sample(t_ptrs, right + PULSE_WIDTH, S, here, STEPS)
    blurred = tl.zeros(here.shape, tl.float64)
    before_block = tl.zeros(ray.shape, tl.float64)
    integral_block = tl.zeros(ray.shape, tl.float64)
    # there is a sample S without weight or width, for what lies behind
    for start in range(0, S + 1, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[None, :]
        # what the sample before adds
        last = ray & (s > start) & (s <= S)
        w = load(w_ptrs + s - 1, last, tl.float64)
        width = load(t_ptrs + s, last, tl.float64) - load(t_ptrs + s - 1, last, tl.float64)
        before = before_block + tl.cumsum(w, 1)
        integral = integral_block + tl.cumsum((before - w / 2) * width, 1)
        args = (start, before, integral, t_ptrs, w_ptrs, S, here)
        blurred += _integral(right + PULSE_WIDTH, right_above, *args)
        blurred -= _integral(right - PULSE_WIDTH, right_below, *args)
        blurred -= _integral(left + PULSE_WIDTH, left_above, *args)
        blurred += _integral(left - PULSE_WIDTH, left_below, *args)
        # the block's last sample has yet to be added
        end = start + BLOCK_S + tl.zeros(ray.shape, tl.int32)
        more = ray & (end <= S)
        w_last = load(w_ptrs + end - 1, more, tl.float64)
        width_last = load(t_ptrs + end, more, tl.float64) - load(t_ptrs + end - 1, more, tl.float64)
        before_last = before_block + tl.sum(w, 1)[:, None]
        integral_block += tl.sum((before - w / 2) * width, 1)[:, None]
        integral_block += (before_last + w_last / 2) * width_last
        before_block = before_last + w_last
    return blurred / (2 * PULSE_WIDTH)


@triton.jit
def _sample(t_ptrs, x, S, here, STEPS: tl.constexpr):
    """The last sample that does not begin beyond x, or the first one."""
    return tl.maximum(count_up_to(t_ptrs, S, x, here, True, STEPS, tl.float64) - 1, 0)


@triton.jit
def _integral(x, sample, start, before, integral, t_ptrs, w_ptrs, S, here):
    """The integral of the weight up to x, where its sample is in this block; else 0."""
    i = sample - start
    inside = here & (i >= 0) & (i < before.shape[1])
    place = tl.where(inside, i, 0).to(tl.int32)
    begin = load(t_ptrs + sample, inside, tl.float64)
    has_width = inside & (sample < S)
    w = load(w_ptrs + sample, has_width, tl.float64)
    width = load(t_ptrs + sample + 1, has_width, tl.float64) - begin
    wide = has_width & (width > 0)
    curve = tl.where(wide, w / tl.where(wide, width, 1.0) / 2, 0.0)
    d = tl.where(x < begin, 0.0, x - begin)
    slope = tl.gather(before, place, 1) + curve * d
    return tl.where(inside, tl.gather(integral, place, 1) + d * slope, 0.0)


def _launch(R: int, S: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and a tile with about one sample and one bin for each thread."""
    # the double values of 4 rays of 128 samples spill on sm_90
    block_s = min(max(triton.next_power_of_2(S + 1), 16), _MAX_BLOCK_S)
    block_r = _TILE // block_s
    options = {"num_warps": 4, "enable_fp_fusion": True}
    tile = {"BLOCK_R": block_r, "BLOCK_S": block_s, "BLOCK_E": _BLOCK_E}
    return (triton.cdiv(R, block_r),), {**tile, "STEPS": S.bit_length() + 1, **options}


def fwd(
    t: Tensor, w: Tensor, t_env: Tensor, w_env: Tensor, pulse_width: float, eps: float
) -> Tensor:
    S, E = w.shape[-1], w_env.shape[-1]
    loss = w.new_empty(w.shape[:-1], dtype=accumulator(w.dtype))
    R = loss.numel()
    grid, tile = _launch(R, S)
    widths = {"PULSE_WIDTH": pulse_width, "EPS": eps}
    zip_interlevel_loss_fwd_kernel[grid](
        loss, t, w, t_env, w_env, R, S, E, S + 1, E + 1, **widths, **tile
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
        grid, tile = _launch(R, S)
        widths = {"PULSE_WIDTH": pulse_width, "EPS": eps}
        zip_interlevel_loss_bwd_kernel[grid](
            d_w_env, d_loss, t, w, t_env, w_env, R, S, E, S + 1, E + 1, **widths, **tile
        )
    return d_w_env
