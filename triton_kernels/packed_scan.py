# Running sums and products along packed rays, the formulas of csrc/cpu/packed_scan.cpp: of a
# product d_x_i = L_i B_i with L_i the product before sample i, B_i = d_y_i + x_{i+1} B_{i+1}, and
# if it is exclusive B_i = d_y_{i+1} + x_{i+1} B_{i+1}; of a sum d_x is the sum of d_y the other
# way. A program owns BLOCK_R rays and takes BLOCK_S samples of each at a time, then the long ones
# among them by themselves, in the order of the scan. Backward of a product: once against the order;
# rays of several blocks are first read in order, for the product before each block. The shifted
# loads hit the L1 cache. docs/compositing.md
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .alpha_weights import _end, _join
from .common import accumulator, add_exactly, empty_gradient, launch_packed, packed_rays

# as the op's spec counts them
_SUM = 0


@triton.jit
def packed_scan_fwd_kernel(
    y_ptr,  # [P]
    x_ptr,  # [P]
    offsets_ptr,  # [R+1]
    R,
    P,
    PRODUCT: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
):
    # one ray less: the samples before offsets[0]
    first = tl.program_id(0).to(tl.int64) * BLOCK_R - 1
    begin, n = packed_rays(offsets_ptr, first + tl.arange(0, BLOCK_R), R, P)
    short = tl.where(n <= BLOCK_LONG, n, 0)
    _scan(y_ptr, x_ptr, begin, short, PRODUCT, EXCLUSIVE, REVERSE, BLOCK_S)
    if tl.max(n, 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            begin_one, n_one = packed_rays(offsets_ptr, first + i + tl.arange(0, 1), R, P)
            n_one = tl.where(n_one > BLOCK_LONG, n_one, 0)
            _scan(y_ptr, x_ptr, begin_one, n_one, PRODUCT, EXCLUSIVE, REVERSE, BLOCK_LONG)


@triton.jit
def _scan(
    y_ptr,
    x_ptr,
    begin,
    n,
    PRODUCT: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    A: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    NOTHING: tl.constexpr = 1.0 if PRODUCT else 0.0
    before = tl.zeros(n.shape, A) + NOTHING
    lost = tl.zeros(n.shape, A)
    for b in range(tl.cdiv(tl.max(n, 0), BLOCK)):
        s = tl.cast(b, tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = _load(x_ptr, begin, n, s - (1 if EXCLUSIVE else 0), s < n[:, None], NOTHING, REVERSE, A)
        if PRODUCT:
            inside = tl.cumprod(x, 1)
            y = before[:, None] * inside
            before *= _end(inside, BLOCK)
        else:
            y = before[:, None] + tl.cumsum(x, 1)
            before, lost = add_exactly(before, lost, tl.sum(x, 1))
        tl.store(y_ptr + _sample(begin, n, s, REVERSE), y, mask=s < n[:, None])


@triton.jit
def packed_scan_bwd_kernel(
    d_x_ptr,  # [P]
    kept_ptr,  # [P // BLOCK_S + 1]
    d_y_ptr,  # [P]
    x_ptr,  # [P]
    offsets_ptr,  # [R+1]
    R,
    P,
    EXCLUSIVE: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
):
    # one ray less: the samples before offsets[0]
    first = tl.program_id(0).to(tl.int64) * BLOCK_R - 1
    begin, n = packed_rays(offsets_ptr, first + tl.arange(0, BLOCK_R), R, P)
    short = tl.where(n <= BLOCK_LONG, n, 0)
    _gradients(
        d_x_ptr, kept_ptr, d_y_ptr, x_ptr, begin, short, EXCLUSIVE, REVERSE, BLOCK_S, BLOCK_S
    )
    if tl.max(n, 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            begin_one, n_one = packed_rays(offsets_ptr, first + i + tl.arange(0, 1), R, P)
            n_one = tl.where(n_one > BLOCK_LONG, n_one, 0)
            _gradients(
                d_x_ptr, kept_ptr, d_y_ptr, x_ptr, begin_one, n_one, EXCLUSIVE, REVERSE, BLOCK_S,
                BLOCK_LONG,
            )  # fmt: skip


@triton.jit
def _gradients(
    d_x_ptr,
    kept_ptr,
    d_y_ptr,
    x_ptr,
    begin,
    n,
    EXCLUSIVE: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    A: tl.constexpr = kept_ptr.dtype.element_ty
    # the product before each block but a ray's first; rays have room for it where they begin
    place = begin // BLOCK_S - 1
    blocks = tl.cdiv(tl.max(n, 0), BLOCK)
    before = tl.zeros(n.shape, A) + 1.0
    for i in range(1, blocks):
        b = tl.cast(i, tl.int64)
        s = (b - 1) * BLOCK + tl.arange(0, BLOCK)[None, :]
        x_before = _load(x_ptr, begin, n, s - 1, s < n[:, None], 1.0, REVERSE, A)
        before *= _end(tl.cumprod(x_before, 1), BLOCK)
        tl.store(kept_ptr + place + b, before, mask=b * BLOCK < n)
    # other threads read them
    tl.debug_barrier()

    behind_block = tl.zeros(n.shape, A)
    for i in range(blocks):
        b = blocks - 1 - tl.cast(i, tl.int64)
        s = b * BLOCK + tl.arange(0, BLOCK)[None, :]
        here, followed = s < n[:, None], s + 1 < n[:, None]
        # not the first block, and one that exists
        kept = tl.minimum(b, n - b * BLOCK) > 0
        before = tl.where(kept, tl.load(kept_ptr + tl.where(kept, place + b, 0)), 1.0)
        x_before = _load(x_ptr, begin, n, s - 1, here, 1.0, REVERSE, A)
        product = before[:, None] * tl.cumprod(x_before, 1)
        x_next = _load(x_ptr, begin, n, s + 1, followed, 0.0, REVERSE, A)
        given = _load(d_y_ptr, begin, n, s + 1, followed, 0.0, REVERSE, A)
        if not EXCLUSIVE:
            given *= x_next
        scale, add = tl.associative_scan((x_next, given), 1, _join, reverse=True)
        behind = add + scale * behind_block[:, None]
        behind_block = tl.sum(tl.where(s == b * BLOCK, behind, 0.0), 1)
        if not EXCLUSIVE:
            behind += _load(d_y_ptr, begin, n, s, here, 0.0, REVERSE, A)
        tl.store(d_x_ptr + _sample(begin, n, s, REVERSE), product * behind, mask=here)


@triton.jit
def _sample(begin, n, s, REVERSE: tl.constexpr):
    """Where the samples s of rays lie, as the scan counts them."""
    if REVERSE:
        return (begin + n)[:, None] - 1 - s
    else:
        return begin[:, None] + s


@triton.jit
def _load(ptr, begin, n, s, mask, outside, REVERSE: tl.constexpr, A: tl.constexpr):
    ptrs = ptr + _sample(begin, n, s, REVERSE)
    return tl.load(ptrs, mask=mask & (s >= 0), other=outside).to(A)


def fwd(x: Tensor, offsets: Tensor, kind: int, exclusive: bool, reverse: bool) -> Tensor:
    y = x.new_empty(len(x), dtype=accumulator(x.dtype))
    _launch_scan(y, x, offsets, kind != _SUM, exclusive, reverse)
    return y


def bwd(
    d_y: Tensor,
    x: Tensor,
    offsets: Tensor,
    kind: int,
    exclusive: bool,
    reverse: bool,
    needs: int,
) -> Tensor:
    R, P = len(offsets) - 1, len(x)
    d_x = empty_gradient(x, needs, 0)
    if d_x.numel() == 0:
        return d_x
    if kind == _SUM:
        _launch_scan(d_x, d_y, offsets, False, exclusive, not reverse)
        return d_x
    grid, tile = launch_packed(R + 2, P, x.dtype)
    kept = d_y.new_empty(P // tile["BLOCK_S"] + 1)
    packed_scan_bwd_kernel[grid](
        d_x, kept, d_y, x, offsets, R, P, EXCLUSIVE=exclusive, REVERSE=reverse, **tile
    )
    return d_x


def _launch_scan(
    y: Tensor, x: Tensor, offsets: Tensor, product: bool, exclusive: bool, reverse: bool
) -> None:
    R, P = len(offsets) - 1, len(x)
    grid, tile = launch_packed(R + 2, P, x.dtype)
    packed_scan_fwd_kernel[grid](
        y, x, offsets, R, P, PRODUCT=product, EXCLUSIVE=exclusive, REVERSE=reverse, **tile
    )
