# Outer bound: w_outer_i = sum of w_env over the bins from that of edge t_i to that of edge t_{i+1}.
# A program owns BLOCK_R rays and compares BLOCK_S samples of each with BLOCK_E bins at a time: the
# bins from env_k <= t_{i+1} to env_{k+1} > t_i are those that searchsorted gives. So nothing is
# subtracted, and a gradient is the same sum the other way. Rays of several blocks only compare
# blocks that meet, which a bisection finds. Source: nerfstudio's `outer`, docs/interlevel.md.
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, empty_gradient

# comparisons at once: 4096 spill the masks on gfx942
_TILE = 2048
_MAX_BLOCK_S = 64
_BLOCK_E = 16


@triton.jit
def outer_bound_fwd_kernel(
    w_outer_ptr,  # [R, S]
    t_ptr,  # [R, S+1]
    t_env_ptr,  # [R, E+1]
    w_env_ptr,  # [R, E]
    R,
    S,
    E,
    t_stride_r,
    t_env_stride_r,
    OUTSIDE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    A: tl.constexpr = w_outer_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    ray = r < R
    t_ptrs, t_env_ptrs = t_ptr + r * t_stride_r, t_env_ptr + r * t_env_stride_r
    until = tl.zeros([BLOCK_R, 1], tl.int32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[None, :]
        here = ray & (s < S)
        behind = tl.minimum(start + BLOCK_S, S)
        first, last, until = blocks_that_meet(
            t_env_ptrs, E, t_ptrs, behind, S, until, ray, True, ONE_BLOCK, STEPS, BLOCK_E, A
        )
        w_outer = bound(
            t_ptrs, s, here, t_env_ptrs, w_env_ptr + r * E, ray, E, first, last, OUTSIDE, BLOCK_E, A
        )
        tl.store(w_outer_ptr + r * S + s, w_outer, mask=here)


@triton.jit
def outer_bound_bwd_kernel(
    d_w_env_ptr,  # [R, E]
    d_w_outer_ptr,  # [R, S]
    t_ptr,  # [R, S+1]
    t_env_ptr,  # [R, E+1]
    R,
    S,
    E,
    t_stride_r,
    t_env_stride_r,
    OUTSIDE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    A: tl.constexpr = d_w_outer_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    ray = r < R
    t_ptrs, t_env_ptrs = t_ptr + r * t_stride_r, t_env_ptr + r * t_env_stride_r
    until = tl.zeros([BLOCK_R, 1], tl.int32)
    for start in range(0, E, BLOCK_E):
        k = start + tl.arange(0, BLOCK_E)[None, :]
        d_w_env = tl.zeros([BLOCK_R, BLOCK_E], A)
        behind = tl.minimum(start + BLOCK_E, E)
        first, last, until = blocks_that_meet(
            t_ptrs, S, t_env_ptrs, behind, E, until, ray, False, ONE_BLOCK, STEPS, BLOCK_S, A
        )
        for block in range(first, last, BLOCK_S):
            s = block + tl.arange(0, BLOCK_S)[None, :]
            here = ray & (s < S)
            d_w_outer = load(d_w_outer_ptr + r * S + s, here, A)
            met = touched(t_ptrs, s, here, t_env_ptrs, k, ray, E, OUTSIDE, A)
            d_w_env += tl.sum(tl.where(met, d_w_outer[:, :, None], 0.0), 1)
        tl.store(d_w_env_ptr + r * E + k, d_w_env, mask=ray & (k < E))


@triton.jit
def load(ptrs, mask, A: tl.constexpr):
    return tl.load(ptrs, mask=mask, other=0.0).to(A)


@triton.jit
def touched(t_ptrs, s, here, t_env_ptrs, k, ray, E, OUTSIDE: tl.constexpr, A: tl.constexpr):
    """Whether sample s has its bound from bin k: [BLOCK_R, BLOCK_S, BLOCK_E]."""
    left, right = load(t_ptrs + s, here, A), load(t_ptrs + s + 1, here, A)
    bins = ray & (k < E)
    env_left, env_right = load(t_env_ptrs + k, bins, A), load(t_env_ptrs + k + 1, bins, A)
    begins = ~(env_left[:, None, :] > right[:, :, None])
    ends = env_right[:, None, :] > left[:, :, None]
    if OUTSIDE == 0:
        begins = begins | (k == 0)[:, None, :]
    if OUTSIDE != 1:
        ends = ends | (k == E - 1)[:, None, :]
    return begins & ends


@triton.jit
def bound(
    t_ptrs,
    s,
    here,
    t_env_ptrs,
    w_env_ptrs,
    ray,
    E,
    first,
    last,
    OUTSIDE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    A: tl.constexpr,
):
    """w_outer of samples s, from the bins first .. last."""
    w_outer = tl.zeros(here.shape, A)
    for block in range(first, last, BLOCK_E):
        k = block + tl.arange(0, BLOCK_E)[None, :]
        w_env = load(w_env_ptrs + k, ray & (k < E), A)
        met = touched(t_ptrs, s, here, t_env_ptrs, k, ray, E, OUTSIDE, A)
        w_outer += tl.sum(tl.where(met, w_env[:, None, :], 0.0), 2)
    return w_outer


@triton.jit
def blocks_that_meet(
    edge_ptrs,
    n,
    block_ptrs,
    behind,
    end,
    until,
    ray,
    RIGHT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    OTHER_BLOCK: tl.constexpr,
    A: tl.constexpr,
):
    """Of n intervals between edges, the first and last that the block that ends at `behind` can
    touch in any of the rays; all of them where it is the only block. `until` is what
    the block before returned, 0 before the first: where this one's search begins."""
    first, last = 0, n
    if not ONE_BLOCK:
        # an interval outside may be taken to the first or the last one
        first = tl.maximum(tl.min(until) - 1, 0)
        first = tl.minimum(first, n - 1) // OTHER_BLOCK * OTHER_BLOCK
        x = load(block_ptrs + behind, ray, A)
        until = count_up_to(edge_ptrs, n, x, ray, RIGHT, STEPS, A)
        last = tl.maximum(tl.max(tl.where(behind < end, until, n)), tl.minimum(n, 1))
        last = tl.minimum(last, n)
    return first, last, until


@triton.jit
def count_up_to(edge_ptrs, n, x, ray, RIGHT: tl.constexpr, STEPS: tl.constexpr, A: tl.constexpr):
    """How many of the n + 1 edges are below x, with RIGHT also those at x."""
    end = tl.zeros(x.shape, tl.int32) + n + 1
    begin = tl.zeros_like(end)
    for _ in range(STEPS):
        middle = begin + (end - begin) // 2
        searching = begin < end
        edge = load(edge_ptrs + middle, ray & searching, A)
        goes_on = ~(edge > x) if RIGHT else edge < x
        begin = tl.where(searching & goes_on, middle + 1, begin)
        end = tl.where(searching & ~goes_on, middle, end)
    return begin


def launch(R: int, S: int, E: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the tile of programs that compare samples with bins."""
    block_s = min(max(triton.next_power_of_2(S), 16), _MAX_BLOCK_S)
    block_r = _TILE // (block_s * _BLOCK_E)
    one_block = block_s >= S
    # bisections take registers: with 4 warps a kernel of long rays spills (sm_100), with 8 none
    options = {"num_warps": 4 if one_block else 8, "enable_fp_fusion": True}
    tile = {"BLOCK_R": block_r, "BLOCK_S": block_s, "BLOCK_E": _BLOCK_E}
    more = {"ONE_BLOCK": one_block, "STEPS": max(S, E).bit_length() + 1}
    return (triton.cdiv(R, block_r),), {**tile, **more, **options}


def fwd(t: Tensor, t_env: Tensor, w_env: Tensor, outside: int) -> Tensor:
    S, E = t.shape[-1] - 1, w_env.shape[-1]
    w_outer = t.new_empty((*t.shape[:-1], S), dtype=accumulator(t.dtype))
    R = t.numel() // (S + 1)
    grid, tile = launch(R, S, E)
    outer_bound_fwd_kernel[grid](
        w_outer, t, t_env, w_env, R, S, E, S + 1, E + 1, OUTSIDE=outside, **tile
    )
    return w_outer


def bwd(
    d_w_outer: Tensor, t: Tensor, t_env: Tensor, w_env: Tensor, outside: int, needs: int
) -> Tensor:
    S, E, R = t.shape[-1] - 1, w_env.shape[-1], t.numel() // t.shape[-1]
    d_w_env = empty_gradient(w_env, needs, 0)
    if needs & 1:
        grid, tile = launch(R, S, E)
        outer_bound_bwd_kernel[grid](
            d_w_env, d_w_outer, t, t_env, R, S, E, S + 1, E + 1, OUTSIDE=outside, **tile
        )
    return d_w_env
