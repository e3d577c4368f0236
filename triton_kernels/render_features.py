# Feature rendering, features = sum_s w_s f_s; d_w_s = <d_features, f_s>, d_f_s = w_s d_features.
# A program owns BLOCK_R rays with all their channels and takes BLOCK_S samples of each at a time.
# Forward: once over f, with a sum for each place of the tile, which are added up at the end.
# Backward: once over f, or not at all where no gradient to w is wanted.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, empty_gradient

_WARPS = 4
_MAX_WARPS = 16
# bytes in the accumulator's type. 128 a thread: four rows of 1024 channels share the barriers of
# their reduction
_OF_A_WARP = 4096
# fewer of short rows, whose values have an address each: 3 channels took 190 registers (sm_90), and
# spilled (gfx942)
_SHORT_ROW = 32
_OF_A_WARP_SHORT = 1024


@triton.jit
def render_features_fwd_kernel(
    features_ptr,  # [R, C]
    w_ptr,  # [R, S]
    f_ptr,  # [R, S, C]
    R,
    S,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    A: tl.constexpr = features_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = channels(0, BLOCK_C)
    features = rendered(w_ptr, f_ptr, r, c, R, S, C, A, BLOCK_R, BLOCK_S, BLOCK_C)
    here = (r < R)[:, None] & (c < C)[None, :]
    tl.store(features_ptr + (r * C)[:, None] + c[None, :], features, mask=here)


@triton.jit
def render_features_bwd_kernel(
    d_w_ptr,  # [R, S]
    d_f_ptr,  # [R, S, C]
    d_features_ptr,  # [R, C]
    w_ptr,  # [R, S]
    f_ptr,  # [R, S, C]
    R,
    S,
    C,
    NEEDS_D_W: tl.constexpr,
    NEEDS_D_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = channels(0, BLOCK_C)
    here = (r < R)[:, None] & (c < C)[None, :]
    g = tl.load(d_features_ptr + (r * C)[:, None] + c[None, :], mask=here, other=0.0)
    spread(d_w_ptr, d_f_ptr, g, w_ptr, f_ptr, r, c, R, S, C, NEEDS_D_W, NEEDS_D_F, BLOCK_S)


@triton.jit
def channels(first, BLOCK_C: tl.constexpr):
    """Channels, of which a thread has four neighbours at most.

    As many of halves as of floats, else their sums would come out in another order: those of halves
    are those of floats to the bit, for which nothing is fused either but by name.
    """
    return first + tl.max_contiguous(tl.arange(0, BLOCK_C), min(BLOCK_C, 4))


@triton.jit
def rendered(
    w_ptr,
    f_ptr,
    r,
    c,
    R,
    S,
    C,
    A: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """sum_s w_s f_s of rays r, [BLOCK_R, BLOCK_C]."""
    sums = tl.zeros([BLOCK_R, BLOCK_S, BLOCK_C], A)
    for start in range(0, S, BLOCK_S):
        row, sample, value = places(r, c, start, R, S, C, BLOCK_S)
        w = tl.load(w_ptr + row, mask=sample, other=0.0).to(A)
        f = tl.load(f_ptr + (row * C)[:, :, None] + c[None, None, :], mask=value, other=0.0)
        sums = tl.fma(w[:, :, None], f.to(A), sums)
    return tl.sum(sums, 1)


@triton.jit
def spread(
    d_w_ptr,
    d_f_ptr,
    g,
    w_ptr,
    f_ptr,
    r,
    c,
    R,
    S,
    C,
    NEEDS_D_W: tl.constexpr,
    NEEDS_D_F: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """d_w_s = <g, f_s> and d_f_s = w_s g of rays r, with g [BLOCK_R, BLOCK_C]."""
    for start in range(0, S, BLOCK_S):
        row, sample, value = places(r, c, start, R, S, C, BLOCK_S)
        at = (row * C)[:, :, None] + c[None, None, :]
        # the other way round ptxas spills for sm_100
        if NEEDS_D_F:
            w = tl.load(w_ptr + row, mask=sample, other=0.0).to(g.dtype)
            tl.store(d_f_ptr + at, w[:, :, None] * g[:, None, :], mask=value)
        if NEEDS_D_W:
            f = tl.load(f_ptr + at, mask=value, other=0.0).to(g.dtype)
            tl.store(d_w_ptr + row, tl.sum(g[:, None, :] * f, 2), mask=sample)


@triton.jit
def places(r, c, start, R, S, C, BLOCK_S: tl.constexpr):
    """The rows of all samples of a tile, and which of them, and of their channels, exist."""
    s = start + tl.arange(0, BLOCK_S)
    sample = (r < R)[:, None] & (s < S)[None, :]
    return (r * S)[:, None] + s[None, :], sample, sample[:, :, None] & (c < C)[None, None, :]


def launch(R: int, S: int, C: int, dtype: torch.dtype) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and the tile with its options."""
    block_c = triton.next_power_of_2(max(C, 1))
    of_a_warp = _OF_A_WARP_SHORT if block_c < _SHORT_ROW else _OF_A_WARP
    of_a_warp //= accumulator(dtype).itemsize
    size = _WARPS * of_a_warp
    block_s = max(min(triton.next_power_of_2(max(S, 1)), size // block_c), 1)
    block_r = max(size // (block_c * block_s), 1)
    warps = min(block_r * block_s * block_c // of_a_warp, _MAX_WARPS)
    tile = {"BLOCK_R": block_r, "BLOCK_S": block_s, "BLOCK_C": block_c}
    return (triton.cdiv(R, block_r),), {**tile, "num_warps": warps, "enable_fp_fusion": False}


def fwd(w: Tensor, f: Tensor) -> Tensor:
    S, C = f.shape[-2:]
    features = w.new_empty((*w.shape[:-1], C), dtype=accumulator(w.dtype))
    R = w.shape[:-1].numel()
    grid, tile = launch(R, S, C, w.dtype)
    render_features_fwd_kernel[grid](features, w, f, R, S, C, **tile)
    return features


def bwd(d_features: Tensor, w: Tensor, f: Tensor, needs: int) -> tuple[Tensor, Tensor]:
    S, C = f.shape[-2:]
    d_w, d_f = empty_gradient(w, needs, 0), empty_gradient(f, needs, 1)
    R = w.shape[:-1].numel()
    grid, tile = launch(R, S, C, w.dtype)
    render_features_bwd_kernel[grid](
        d_w,
        d_f,
        d_features,
        w,
        f,
        R,
        S,
        C,
        NEEDS_D_W=bool(needs & 1),
        NEEDS_D_F=bool(needs & 2),
        **tile,
    )
    return d_w, d_f
