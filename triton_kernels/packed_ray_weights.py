# Weights of packed rays, the formulas of csrc/cpu/packed_ray_weights.cpp: x_i = sigma_i dt_i, T_i =
# exp(-sum_{j<i} x_j), w_i = T_i (1 - exp(-x_i)), d_x_i = (d_w_i - d_T_{i+1}) T_{i+1} - sum_{j>i}
# later_j with later_j = d_w_j w_j + d_T_{j+1} T_{j+1}, d_sigma = d_x dt, d_dt = d_x sigma.
# A program owns BLOCK_R rays and takes BLOCK_S samples of each at a time, then the long ones among
# them by themselves. Forward: once from the left. Backward: once from the right; rays of several
# blocks are first read from the left, for how deep each block lies. The shifted loads hit the L1
# cache. docs/compositing.md
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    accumulator,
    add_exactly,
    bounded_warp,
    empty_gradient,
    is_wall,
    launch_packed,
    light_at,
    load,
    packed_rays,
    packed_values,
    stopped,
)

# nothing passes a greater depth, and sums of so many samples as memory holds stay finite
_OPAQUE = tl.constexpr(2.0**100)


@triton.jit
def packed_ray_weights_fwd_kernel(
    w_ptr,  # [P]
    light_ptr,  # [P]
    remaining_ptr,  # [R]
    sigma_ptr,  # [P]
    t_starts_ptr,  # [P]
    t_ends_ptr,  # [P]
    offsets_ptr,  # [R+1]
    R,
    P,
    OPAQUE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
):
    # one ray less: the samples before offsets[0]
    first = tl.program_id(0).to(tl.int64) * BLOCK_R - 1
    r = first + tl.arange(0, BLOCK_R)
    begin, n = packed_rays(offsets_ptr, r, R, P)
    short = n <= BLOCK_LONG
    remaining = _weights(
        w_ptr, light_ptr, sigma_ptr, t_starts_ptr, t_ends_ptr, begin, tl.where(short, n, 0),
        OPAQUE, BLOCK_S,
    )  # fmt: skip
    tl.store(remaining_ptr + r, remaining, mask=(r >= 0) & (r < R) & short)
    if tl.max(n, 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            one = first + i + tl.arange(0, 1)
            begin_one, n_one = packed_rays(offsets_ptr, one, R, P)
            n_one = tl.where(n_one > BLOCK_LONG, n_one, 0)
            remaining_one = _weights(
                w_ptr, light_ptr, sigma_ptr, t_starts_ptr, t_ends_ptr, begin_one, n_one, OPAQUE,
                BLOCK_LONG,
            )  # fmt: skip
            tl.store(remaining_ptr + one, remaining_one, mask=(one >= 0) & (one < R) & (n_one > 0))


@triton.jit
def _weights(
    w_ptr,
    light_ptr,
    sigma_ptr,
    t_starts_ptr,
    t_ends_ptr,
    begin,
    n,
    OPAQUE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    A: tl.constexpr = w_ptr.dtype.element_ty
    depth = tl.zeros(n.shape, A)
    lost = tl.zeros(n.shape, A)
    for b in range(tl.cdiv(tl.max(n, 0), BLOCK)):
        s = tl.cast(b, tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
        k, here, inner = begin[:, None] + s, s < n[:, None], _follows(BLOCK) & (s < n[:, None])
        x_before = _depth(sigma_ptr, t_starts_ptr, t_ends_ptr, k - 1, inner, A)
        light = light_at(depth[:, None] + tl.cumsum(x_before, 1), A)
        x = _depth(sigma_ptr, t_starts_ptr, t_ends_ptr, k, here, A)
        if OPAQUE:
            x = tl.where(s == n[:, None] - 1, _OPAQUE, x)
        tl.store(w_ptr + k, light * stopped(x, A), mask=here)
        tl.store(light_ptr + k, light, mask=here)
        depth, lost = add_exactly(depth, lost, tl.sum(x, 1))
    return light_at(depth, A)


@triton.jit
def packed_ray_weights_bwd_kernel(
    d_sigma_ptr,  # [P]
    d_t_starts_ptr,  # [P]
    d_t_ends_ptr,  # [P]
    kept_ptr,  # [P // BLOCK_S + 1]
    d_w_ptr,  # [P]
    d_light_ptr,  # [P]
    d_remaining_ptr,  # [R]
    sigma_ptr,  # [P]
    t_starts_ptr,  # [P]
    t_ends_ptr,  # [P]
    offsets_ptr,  # [R+1]
    R,
    P,
    HAS_D_W: tl.constexpr,
    HAS_D_LIGHT: tl.constexpr,
    HAS_D_REMAINING: tl.constexpr,
    NEEDS_D_SIGMA: tl.constexpr,
    NEEDS_D_T_STARTS: tl.constexpr,
    NEEDS_D_T_ENDS: tl.constexpr,
    OPAQUE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
):
    A: tl.constexpr = kept_ptr.dtype.element_ty
    # one ray less: the samples before offsets[0]
    first = tl.program_id(0).to(tl.int64) * BLOCK_R - 1
    r = first + tl.arange(0, BLOCK_R)
    begin, n = packed_rays(offsets_ptr, r, R, P)
    longest = tl.max(n, 0)
    n = tl.where(n <= BLOCK_LONG, n, 0)
    d_remaining = tl.zeros([BLOCK_R], A)
    if HAS_D_REMAINING:
        d_remaining = packed_values(d_remaining_ptr, r, R)
    _gradients(
        d_sigma_ptr, d_t_starts_ptr, d_t_ends_ptr, kept_ptr, d_w_ptr, d_light_ptr, d_remaining,
        sigma_ptr, t_starts_ptr, t_ends_ptr, begin, n, HAS_D_W, HAS_D_LIGHT, NEEDS_D_SIGMA,
        NEEDS_D_T_STARTS, NEEDS_D_T_ENDS, OPAQUE, BLOCK_S, BLOCK_S,
    )  # fmt: skip
    if longest > BLOCK_LONG:
        for i in range(BLOCK_R):
            one = first + i + tl.arange(0, 1)
            begin_one, n_one = packed_rays(offsets_ptr, one, R, P)
            n_one = tl.where(n_one > BLOCK_LONG, n_one, 0)
            d_remaining_one = tl.zeros([1], A)
            if HAS_D_REMAINING:
                d_remaining_one = packed_values(d_remaining_ptr, one, R)
            _gradients(
                d_sigma_ptr, d_t_starts_ptr, d_t_ends_ptr, kept_ptr, d_w_ptr, d_light_ptr,
                d_remaining_one, sigma_ptr, t_starts_ptr, t_ends_ptr, begin_one, n_one, HAS_D_W,
                HAS_D_LIGHT, NEEDS_D_SIGMA, NEEDS_D_T_STARTS, NEEDS_D_T_ENDS, OPAQUE, BLOCK_S,
                BLOCK_LONG,
            )  # fmt: skip


@triton.jit
def _gradients(
    d_sigma_ptr,
    d_t_starts_ptr,
    d_t_ends_ptr,
    kept_ptr,
    d_w_ptr,
    d_light_ptr,
    d_remaining,
    sigma_ptr,
    t_starts_ptr,
    t_ends_ptr,
    begin,
    n,
    HAS_D_W: tl.constexpr,
    HAS_D_LIGHT: tl.constexpr,
    NEEDS_D_SIGMA: tl.constexpr,
    NEEDS_D_T_STARTS: tl.constexpr,
    NEEDS_D_T_ENDS: tl.constexpr,
    OPAQUE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    A: tl.constexpr = kept_ptr.dtype.element_ty
    # how deep each block but a ray's first lies; rays have room for it where they begin
    place = begin // BLOCK_S - 1
    blocks = tl.cdiv(tl.max(n, 0), BLOCK)
    depth = tl.zeros(n.shape, A)
    lost = tl.zeros(n.shape, A)
    for i in range(1, blocks):
        b = tl.cast(i, tl.int64)
        s = (b - 1) * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = _depth(sigma_ptr, t_starts_ptr, t_ends_ptr, begin[:, None] + s, s < n[:, None], A)
        depth, lost = add_exactly(depth, lost, tl.sum(x, 1))
        tl.store(kept_ptr + place + b, depth, mask=b * BLOCK < n)
    # other threads read them
    tl.debug_barrier()

    right = tl.zeros(n.shape, A)
    right_lost = tl.zeros(n.shape, A)
    for i in range(blocks):
        b = blocks - 1 - tl.cast(i, tl.int64)
        s = b * BLOCK + tl.arange(0, BLOCK)[None, :]
        k, here, followed = begin[:, None] + s, s < n[:, None], s + 1 < n[:, None]
        # not the first block, and one that exists
        kept = tl.minimum(b, n - b * BLOCK) > 0
        depth = tl.where(kept, tl.load(kept_ptr + tl.where(kept, place + b, 0)), 0.0)
        inner = _follows(BLOCK) & here
        x_before = _depth(sigma_ptr, t_starts_ptr, t_ends_ptr, k - 1, inner, A)
        x = _depth(sigma_ptr, t_starts_ptr, t_ends_ptr, k, here, A)
        x_next = _depth(sigma_ptr, t_starts_ptr, t_ends_ptr, k + 1, followed, A)
        if OPAQUE:
            x = tl.where(s + 1 == n[:, None], _OPAQUE, x)
            x_next = tl.where(s + 2 == n[:, None], _OPAQUE, x_next)
        deep = depth[:, None] + tl.cumsum(x_before, 1) + x
        # light_at() would spill, for digits of what is next to nothing
        passed = tl.exp(-deep)
        d_w = tl.zeros(x.shape, A)
        d_w_next = tl.zeros(x.shape, A)
        if HAS_D_W:
            d_w = load(d_w_ptr + k, here, A)
            d_w_next = load(d_w_ptr + k + 1, followed, A)
        d_passed = _d_passed(d_light_ptr, d_remaining, k, s, n, HAS_D_LIGHT, A)
        d_passed_next = _d_passed(d_light_ptr, d_remaining, k + 1, s + 1, n, HAS_D_LIGHT, A)
        # of the sample behind: less rounding than a sum with this sample, less this sample
        later = d_w_next * passed * stopped(x_next, A) + d_passed_next * tl.exp(-(deep + x_next))
        d_x = (d_w - d_passed) * passed - (right[:, None] + tl.cumsum(later, 1, reverse=True))
        right, right_lost = add_exactly(right, right_lost, tl.sum(later, 1))
        if NEEDS_D_SIGMA:
            width = load(t_ends_ptr + k, here, A) - load(t_starts_ptr + k, here, A)
            tl.store(d_sigma_ptr + k, d_x * width, mask=here)
        sigma = load(sigma_ptr + k, here, A)
        # a wall stays one, however thick it is
        d_width = tl.where(is_wall(sigma, A), 0.0, d_x * sigma)
        if NEEDS_D_T_STARTS:
            tl.store(d_t_starts_ptr + k, -d_width, mask=here)
        if NEEDS_D_T_ENDS:
            tl.store(d_t_ends_ptr + k, d_width, mask=here)


@triton.jit
def _d_passed(d_light_ptr, d_remaining, k, s, n, HAS_D_LIGHT: tl.constexpr, A: tl.constexpr):
    """The gradients of the light behind samples k."""
    d_light = tl.zeros(k.shape, A)
    if HAS_D_LIGHT:
        d_light = load(d_light_ptr + k + 1, s + 1 < n[:, None], A)
    return tl.where(s + 1 == n[:, None], d_remaining[:, None], d_light)


@triton.jit
def _depth(sigma_ptr, t_starts_ptr, t_ends_ptr, k, mask, A: tl.constexpr):
    """sigma dt of samples k; a wall without width is nothing."""
    sigma = load(sigma_ptr + k, mask, A)
    width = load(t_ends_ptr + k, mask, A) - load(t_starts_ptr + k, mask, A)
    nothing = is_wall(sigma, A) & (width == 0)
    x = tl.where(nothing, 0.0, tl.where(nothing, 0.0, sigma) * width)
    return tl.where(x > _OPAQUE, _OPAQUE, x)


@triton.jit
def _follows(BLOCK: tl.constexpr):
    """Samples of a block with another one before them in it."""
    return tl.arange(0, BLOCK)[None, :] > 0


def fwd(
    sigma: Tensor, t_starts: Tensor, t_ends: Tensor, offsets: Tensor, opaque_background: bool
) -> tuple[Tensor, Tensor, Tensor]:
    R, P, dtype = len(offsets) - 1, len(sigma), accumulator(sigma.dtype)
    w, transmittance, remaining = (sigma.new_empty(n, dtype=dtype) for n in (P, P, R))
    grid, tile = launch_packed(R + 2, P, sigma.dtype)
    packed_ray_weights_fwd_kernel[grid](
        w, transmittance, remaining, sigma, t_starts, t_ends, offsets, R, P,
        OPAQUE=opaque_background, **tile,
    )  # fmt: skip
    return w, transmittance, remaining


def bwd(
    d_w: Tensor | None,
    d_transmittance: Tensor | None,
    d_remaining: Tensor | None,
    sigma: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    offsets: Tensor,
    opaque_background: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    R, P = len(offsets) - 1, len(sigma)
    grads = tuple(empty_gradient(x, needs, i) for i, x in enumerate((sigma, t_starts, t_ends)))
    grid, tile = launch_packed(R + 2, P, sigma.dtype)
    absent = sigma.new_empty(0, dtype=accumulator(sigma.dtype))
    packed_ray_weights_bwd_kernel[grid](
        *grads,
        absent.new_empty(P // tile["BLOCK_S"] + 1),
        absent if d_w is None else d_w,
        absent if d_transmittance is None else d_transmittance,
        absent if d_remaining is None else d_remaining,
        sigma,
        t_starts,
        t_ends,
        offsets,
        R,
        P,
        HAS_D_W=d_w is not None,
        HAS_D_LIGHT=d_transmittance is not None,
        # there is nothing to read where there are no rays
        HAS_D_REMAINING=d_remaining is not None and R > 0,
        NEEDS_D_SIGMA=bool(needs & 1),
        NEEDS_D_T_STARTS=bool(needs & 2),
        NEEDS_D_T_ENDS=bool(needs & 4),
        OPAQUE=opaque_background,
        **tile,
        **bounded_warp(128, tile, sigma),
    )
    return grads
