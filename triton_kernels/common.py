"""What every launch needs: the tile, the element types, the gradients that are wanted."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

# fused multiply-adds are pinned: their default changes between triton 3.9 and 3.10
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}
# two 128-bit loads for each of 128 threads; twice as many took 216 registers in float64
_TILE_BYTES = 4096
_SMALLEST_BLOCK = 16


def tile(S: int, dtype: torch.dtype) -> tuple[int, int]:
    """BLOCK_R, BLOCK_S: a whole ray where it fits, and as many rays as fill the tile."""
    values = _TILE_BYTES // accumulator(dtype).itemsize
    block_s = min(max(triton.next_power_of_2(S), _SMALLEST_BLOCK), values)
    return values // block_s, block_s


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums, and losses, have."""
    return torch.promote_types(dtype, torch.float32)


def empty_gradient(x: Tensor, needs: int, i: int) -> Tensor:
    """The gradient of x, uninitialised, or an empty tensor where bit `i` of `needs` is not set."""
    return torch.empty_like(x) if needs >> i & 1 else x.new_empty(0)
