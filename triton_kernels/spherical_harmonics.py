# Colours of splats, the formulas of csrc/cpu/spherical_harmonics.cpp: color_d = sum_k Y_k(u)
# coeff_kd with u = dir / |dir|, of C cameras that share the coefficients. A program owns BLOCK_N
# splats and goes over BLOCK_D channels at a time.
# Backward, with g the gradient of a colour, in the order of cameras: d_coeff_kd = sum_c Y_k g_d,
# then d_dir = (d_u - <d_u, u> u) / |dir| with d_u = sum_k <coeff_k, g> grad Y_k. docs/splats.md
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, empty_gradient, ratio

_MOST_CHANNELS = 32
_TILE = 128
# of l and m, number l (l + 1) / 2 + m: the factors of z^(l-m), z^(l-m-2), z^(l-m-4)
_FACTORS = tl.constexpr(
    (
        *(0.28209479177387814, 0.0, 0.0),
        *(0.4886025119029199, 0.0, 0.0),
        *(-0.4886025119029199, 0.0, 0.0),
        *(0.9461746957575601, -0.31539156525252005, 0.0),
        *(-1.0925484305920792, 0.0, 0.0),
        *(0.5462742152960396, 0.0, 0.0),
        *(1.865881662950577, -1.1195289977703462, 0.0),
        *(-2.285228997322329, 0.4570457994644658, 0.0),
        *(1.445305721320277, 0.0, 0.0),
        *(-0.5900435899266435, 0.0, 0.0),
        *(3.702494142032151, -3.1735664074561293, 0.31735664074561293),
        *(-4.683325804901024, 2.0071396306718676, 0.0),
        *(3.3116114351514603, -0.47308734787878004, 0.0),
        *(-1.7701307697799304, 0.0, 0.0),
        *(0.6258357354491761, 0.0, 0.0),
    )
)


@triton.jit
def _legendre(z, L: tl.constexpr, M: tl.constexpr):
    """The polynomial of l and m, and its slope."""
    AT: tl.constexpr = 3 * (L * (L + 1) // 2 + M)
    POWER: tl.constexpr = L - M
    value = z * 0.0 + _FACTORS[AT]
    slope = z * 0.0 + POWER * _FACTORS[AT]
    if POWER >= 2:
        value = value * (z * z) + _FACTORS[AT + 1]
    if POWER >= 3:
        slope = slope * (z * z) + (POWER - 2) * _FACTORS[AT + 1]
    if POWER >= 4:
        value = value * (z * z) + _FACTORS[AT + 2]
    if POWER % 2 == 1:
        value = value * z
    else:
        slope = slope * z
    return value, slope


@triton.jit
def _powers(x, y, DEGREE: tl.constexpr):
    """c_m and s_m of (x + i y)^m = c_m + i s_m."""
    c = x * 0.0 + 1.0
    s = x * 0.0
    powers = ((c, s),)
    for m in tl.static_range(DEGREE):  # noqa: B007
        c, s = x * c - y * s, x * s + y * c
        powers = powers + ((c, s),)
    return powers


@triton.jit
def _harmonics(x, y, z, DEGREE: tl.constexpr):
    """All Y_k."""
    powers = _powers(x, y, DEGREE)
    found = ()
    for l in tl.static_range(DEGREE + 1):
        for i in tl.static_range(2 * l + 1):
            if i < l:
                value, _slope = _legendre(z, l, l - i)
                found = found + (value * powers[l - i][1],)
            else:
                value, _slope = _legendre(z, l, i - l)
                found = found + (value * powers[i - l][0],)
    return found


@triton.jit
def _add_gradient(d_x, d_y, d_z, x, y, z, d_Y, DEGREE: tl.constexpr):
    """(d_x, d_y, d_z) and sum_k d_Y_k grad Y_k; c_m and s_m change as m c_(m-1) and m s_(m-1)."""
    powers = _powers(x, y, DEGREE)
    for m in tl.static_range(DEGREE + 1):
        c, s = powers[m]
        d_c = z * 0.0
        d_s = z * 0.0
        for l in tl.static_range(m, DEGREE + 1):
            value, slope = _legendre(z, l, m)
            up = d_Y[l * l + l + m]
            d_z += slope * (c * up)
            d_c += value * up
            if m > 0:
                down = d_Y[l * l + l - m]
                d_z += slope * (s * down)
                d_s += value * down
        if m > 0:
            before, behind = powers[m - 1]
            d_x += m * (before * d_c + behind * d_s)
            d_y += m * (before * d_s - behind * d_c)
    return d_x, d_y, d_z


@triton.jit
def _unit(dirs_ptr, masks_ptr, at, exists, HAS_MASKS: tl.constexpr, A: tl.constexpr):
    """Unit vectors, the lengths before, and which splats are seen; 0 for those that are not, and
    for a direction without length."""
    seen = exists
    if HAS_MASKS:
        seen = seen & (tl.load(masks_ptr + at, mask=exists, other=0) != 0)
    x = tl.load(dirs_ptr + 3 * at, mask=seen, other=0.0).to(A)
    y = tl.load(dirs_ptr + 3 * at + 1, mask=seen, other=0.0).to(A)
    z = tl.load(dirs_ptr + 3 * at + 2, mask=seen, other=0.0).to(A)
    length2 = x * x + y * y + z * z
    nowhere = length2 < (2.2250738585072014e-308 if tl.float64 == A else 1.1754943508222875e-38)
    length = tl.where(nowhere, 1.0, tl.sqrt(tl.where(nowhere, 1.0, length2)))
    x = tl.where(nowhere, 0.0, ratio(x, length, A))
    y = tl.where(nowhere, 0.0, ratio(y, length, A))
    z = tl.where(nowhere, 0.0, ratio(z, length, A))
    return x, y, z, length, nowhere, seen


@triton.jit
def _rows(N, BLOCK_N: tl.constexpr):
    """A program's row, its splats in it, and which of them exist."""
    program = tl.program_id(0).to(tl.int64)
    blocks = (N + BLOCK_N - 1) // BLOCK_N
    n = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    return program // blocks, n, n < N


@triton.jit
def spherical_harmonics_fwd_kernel(
    colors_ptr,  # [R, C, N, D]
    dirs_ptr,  # [R, C, N, 3]
    coeffs_ptr,  # [R, N, K, D]
    masks_ptr,  # [R, C, N]
    C,
    N,
    K,
    D,
    DEGREE: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    A: tl.constexpr = colors_ptr.dtype.element_ty
    r, n, exists = _rows(N, BLOCK_N)
    coeff_ptrs = (coeffs_ptr + (r * N + n) * K * D)[:, None]
    for camera in range(C):
        at = (r * C + camera) * N + n
        x, y, z, _length, _nowhere, seen = _unit(dirs_ptr, masks_ptr, at, exists, HAS_MASKS, A)
        Y = _harmonics(x, y, z, DEGREE)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)[None, :]
            wanted = seen[:, None] & (d < D)
            colors = tl.zeros([BLOCK_N, BLOCK_D], A)
            for k in tl.static_range((DEGREE + 1) * (DEGREE + 1)):
                coeff = tl.load(coeff_ptrs + k * D + d, mask=wanted, other=0.0).to(A)
                colors += Y[k][:, None] * coeff
            tl.store(colors_ptr + at[:, None] * D + d, colors, mask=exists[:, None] & (d < D))


@triton.jit
def spherical_harmonics_bwd_kernel(
    d_dirs_ptr,  # [R, C, N, 3]
    d_coeffs_ptr,  # [R, N, K, D]
    d_colors_ptr,  # [R, C, N, D]
    dirs_ptr,  # [R, C, N, 3]
    coeffs_ptr,  # [R, N, K, D]
    masks_ptr,  # [R, C, N]
    C,
    N,
    K,
    D,
    DEGREE: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    NEEDS_D_DIRS: tl.constexpr,
    NEEDS_D_COEFFS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    A: tl.constexpr = d_colors_ptr.dtype.element_ty
    HARMONICS: tl.constexpr = (DEGREE + 1) * (DEGREE + 1)
    r, n, exists = _rows(N, BLOCK_N)
    coefficients = ((r * N + n) * K * D)[:, None]
    if NEEDS_D_COEFFS:
        d_coeff_ptrs = d_coeffs_ptr + coefficients
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)[None, :]
            here = exists[:, None] & (d < D)
            sums = ()
            for k in tl.static_range(HARMONICS):  # noqa: B007
                sums = sums + (tl.zeros([BLOCK_N, BLOCK_D], A),)
            for camera in range(C):
                at = (r * C + camera) * N + n
                x, y, z, length, nowhere, seen = _unit(
                    dirs_ptr, masks_ptr, at, exists, HAS_MASKS, A
                )
                Y = _harmonics(x, y, z, DEGREE)
                g = _gradients(d_colors_ptr, at, d, D, seen)
                added = ()
                for k in tl.static_range(HARMONICS):
                    added = added + (sums[k] + Y[k][:, None] * g,)
                sums = added
            for k in tl.static_range(HARMONICS):
                tl.store(d_coeff_ptrs + k * D + d, sums[k], mask=here)
            for k in range(HARMONICS, K):
                tl.store(d_coeff_ptrs + k * D + d, tl.zeros([BLOCK_N, BLOCK_D], A), mask=here)
    if NEEDS_D_DIRS:
        coeff_ptrs = coeffs_ptr + coefficients
        for camera in range(C):
            at = (r * C + camera) * N + n
            x, y, z, length, nowhere, seen = _unit(dirs_ptr, masks_ptr, at, exists, HAS_MASKS, A)
            d_x = tl.zeros([BLOCK_N], A)
            d_y = tl.zeros([BLOCK_N], A)
            d_z = tl.zeros([BLOCK_N], A)
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)[None, :]
                g = _gradients(d_colors_ptr, at, d, D, seen)
                wanted = seen[:, None] & (d < D)
                d_Y = ()
                for k in tl.static_range(HARMONICS):
                    coeff = tl.load(coeff_ptrs + k * D + d, mask=wanted, other=0.0).to(A)
                    d_Y = d_Y + (tl.sum(coeff * g, 1),)
                d_x, d_y, d_z = _add_gradient(d_x, d_y, d_z, x, y, z, d_Y, DEGREE)
            along = d_x * x + d_y * y + d_z * z
            still = nowhere | (seen == 0)
            to = d_dirs_ptr + 3 * at
            tl.store(to, tl.where(still, 0.0, (d_x - along * x) / length), mask=exists)
            tl.store(to + 1, tl.where(still, 0.0, (d_y - along * y) / length), mask=exists)
            tl.store(to + 2, tl.where(still, 0.0, (d_z - along * z) / length), mask=exists)


@triton.jit
def _gradients(d_colors_ptr, at, d, D, seen):
    """Those of the channels d of splats' colours, 0 where a splat is not seen."""
    return tl.load(d_colors_ptr + at[:, None] * D + d, mask=seen[:, None] & (d < D), other=0.0)


def _launch(
    dirs: Tensor, coeffs: Tensor, masks: Tensor | None, degree: int
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and what both kernels take."""
    *leading, C, N, _ = dirs.shape
    K, D = coeffs.shape[-2:]
    R = torch.Size(leading).numel()
    if C == 1:  # rows of one camera lie end to end
        R, N = 1, R * N
    block_d = min(triton.next_power_of_2(max(D, 1)), _MOST_CHANNELS)
    block_n = _TILE // block_d
    named = dict(
        dirs_ptr=dirs,
        coeffs_ptr=coeffs,
        masks_ptr=dirs if masks is None else masks,
        C=C,
        N=N,
        K=K,
        D=D,
        DEGREE=degree,
        HAS_MASKS=masks is not None,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        # fused multiply-adds are asked for, as their default changes between triton 3.9 and 3.10
        enable_fp_fusion=True,
    )
    return (R * triton.cdiv(N, block_n),), named


def fwd(dirs: Tensor, coeffs: Tensor, masks: Tensor | None, degree: int) -> Tensor:
    shape = (*dirs.shape[:-1], coeffs.shape[-1])
    colors = dirs.new_empty(shape, dtype=accumulator(dirs.dtype))
    grid, named = _launch(dirs, coeffs, masks, degree)
    spherical_harmonics_fwd_kernel[grid](colors, **named)
    return colors


def bwd(
    d_colors: Tensor,
    dirs: Tensor,
    coeffs: Tensor,
    masks: Tensor | None,
    degree: int,
    needs: int,
) -> tuple[Tensor, Tensor]:
    d_dirs, d_coeffs = empty_gradient(dirs, needs, 0), empty_gradient(coeffs, needs, 1)
    grid, named = _launch(dirs, coeffs, masks, degree)
    spherical_harmonics_bwd_kernel[grid](
        d_dirs,
        d_coeffs,
        d_colors,
        NEEDS_D_DIRS=bool(needs & 1),
        NEEDS_D_COEFFS=bool(needs & 2),
        **named,
    )
    return d_dirs, d_coeffs
