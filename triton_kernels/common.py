"""What every launch needs: the tile, the element types, the gradients that are wanted; and what
kernels on packed rays share."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LANES = 32
_LOAD_BYTES = 16
_MAX_WARPS = 4
_MIN_BLOCK = 16
# log2(e) is the sum of these, the first of them in 24 bits
_LOG2_E = tl.constexpr(1.44269502162933349609375)
_LOG2_E_REST = tl.constexpr(1.9259629911266175e-8)
_LN_2 = tl.constexpr(0.6931471805599453)


def launch(R: int, S: int, dtype: torch.dtype) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and the tile with its options, of programs that own BLOCK_R of R rays.

    A thread takes as many samples as one load of 128 bits. A warp owns whole rays where they fit,
    and scans them with no barrier; longer rays have up to 4 warps, and pass in blocks of BLOCK_S.
    """
    # distortion_loss backward on sm_90, S = 100: 64 registers and no barrier; with 4 warps and two
    # loads a thread 176 registers and 14 barriers
    of_a_warp = _LANES * _LOAD_BYTES // accumulator(dtype).itemsize
    block_s = min(max(triton.next_power_of_2(S), _MIN_BLOCK), _MAX_WARPS * of_a_warp)
    warps = max(block_s // of_a_warp, 1)
    block_r = warps * of_a_warp // block_s
    # fused multiply-adds are asked for, as their default changes between triton 3.9 and 3.10
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return (triton.cdiv(R, block_r),), {"BLOCK_R": block_r, "BLOCK_S": block_s, **options}


def launch_packed(R: int, P: int, dtype: torch.dtype) -> tuple[tuple[int], dict[str, Any]]:
    """The same for R packed rays of P samples in all: a tile that suits the average ray.

    Rays of more than BLOCK_LONG samples have a program's tiles to themselves, one after the other.
    """
    grid, tile = launch(R, triton.cdiv(P, max(R, 1)), dtype)
    # 8 samples a thread; 16 took 217 registers where these take 95 (sm_90)
    return grid, {**tile, "BLOCK_LONG": 2 * tile["BLOCK_R"] * tile["BLOCK_S"]}


def bounded(registers: int, x: Tensor) -> dict[str, int]:
    """The option that bounds the registers of a thread, which only NVIDIA's compiler has.

    Left to itself ptxas aims at a number of registers with which more warps are resident, and
    spills some bytes for it; bound to that number it finds a way without.
    """
    return {} if torch.version.hip or x.is_xpu else {"maxnreg": registers}


def bounded_warp(registers: int, tile: dict[str, Any], x: Tensor) -> dict[str, int]:
    """The same for tiles of one warp in 32 bits; other tiles take more than such a bound."""
    fits = tile["num_warps"] == 1 and accumulator(x.dtype) == torch.float32
    return bounded(registers, x) if fits else {}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums, and losses, have."""
    return torch.promote_types(dtype, torch.float32)


def empty_gradient(x: Tensor, needs: int, i: int) -> Tensor:
    """The gradient of x, uninitialised, or an empty tensor where bit `i` of `needs` is not set."""
    return torch.empty_like(x) if needs >> i & 1 else x.new_empty(0)


@triton.jit
def packed_rays(offsets_ptr, r, R, P):
    """Where rays r begin and how many samples they have, within P whatever the offsets.

    Rays -1 and R are the samples before offsets[0] and from offsets[R] on, of which there are none
    unless the offsets are wrong: with them every sample is in a ray, as offsets rise through it.
    """
    begin = tl.load(offsets_ptr + tl.minimum(tl.maximum(r, 0), R))
    end = tl.load(offsets_ptr + tl.minimum(r + 1, R))
    begin = tl.where(r < 0, 0, tl.minimum(tl.maximum(begin, 0), P))
    end = tl.where(r < R, tl.minimum(end, P), P)
    return begin, tl.where(r <= R, tl.maximum(end - begin, 0), 0)


@triton.jit
def packed_values(ptr, r, R):
    """A value of each ray; 0 for those that are none."""
    value = tl.load(ptr + tl.minimum(tl.maximum(r, 0), R - 1))
    return tl.where((r >= 0) & (r < R), value, 0.0)


@triton.jit
def add_exactly(total, lost, x):
    """A running sum and what it rounds off, which is added with the next term."""
    term = x - lost
    after = total + term
    return after, (after - total) - term


# ---- samples along rays, in tiles [rays, samples]


@triton.jit
def load(ptrs, mask, A: tl.constexpr):
    return tl.load(ptrs, mask=mask, other=0.0).to(A)


@triton.jit
def sums_of_loaded(x):
    """The sums of samples as they were loaded, which a loop adds up and reads on its way.

    Triton before 3.9 takes such a sum out of the loop as if nothing read it there, or stops at an
    assertion (triton-lang/triton, issue 11836): only of values that come straight from a load.
    """
    return tl.sum(x + 0.0, 1)


@triton.jit
def optical_depth(sigma_ptrs, t_ptrs, s, mask, A: tl.constexpr):
    """sigma dt of samples s; a wall without width is nothing."""
    sigma = load(sigma_ptrs + s, mask, A)
    width = load(t_ptrs + s + 1, mask, A) - load(t_ptrs + s, mask, A)
    nothing = is_wall(sigma, A) & (width == 0)
    return tl.where(nothing, 0.0, tl.where(nothing, 0.0, sigma) * width)


@triton.jit
def is_wall(sigma, A: tl.constexpr):
    return sigma > _most(A)


@triton.jit
def _most(A: tl.constexpr):
    if tl.float64 == A:
        return 1.7976931348623157e308
    else:
        return 3.4028234663852886e38


@triton.jit
def stopped(x, A: tl.constexpr):
    """1 - exp(-x) without cancellation: x (1 - x/2 (1 - x/3 (1 - ...))) where x is small."""
    TERMS: tl.constexpr = 16 if tl.float64 == A else 8
    small = tl.minimum(x, 0.5)
    series = small * 0.0 + 1.0
    for i in tl.static_range(TERMS - 1):
        series = 1.0 - small * series * (1.0 / (TERMS - i))
    return tl.where(x < 0.5, x * series, 1.0 - tl.exp(-x))


@triton.jit
def ratio(x, y, A: tl.constexpr):
    """x / y rounded once, of which triton's own is two units of the last digit off in 32 bits."""
    if tl.float64 == A:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def light_at(depth, A: tl.constexpr):
    """exp(-depth), of which triton's own loses digits in 32 bits as depth grows: it rounds the
    product with log2(e) to a value whose last digit is 4e-6 at a depth of 60."""
    if tl.float64 == A:
        return tl.exp(-depth)
    else:
        # beyond it is 0 or infinite, and so would be both terms of a difference
        x = -tl.clamp(depth, -150.0, 150.0, propagate_nan=tl.PropagateNan.ALL)
        rounded = x * _LOG2_E
        lost = tl.fma(x, _LOG2_E, -rounded) + x * _LOG2_E_REST
        return tl.exp2(rounded) * (1.0 + lost * _LN_2)


@triton.jit
def of_block(values, block, b):
    """Values [rays] of block b, of those [rays, blocks] that are kept."""
    return tl.sum(tl.where(block == b, values, 0.0), 1)
