# Outer bound: w_outer_i = sum of w_env over the bins from that of edge t_i to that of edge t_{i+1}.
# A program of one warp owns a ray after the other and takes BLOCK_S samples or BLOCK_E bins at a
# time. Forward: running sums of w_env, in double, go to memory of the program, which stays in the
# cache; each edge is bisected, and what lies between two is a difference. Backward: the same the
# other way, edges of the envelope among those of samples. Source: nerfstudio's `outer`,
# docs/interlevel.md.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, empty_gradient, load

# more than any GPU has at a time
_PROGRAMS = 8192
# four a thread
_MAX_BLOCK = 128


@triton.jit
def outer_bound_fwd_kernel(
    w_outer_ptr,  # [R, S]
    until_ptr,  # [programs, E]
    t_ptr,  # [R, S+1]
    t_env_ptr,  # [R, E+1]
    w_env_ptr,  # [R, E]
    R,
    S,
    E,
    t_stride_r,
    t_env_stride_r,
    OUTSIDE: tl.constexpr,
    STEPS_S: tl.constexpr,
    STEPS_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    A: tl.constexpr = w_outer_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    until_ptr += program * E
    for r in range(program, R, tl.num_programs(0)):
        t, t_env = t_ptr + r * t_stride_r, t_env_ptr + r * t_env_stride_r
        add_up(until_ptr, w_env_ptr + r * E, E, BLOCK_E)
        for start in range(0, S, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            first, behind = bins(t, start, S, t_env, E, OUTSIDE, STEPS_E, BLOCK_S, A)
            w_outer = between(until_ptr, first, behind).to(A)
            tl.store(w_outer_ptr + r * S + s, w_outer, mask=s < S)


@triton.jit
def outer_bound_bwd_kernel(
    d_w_env_ptr,  # [R, E]
    until_ptr,  # [programs, S]
    d_w_outer_ptr,  # [R, S]
    t_ptr,  # [R, S+1]
    t_env_ptr,  # [R, E+1]
    R,
    S,
    E,
    t_stride_r,
    t_env_stride_r,
    OUTSIDE: tl.constexpr,
    STEPS_S: tl.constexpr,
    STEPS_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    A: tl.constexpr = d_w_outer_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    until_ptr += program * S
    for r in range(program, R, tl.num_programs(0)):
        t, t_env = t_ptr + r * t_stride_r, t_env_ptr + r * t_env_stride_r
        add_up(until_ptr, d_w_outer_ptr + r * S, S, BLOCK_S)
        for start in range(0, E, BLOCK_E):
            k = start + tl.arange(0, BLOCK_E)
            first, behind = samples(t_env, start, E, t, S, OUTSIDE, STEPS_S, BLOCK_E, A)
            d_w_env = between(until_ptr, first, behind).to(A)
            tl.store(d_w_env_ptr + r * E + k, d_w_env, mask=k < E)


@triton.jit
def bins(
    t, start, S, t_env, E,
    OUTSIDE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The first bin that samples from `start` on touch, and the one behind the last."""
    left, right = _counts(t, start, S, t_env, E, True, STEPS, BLOCK, A)
    first = tl.minimum(tl.maximum(left - 1, 0), E if OUTSIDE == 1 else E - 1)
    return first, tl.minimum(tl.maximum(right, 1) if OUTSIDE == 0 else right, E)


@triton.jit
def samples(
    t_env, start, E, t, S,
    OUTSIDE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The first sample that touches bins from `start` on, and the one behind the last."""
    left, right = _counts(t_env, start, E, t, S, False, STEPS, BLOCK, A)
    k = start + tl.arange(0, BLOCK)
    if OUTSIDE == 0:
        left = tl.where(k == 0, 0, left)
    if OUTSIDE != 1:
        right = tl.where(k == E - 1, S, right)
    return tl.maximum(left - 1, 0), tl.minimum(right, S)


@triton.jit
def _counts(
    x_ptr, start, m, edge_ptr, n,
    RIGHT: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """count_up_to() the left and the right edges of intervals from `start` on, of m."""
    i = tl.arange(0, BLOCK)
    right = count_up_to(edge_ptr, n, load(x_ptr + start + i + 1, start + i < m, A), RIGHT, STEPS, A)
    # the right edge of one is the left one of the next
    begin = count_up_to(edge_ptr, n, tl.load(x_ptr + start).to(A), RIGHT, STEPS, A)
    return tl.where(i == 0, begin, tl.gather(right, tl.maximum(i - 1, 0), 0)), right


@triton.jit
def count_up_to(edge_ptr, n, x, RIGHT: tl.constexpr, STEPS: tl.constexpr, A: tl.constexpr):
    """How many of n + 1 edges are below x, with RIGHT also those at x. STEPS is the logarithm of
    n + 1, rounded down: none of them leads beyond the edges, whatever these are."""
    count = tl.where(_passed(edge_ptr + ((1 << STEPS) - 1), x, RIGHT, A), n + 2 - (1 << STEPS), 0)
    for i in tl.static_range(STEPS):
        half = 1 << (STEPS - 1 - i)
        count += tl.where(_passed(edge_ptr + count + (half - 1), x, RIGHT, A), half, 0)
    return count


@triton.jit
def _passed(edge_ptrs, x, RIGHT: tl.constexpr, A: tl.constexpr):
    edge = tl.load(edge_ptrs).to(A)
    return ~(edge > x) if RIGHT else edge < x


@triton.jit
def add_up(until_ptr, value_ptr, n, BLOCK: tl.constexpr):
    """Running sums of n values, each with its own, for all threads."""
    # which may still read those of the ray before
    tl.debug_barrier()
    before = tl.zeros((), tl.float64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        values = load(value_ptr + i, i < n, tl.float64)
        tl.store(until_ptr + i, before + tl.cumsum(values, 0), mask=i < n)
        before += tl.sum(values + 0.0, 0)
    tl.debug_barrier()


@triton.jit
def between(until_ptr, first, behind):
    """The sum of values first .. behind, from running sums."""
    return _up_to(until_ptr, behind) - _up_to(until_ptr, first)


@triton.jit
def _up_to(until_ptr, count):
    return tl.load(until_ptr + count - 1, mask=count > 0, other=0.0)


def launch(R: int, S: int, E: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the blocks of programs that search in histograms."""
    block_s, block_e = (min(max(triton.next_power_of_2(n), 16), _MAX_BLOCK) for n in (S, E))
    steps = {"STEPS_S": (S + 1).bit_length() - 1, "STEPS_E": (E + 1).bit_length() - 1}
    options = {"BLOCK_S": block_s, "BLOCK_E": block_e, "num_warps": 1, "enable_fp_fusion": True}
    return (min(R, _PROGRAMS),), {**steps, **options}


def fwd(t: Tensor, t_env: Tensor, w_env: Tensor, outside: int) -> Tensor:
    S, E = t.shape[-1] - 1, w_env.shape[-1]
    w_outer = t.new_empty((*t.shape[:-1], S), dtype=accumulator(t.dtype))
    R = t.numel() // (S + 1)
    grid, tile = launch(R, S, E)
    until = t.new_empty(grid[0], E, dtype=torch.float64)
    outer_bound_fwd_kernel[grid](
        w_outer, until, t, t_env, w_env, R, S, E, S + 1, E + 1, OUTSIDE=outside, **tile
    )
    return w_outer


def bwd(
    d_w_outer: Tensor, t: Tensor, t_env: Tensor, w_env: Tensor, outside: int, needs: int
) -> Tensor:
    S, E, R = t.shape[-1] - 1, w_env.shape[-1], t.numel() // t.shape[-1]
    d_w_env = empty_gradient(w_env, needs, 0)
    if needs & 1:
        grid, tile = launch(R, S, E)
        until = t.new_empty(grid[0], S, dtype=torch.float64)
        outer_bound_bwd_kernel[grid](
            d_w_env, until, d_w_outer, t, t_env, R, S, E, S + 1, E + 1, OUTSIDE=outside, **tile
        )
    return d_w_env
