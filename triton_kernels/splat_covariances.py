# Covariances of splats, the formulas of csrc/cpu/splat_covariances.cpp: R diag(e)^2 R^T with R the
# rotation by a quaternion and e the extents, or one by them. A program owns BLOCK splats, whose
# values are loads of their own, which hit the L1 cache.
# Backward, with G the gradient plus its transpose and B = R^T G R: d_e_j = B_jj e_j, and turning
# about the splat's own axes x, y, z adds B_yz (e_y^2 - e_z^2), ... to the loss. docs/splats.md
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, empty_gradient, ratio

_BLOCK = 128
# fused multiply-adds are asked for, as their default changes between triton 3.9 and 3.10
_OPTIONS = {"BLOCK": _BLOCK, "enable_fp_fusion": True}


@triton.jit
def _splats(R, BLOCK: tl.constexpr):
    """A program's splats, and which of them exist."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return n, n < R


@triton.jit
def _values(ptr, n, exists, COUNT: tl.constexpr, A: tl.constexpr):
    """The values of each splat."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.load(ptr + COUNT * n + i, mask=exists, other=0.0).to(A),)
    return found


@triton.jit
def _rotation(q, A: tl.constexpr):
    """Row by row, and 2 / |q|^2, 0 for a quaternion without length."""
    w, x, y, z = q
    length2 = w * w + x * x + y * y + z * z
    still = length2 < (2.2250738585072014e-308 if tl.float64 == A else 1.1754943508222875e-38)
    turn = tl.where(still, 0.0, 2 * ratio(1.0, tl.where(still, 1.0, length2), A))
    rotation = (
        1 - turn * (y * y + z * z),
        turn * (x * y - w * z),
        turn * (x * z + w * y),
        turn * (x * y + w * z),
        1 - turn * (x * x + z * z),
        turn * (y * z - w * x),
        turn * (x * z - w * y),
        turn * (y * z + w * x),
        1 - turn * (x * x + y * y),
    )
    return rotation, turn


@triton.jit
def _extents(s, INVERSE: tl.constexpr, A: tl.constexpr):
    found = ()
    for j in tl.static_range(3):
        if INVERSE:
            flat = s[j] == 0
            found = found + (tl.where(flat, 0.0, ratio(1.0, tl.where(flat, 1.0, s[j]), A)),)
        else:
            found = found + (s[j],)
    return found


@triton.jit
def splat_covariances_fwd_kernel(
    covariances_ptr,  # [R, 6 or 9]
    quats_ptr,  # [R, 4]
    scales_ptr,  # [R, 3]
    R,
    INVERSE: tl.constexpr,
    TRIU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    A: tl.constexpr = covariances_ptr.dtype.element_ty
    n, exists = _splats(R, BLOCK)
    rotation, _turn = _rotation(_values(quats_ptr, n, exists, 4, A), A)
    e = _extents(_values(scales_ptr, n, exists, 3, A), INVERSE, A)
    axes = ()
    for i in tl.static_range(9):
        axes = axes + (rotation[i] * e[i % 3],)
    for i in tl.static_range(3):
        for k in tl.static_range(i, 3):
            entry = axes[3 * i] * axes[3 * k] + axes[3 * i + 1] * axes[3 * k + 1]
            entry += axes[3 * i + 2] * axes[3 * k + 2]
            if TRIU:
                place = i * (5 - i) // 2 + k
                tl.store(covariances_ptr + 6 * n + place, entry, mask=exists)
            else:
                tl.store(covariances_ptr + 9 * n + 3 * i + k, entry, mask=exists)
                if i != k:
                    tl.store(covariances_ptr + 9 * n + 3 * k + i, entry, mask=exists)


@triton.jit
def splat_covariances_bwd_kernel(
    d_quats_ptr,  # [R, 4]
    d_scales_ptr,  # [R, 3]
    d_covariances_ptr,  # [R, 6 or 9]
    quats_ptr,  # [R, 4]
    scales_ptr,  # [R, 3]
    R,
    INVERSE: tl.constexpr,
    TRIU: tl.constexpr,
    NEEDS_D_QUATS: tl.constexpr,
    NEEDS_D_SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    A: tl.constexpr = d_covariances_ptr.dtype.element_ty
    n, exists = _splats(R, BLOCK)
    q = _values(quats_ptr, n, exists, 4, A)
    rotation, turn = _rotation(q, A)
    e = _extents(_values(scales_ptr, n, exists, 3, A), INVERSE, A)
    if TRIU:
        xx, xy, xz, yy, yz, zz = _values(d_covariances_ptr, n, exists, 6, A)
        g = (2 * xx, xy, xz, xy, 2 * yy, yz, xz, yz, 2 * zz)
    else:
        d = _values(d_covariances_ptr, n, exists, 9, A)
        g = ()
        for i in tl.static_range(9):
            g = g + (d[i] + d[i % 3 * 3 + i // 3],)
    turned = ()
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            turned = turned + (_product(g[3 * i], g[3 * i + 1], g[3 * i + 2], rotation, j),)
    if NEEDS_D_QUATS:
        w, x, y, z = q
        a = _along(rotation, turned, 1, 2) * ((e[1] - e[2]) * (e[1] + e[2]))
        b = _along(rotation, turned, 0, 2) * ((e[2] - e[0]) * (e[2] + e[0]))
        c = _along(rotation, turned, 0, 1) * ((e[0] - e[1]) * (e[0] + e[1]))
        to = d_quats_ptr + 4 * n
        tl.store(to, -turn * (x * a + y * b + z * c), mask=exists)
        tl.store(to + 1, turn * (w * a + y * c - z * b), mask=exists)
        tl.store(to + 2, turn * (w * b + z * a - x * c), mask=exists)
        tl.store(to + 3, turn * (w * c + x * b - y * a), mask=exists)
    if NEEDS_D_SCALES:
        for j in tl.static_range(3):
            d_e = _along(rotation, turned, j, j) * e[j]
            if INVERSE:
                d_e = -d_e * e[j] * e[j]
            tl.store(d_scales_ptr + 3 * n + j, d_e, mask=exists)


@triton.jit
def _product(x, y, z, matrix, j: tl.constexpr):
    """A row times column j."""
    return x * matrix[j] + y * matrix[3 + j] + z * matrix[6 + j]


@triton.jit
def _along(rotation, turned, i: tl.constexpr, j: tl.constexpr):
    """Entry i, j of R^T G R, from R and G R."""
    return _product(rotation[i], rotation[3 + i], rotation[6 + i], turned, j)


def fwd(quats: Tensor, scales: Tensor, inverse: bool, triu: bool) -> Tensor:
    R = quats.shape[:-1].numel()
    shape = (*quats.shape[:-1], 6 if triu else 9)
    covariances = quats.new_empty(shape, dtype=accumulator(quats.dtype))
    splat_covariances_fwd_kernel[(triton.cdiv(R, _BLOCK),)](
        covariances, quats, scales, R, INVERSE=inverse, TRIU=triu, **_OPTIONS
    )
    return covariances


def bwd(
    d_covariances: Tensor, quats: Tensor, scales: Tensor, inverse: bool, triu: bool, needs: int
) -> tuple[Tensor, Tensor]:
    R = quats.shape[:-1].numel()
    d_quats, d_scales = empty_gradient(quats, needs, 0), empty_gradient(scales, needs, 1)
    splat_covariances_bwd_kernel[(triton.cdiv(R, _BLOCK),)](
        d_quats,
        d_scales,
        d_covariances,
        quats,
        scales,
        R,
        INVERSE=inverse,
        TRIU=triu,
        NEEDS_D_QUATS=bool(needs & 1),
        NEEDS_D_SCALES=bool(needs & 2),
        **_OPTIONS,
    )
    return d_quats, d_scales
