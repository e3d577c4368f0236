"""What every launch needs: the tile, the element types, the gradients that are wanted."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

_LANES = 32
_LOAD_BYTES = 16
_MAX_WARPS = 4
_MIN_BLOCK = 16


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


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums, and losses, have."""
    return torch.promote_types(dtype, torch.float32)


def empty_gradient(x: Tensor, needs: int, i: int) -> Tensor:
    """The gradient of x, uninitialised, or an empty tensor where bit `i` of `needs` is not set."""
    return torch.empty_like(x) if needs >> i & 1 else x.new_empty(0)
