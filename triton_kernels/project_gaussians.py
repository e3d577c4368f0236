# Gaussians in space as splats in images, the formulas of csrc/math/project_gaussians.h: the rows JR
# of the Jacobian and the rotation, seen from the axes of a Gaussian, are X; V = X diag(s)^2 X^T and
# W = JR Sigma; backward d_V = G, d_JR = 2 G W, and shapes get their gradients from N = X^T G X.
# A program owns BLOCK Gaussians of a batch and shows them to all cameras of it: Gaussians are read
# once, outputs written once. Sums over the Gaussians of a program for a camera go to a row, and
# the rows of a camera are added up in order. docs/splats.md
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, empty_gradient, ratio

_BLOCK = 128


@triton.jit
def _dot(u, v):
    return u[0] * v[0] + u[1] * v[1] + u[2] * v[2]


@triton.jit
def _scaled(a, u, b, v):
    """a u + b v"""
    return a * u[0] + b * v[0], a * u[1] + b * v[1], a * u[2] + b * v[2]


@triton.jit
def _load2(ptr, row, mask, A: tl.constexpr):
    x = tl.load(ptr + 2 * row, mask=mask, other=0.0).to(A)
    return x, tl.load(ptr + 2 * row + 1, mask=mask, other=0.0).to(A)


@triton.jit
def _load3(ptr, mask, A: tl.constexpr):
    x = tl.load(ptr, mask=mask, other=0.0).to(A)
    y = tl.load(ptr + 1, mask=mask, other=0.0).to(A)
    return x, y, tl.load(ptr + 2, mask=mask, other=0.0).to(A)


@triton.jit
def _load4(ptr, A: tl.constexpr):
    x, y = tl.load(ptr).to(A), tl.load(ptr + 1).to(A)
    return x, y, tl.load(ptr + 2).to(A), tl.load(ptr + 3).to(A)


@triton.jit
def _store3(ptr, u, mask):
    tl.store(ptr, u[0], mask=mask)
    tl.store(ptr + 1, u[1], mask=mask)
    tl.store(ptr + 2, u[2], mask=mask)


@triton.jit
def _camera(viewmats_ptr, Ks_ptr, i, A: tl.constexpr):
    """R, t, (fx, fy, cx, cy) of camera i of all."""
    pose, K = viewmats_ptr + 16 * i, Ks_ptr + 9 * i
    x, y, z = _load4(pose, A), _load4(pose + 4, A), _load4(pose + 8, A)
    R = (x[0], x[1], x[2]), (y[0], y[1], y[2]), (z[0], z[1], z[2])
    f = tl.load(K).to(A), tl.load(K + 4).to(A), tl.load(K + 2).to(A), tl.load(K + 5).to(A)
    return R, (x[3], y[3], z[3]), f


@triton.jit
def _shape(quats_ptr, scales_ptr, covars_ptr, g, mask, COVARS: tl.constexpr, A: tl.constexpr):
    """The six values of a covariance; or the columns of a rotation, (s, q) and 2 / |q|^2."""
    if COVARS:
        return _load3(covars_ptr + 6 * g, mask, A), _load3(covars_ptr + 6 * g + 3, mask, A)
    else:
        w = tl.load(quats_ptr + 4 * g, mask=mask, other=1.0).to(A)
        x, y, z = _load3(quats_ptr + 4 * g + 1, mask, A)
        square = w * w + (x * x + y * y + z * z)
        # NaN where the square is not finite, which would pass for no rotation
        f = ratio(2 + 0 * square, square, A)
        first = 1 - f * (y * y + z * z), f * (x * y + w * z), f * (x * z - w * y)
        second = f * (x * y - w * z), 1 - f * (x * x + z * z), f * (y * z + w * x)
        third = f * (x * z + w * y), f * (y * z - w * x), 1 - f * (x * x + y * y)
        s = _load3(scales_ptr + 3 * g, mask, A)
        return (first, second, third), s, (w, x, y, z), f


@triton.jit
def _from_axes(u, shape, COVARS: tl.constexpr):
    if COVARS:
        return u
    else:
        columns = shape[0]
        return _dot(u, columns[0]), _dot(u, columns[1]), _dot(u, columns[2])


@triton.jit
def _times_sigma(x, shape, COVARS: tl.constexpr):
    """W of a row of X."""
    if COVARS:
        xx, xy, xz = shape[0]
        yy, yz, zz = shape[1]
        return _dot(x, (xx, xy, xz)), _dot(x, (xy, yy, yz)), _dot(x, (xz, yz, zz))
    else:
        first, second, third = shape[0]
        s = shape[1]
        u = x[0] * s[0] * s[0], x[1] * s[1] * s[1], x[2] * s[2] * s[2]
        return (
            _dot(u, (first[0], second[0], third[0])),
            _dot(u, (first[1], second[1], third[1])),
            _dot(u, (first[2], second[2], third[2])),
        )


@triton.jit
def _footprint(x, y, w_x, w_y, shape, COVARS: tl.constexpr):
    """V before eps2d, and its determinant; x and y are the rows of X."""
    if COVARS:
        a, b, c = _dot(x, w_x), _dot(x, w_y), _dot(y, w_y)
        det = a * c - b * b
    else:
        s = shape[1]
        u = x[0] * s[0], x[1] * s[1], x[2] * s[2]
        v = y[0] * s[0], y[1] * s[1], y[2] * s[2]
        a, b, c = _dot(u, u), _dot(u, v), _dot(v, v)
        # a c - b^2, without its cancellation where a splat is thin
        cross = u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]
        det = _dot(cross, cross)
    return a, b, c, det


@triton.jit
def _splat(
    mean, shape, opacity, R, t, K, constants_ptr,
    COVARS: tl.constexpr, HAS_OPACITIES: tl.constexpr, COMPENSATE: tl.constexpr,
    ORTHO: tl.constexpr,
):  # fmt: skip
    """Whether it is visible; the outputs; and what the backward needs of the forward."""
    width, height = tl.load(constants_ptr), tl.load(constants_ptr + 1)
    eps2d, near = tl.load(constants_ptr + 2), tl.load(constants_ptr + 3)
    far, clip = tl.load(constants_ptr + 4), tl.load(constants_ptr + 5)
    least_alpha = tl.load(constants_ptr + 6)
    fx, fy, cx, cy = K
    p = _dot(R[0], mean) + t[0], _dot(R[1], mean) + t[1], _dot(R[2], mean) + t[2]
    depth = p[2]
    nothing = depth * 0
    A: tl.constexpr = depth.dtype
    if ORTHO:
        jx, jy, slope_x, slope_y, held_x, held_y = (
            fx + nothing, fy + nothing, nothing, nothing, nothing, nothing
        )  # fmt: skip
    else:
        margin_x, margin_y = 0.15 * width / fx, 0.15 * height / fy
        jx, jy = ratio(fx, depth, A), ratio(fy, depth, A)
        slope_x, slope_y = ratio(p[0], depth, A), ratio(p[1], depth, A)
        least, most = -cx / fx - margin_x, (width - cx) / fx + margin_x
        held_x = tl.where(slope_x < least, least, tl.where(slope_x > most, most, slope_x))
        least, most = -cy / fy - margin_y, (height - cy) / fy + margin_y
        held_y = tl.where(slope_y < least, least, tl.where(slope_y > most, most, slope_y))
    mean_x, mean_y = jx * p[0] + cx, jy * p[1] + cy
    x = _from_axes(_scaled(jx, R[0], -jx * held_x, R[2]), shape, COVARS)
    y = _from_axes(_scaled(jy, R[1], -jy * held_y, R[2]), shape, COVARS)
    w_x, w_y = _times_sigma(x, shape, COVARS), _times_sigma(y, shape, COVARS)
    a, b, c, before = _footprint(x, y, w_x, w_y, shape, COVARS)
    added = eps2d * (a + (c + eps2d))
    det = before + added
    a += eps2d
    c += eps2d
    conic = ratio(c, det, A), ratio(-b, det, A), ratio(a, det, A)
    kept = tl.where(before > 0, ratio(before, det, A), 0.0)
    compensation = tl.sqrt(tl.maximum(kept, 0.0))

    visible = (depth >= near) & (depth <= far) & (det > 0)
    extent = 3.33 + nothing
    if HAS_OPACITIES:
        if COMPENSATE:
            opacity *= compensation
        visible = visible & (opacity >= least_alpha) & (0 * opacity == 0)
        drawn = tl.where(visible, opacity / least_alpha, 1.0)
        own = tl.sqrt(tl.maximum(2 * tl.log(drawn), 0.0))
        extent = tl.where(own < 3.33, own, extent)
    r_x = tl.ceil(extent * tl.sqrt(tl.where(a > 0, a, 0.0)))
    r_y = tl.ceil(extent * tl.sqrt(tl.where(c > 0, c, 0.0)))
    visible = visible & ((r_x > clip) | (r_y > clip)) & (mean_x + r_x > 0) & (mean_y + r_y > 0)
    visible = visible & (mean_x - r_x < width) & (mean_y - r_y < height)
    # what is not finite, times 0, is NaN
    total = mean_x + mean_y + conic[0] + conic[1] + conic[2] + r_x + r_y
    visible = visible & (0 * total == 0)
    outputs = (mean_x, mean_y), depth, conic, (r_x, r_y), compensation
    J = jx, jy, slope_x, slope_y, held_x, held_y
    return visible, outputs, J, (x, y), (w_x, w_y), added / det, eps2d / det


@triton.jit
def project_gaussians_fwd_kernel(
    means2d_ptr,  # [B, C, N, 2]
    depths_ptr,  # [B, C, N]
    conics_ptr,  # [B, C, N, 3]
    radii_ptr,  # [B, C, N, 2]
    compensations_ptr,  # [B, C, N]
    constants_ptr,  # [7]
    means_ptr,  # [B, N, 3]
    viewmats_ptr,  # [B, C, 4, 4]
    Ks_ptr,  # [B, C, 3, 3]
    quats_ptr,  # [B, N, 4]
    scales_ptr,  # [B, N, 3]
    covars_ptr,  # [B, N, 6]
    opacities_ptr,  # [B, N]
    N, C, BLOCKS,
    COVARS: tl.constexpr, HAS_OPACITIES: tl.constexpr, COMPENSATE: tl.constexpr,
    ORTHO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = means2d_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    batch = program // BLOCKS
    n = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    g = batch * N + n
    mean = _load3(means_ptr + 3 * g, mask, A)
    shape = _shape(quats_ptr, scales_ptr, covars_ptr, g, mask, COVARS, A)
    opacity = mean[0] * 0
    if HAS_OPACITIES:
        opacity = tl.load(opacities_ptr + g, mask=mask, other=0.0).to(A)
    for c in range(C):
        of_camera = batch * C + c
        R, t, K = _camera(viewmats_ptr, Ks_ptr, of_camera, A)
        visible, outputs, _J, _X, _W, _lost, _eps = _splat(
            mean, shape, opacity, R, t, K, constants_ptr, COVARS, HAS_OPACITIES, COMPENSATE, ORTHO
        )
        mean2d, depth, conic, radius, compensation = outputs
        at = of_camera * N + n
        tl.store(means2d_ptr + 2 * at, tl.where(visible, mean2d[0], 0.0), mask=mask)
        tl.store(means2d_ptr + 2 * at + 1, tl.where(visible, mean2d[1], 0.0), mask=mask)
        tl.store(depths_ptr + at, tl.where(visible, depth, 0.0), mask=mask)
        seen = (
            tl.where(visible, conic[0], 0.0),
            tl.where(visible, conic[1], 0.0),
            tl.where(visible, conic[2], 0.0),
        )
        _store3(conics_ptr + 3 * at, seen, mask)
        tl.store(radii_ptr + 2 * at, tl.where(visible, radius[0], 0.0), mask=mask)
        tl.store(radii_ptr + 2 * at + 1, tl.where(visible, radius[1], 0.0), mask=mask)
        tl.store(compensations_ptr + at, tl.where(visible, compensation, 0.0), mask=mask)


@triton.jit
def _store_pose(ptr, visible, d_p, mean, of_R):
    """A row of the sums for a camera."""
    for k in tl.static_range(3):
        tl.store(ptr + k, tl.sum(tl.where(visible, d_p * mean[k] + of_R[k], 0.0), 0))
    tl.store(ptr + 3, tl.sum(tl.where(visible, d_p, 0.0), 0))


@triton.jit
def project_gaussians_bwd_kernel(
    d_means_ptr,  # [B, N, 3]
    d_quats_ptr,  # [B, N, 4]
    d_scales_ptr,  # [B, N, 3]
    d_covars_ptr,  # [B, N, 6]
    d_poses_ptr,  # [B, C, BLOCKS, 12]
    d_means2d_ptr,  # [B, C, N, 2]
    d_depths_ptr,  # [B, C, N]
    d_conics_ptr,  # [B, C, N, 3]
    d_compensations_ptr,  # [B, C, N]
    constants_ptr,  # [7]
    means_ptr,  # [B, N, 3]
    viewmats_ptr,  # [B, C, 4, 4]
    Ks_ptr,  # [B, C, 3, 3]
    quats_ptr,  # [B, N, 4]
    scales_ptr,  # [B, N, 3]
    covars_ptr,  # [B, N, 6]
    opacities_ptr,  # [B, N]
    N, C, BLOCKS,
    COVARS: tl.constexpr, HAS_OPACITIES: tl.constexpr, COMPENSATE: tl.constexpr,
    ORTHO: tl.constexpr, HAS_D_MEANS2D: tl.constexpr, HAS_D_DEPTHS: tl.constexpr,
    HAS_D_CONICS: tl.constexpr, HAS_D_COMPENSATIONS: tl.constexpr, NEEDS_D_MEANS: tl.constexpr,
    NEEDS_D_QUATS: tl.constexpr, NEEDS_D_SCALES: tl.constexpr, NEEDS_D_COVARS: tl.constexpr,
    NEEDS_D_VIEWMATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = d_poses_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    batch = program // BLOCKS
    n = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    g = batch * N + n
    mean = _load3(means_ptr + 3 * g, mask, A)
    shape = _shape(quats_ptr, scales_ptr, covars_ptr, g, mask, COVARS, A)
    zero = tl.zeros((BLOCK,), A)
    opacity = zero
    if HAS_OPACITIES:
        opacity = tl.load(opacities_ptr + g, mask=mask, other=0.0).to(A)
    d_mean_x, d_mean_y, d_mean_z = zero, zero, zero
    xx, xy, xz, yy, yz, zz = zero, zero, zero, zero, zero, zero
    met = n < 0
    for i in range(C):
        of_camera = batch * C + i
        R, t, K = _camera(viewmats_ptr, Ks_ptr, of_camera, A)
        visible, outputs, J, X, W, lost, eps_per_det = _splat(
            mean, shape, opacity, R, t, K, constants_ptr, COVARS, HAS_OPACITIES, COMPENSATE, ORTHO
        )
        _mean2d, depth, conic, _radius, compensation = outputs
        visible = visible & mask
        at = of_camera * N + n
        d_x, d_y = zero, zero
        if HAS_D_MEANS2D:
            d_x, d_y = _load2(d_means2d_ptr, at, mask, A)
        d_depth = zero
        if HAS_D_DEPTHS:
            d_depth = tl.load(d_depths_ptr + at, mask=mask, other=0.0)
        d_conic = zero, zero, zero
        if HAS_D_CONICS:
            d_conic = _load3(d_conics_ptr + 3 * at, mask, A)
        d_ratio = zero
        if HAS_D_COMPENSATIONS:
            d_compensation = tl.load(d_compensations_ptr + at, mask=mask, other=0.0)
            some = compensation > 0
            d_ratio = tl.where(some, 0.5 * d_compensation / tl.where(some, compensation, 1.0), 0.0)
        a, b, c = conic
        half = 0.5 * d_conic[1]
        aa, ab = d_conic[0] * a + half * b, d_conic[0] * b + half * c
        ba, bb = half * a + d_conic[2] * b, half * b + d_conic[2] * c
        kept, off = d_ratio * lost, d_ratio * eps_per_det
        g00 = kept * a - off - (a * aa + b * ba)
        g01 = kept * b - (a * ab + b * bb)
        g11 = kept * c - off - (b * ab + c * bb)
        of_x = _scaled(2 * g00, W[0], 2 * g01, W[1])
        of_y = _scaled(2 * g01, W[0], 2 * g11, W[1])
        x, y = X
        u, v = _scaled(g00, x, g01, y), _scaled(g01, x, g11, y)
        xx += tl.where(visible, x[0] * u[0] + y[0] * v[0], 0.0)
        xy += tl.where(visible, x[0] * u[1] + y[0] * v[1], 0.0)
        xz += tl.where(visible, x[0] * u[2] + y[0] * v[2], 0.0)
        yy += tl.where(visible, x[1] * u[1] + y[1] * v[1], 0.0)
        yz += tl.where(visible, x[1] * u[2] + y[1] * v[2], 0.0)
        zz += tl.where(visible, x[2] * u[2] + y[2] * v[2], 0.0)

        jx, jy, slope_x, slope_y, held_x, held_y = J
        if ORTHO:
            d_p_x, d_p_y, d_p_z = jx * d_x, jy * d_y, d_depth
        else:
            # of x / z and y / z in the Jacobian, where they are constant if they are clamped
            d_slope_x, d_slope_y = -jx * _dot(of_x, R[2]), -jy * _dot(of_y, R[2])
            d_x = K[0] * d_x + tl.where(held_x == slope_x, d_slope_x, 0.0)
            d_y = K[1] * d_y + tl.where(held_y == slope_y, d_slope_y, 0.0)
            d_p_x, d_p_y = d_x / depth, d_y / depth
            along = slope_x * d_x + slope_y * d_y + held_x * d_slope_x + held_y * d_slope_y
            along += jx * _dot(of_x, R[0]) + jy * _dot(of_y, R[1])
            d_p_z = d_depth - along / depth
        d_p = d_p_x, d_p_y, d_p_z
        d_mean_x += tl.where(visible, _dot((R[0][0], R[1][0], R[2][0]), d_p), 0.0)
        d_mean_y += tl.where(visible, _dot((R[0][1], R[1][1], R[2][1]), d_p), 0.0)
        d_mean_z += tl.where(visible, _dot((R[0][2], R[1][2], R[2][2]), d_p), 0.0)
        met = met | visible
        if NEEDS_D_VIEWMATS:
            row_ptr = d_poses_ptr + (of_camera * BLOCKS + program % BLOCKS) * 12
            none = zero, zero, zero
            _store_pose(row_ptr, visible, d_p_x, mean, _scaled(jx, of_x, 0.0, none))
            _store_pose(row_ptr + 4, visible, d_p_y, mean, _scaled(jy, of_y, 0.0, none))
            of_depth = _scaled(-jx * held_x, of_x, -jy * held_y, of_y)
            _store_pose(row_ptr + 8, visible, d_p_z, mean, of_depth)
    if NEEDS_D_MEANS:
        _store3(d_means_ptr + 3 * g, (d_mean_x, d_mean_y, d_mean_z), mask)
    if COVARS:
        if NEEDS_D_COVARS:
            _store3(d_covars_ptr + 6 * g, (xx, 2 * xy, 2 * xz), mask)
            _store3(d_covars_ptr + 6 * g + 3, (yy, 2 * yz, zz), mask)
    else:
        _columns, s, q, f = shape
        if NEEDS_D_SCALES:
            d_scale = (
                tl.where(met, 2 * s[0] * xx, 0.0),
                tl.where(met, 2 * s[1] * yy, 0.0),
                tl.where(met, 2 * s[2] * zz, 0.0),
            )
            _store3(d_scales_ptr + 3 * g, d_scale, mask)
        if NEEDS_D_QUATS:
            # a turn by a small r about the axes is q (0, r / 2)
            r = (
                2 * f * yz * (s[1] - s[2]) * (s[1] + s[2]),
                2 * f * xz * (s[2] - s[0]) * (s[2] + s[0]),
                2 * f * xy * (s[0] - s[1]) * (s[0] + s[1]),
            )
            w, x, y, z = q
            d_w = tl.where(met, -_dot((x, y, z), r), 0.0)
            tl.store(d_quats_ptr + 4 * g, d_w, mask=mask)
            d_xyz = (
                tl.where(met, w * r[0] + y * r[2] - z * r[1], 0.0),
                tl.where(met, w * r[1] + z * r[0] - x * r[2], 0.0),
                tl.where(met, w * r[2] + x * r[1] - y * r[0], 0.0),
            )
            _store3(d_quats_ptr + 4 * g + 1, d_xyz, mask)


class _Launch:
    """What both directions are started with."""

    def __init__(
        self,
        means: Tensor,
        viewmats: Tensor,
        Ks: Tensor,
        quats: Tensor | None,
        scales: Tensor | None,
        covars: Tensor | None,
        opacities: Tensor | None,
        width: int,
        height: int,
        eps2d: float,
        near_plane: float,
        far_plane: float,
        radius_clip: float,
        compensate: bool,
        camera_model: int,
    ) -> None:
        self.N, self.C = means.shape[-2], viewmats.shape[-3]
        self.blocks = triton.cdiv(self.N, _BLOCK)
        self.batch = means.shape[:-2]
        self.grid = (self.batch.numel() * self.blocks,)
        values = [width, height, eps2d, near_plane, far_plane, radius_clip, 1 / 255]
        self.dtype = accumulator(means.dtype)
        # absent tensors are never read
        absent = [means if x is None else x for x in (quats, scales, covars, opacities)]
        self.arguments = (
            torch.tensor(values, dtype=self.dtype, device=means.device),
            means,
            viewmats,
            Ks,
            *absent,
            self.N,
            self.C,
            self.blocks,
        )
        self.options: dict[str, Any] = {
            "COVARS": covars is not None,
            "HAS_OPACITIES": opacities is not None,
            "COMPENSATE": compensate,
            "ORTHO": camera_model == 1,
            "BLOCK": _BLOCK,
            "num_warps": _BLOCK // 32,
            # asked for, as the default changes between triton 3.9 and 3.10
            "enable_fp_fusion": True,
        }


def fwd(means: Tensor, *args: Any) -> tuple[Tensor, ...]:
    launch = _Launch(means, *args)
    shape = *launch.batch, launch.C, launch.N
    outputs = [
        means.new_empty(*shape, *row, dtype=launch.dtype) for row in ((2,), (), (3,), (2,), ())
    ]
    if launch.grid[0]:
        project_gaussians_fwd_kernel[launch.grid](*outputs, *launch.arguments, **launch.options)
    return tuple(outputs)


def bwd(
    d_means2d: Tensor | None,
    d_depths: Tensor | None,
    d_conics: Tensor | None,
    d_radii: Tensor | None,
    d_compensations: Tensor | None,
    means: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *args, needs = rest
    launch = _Launch(means, *args)
    inputs = means, args[0], *args[2:5]
    d_means, d_viewmats, d_quats, d_scales, d_covars = grads = [
        means.new_empty(0) if x is None else empty_gradient(x, needs, i)
        for i, x in enumerate(inputs)
    ]
    d_poses = means.new_empty(
        *launch.batch, launch.C, launch.blocks if needs & 2 else 0, 3, 4, dtype=launch.dtype
    )
    d_outputs = d_means2d, d_depths, d_conics, d_compensations
    if launch.grid[0]:
        project_gaussians_bwd_kernel[launch.grid](
            d_means,
            d_quats,
            d_scales,
            d_covars,
            d_poses,
            *(d_poses if x is None else x for x in d_outputs),
            *launch.arguments,
            HAS_D_MEANS2D=d_means2d is not None,
            HAS_D_DEPTHS=d_depths is not None,
            HAS_D_CONICS=d_conics is not None,
            HAS_D_COMPENSATIONS=d_compensations is not None,
            NEEDS_D_MEANS=bool(needs & 1),
            NEEDS_D_VIEWMATS=bool(needs & 2),
            NEEDS_D_QUATS=bool(needs & 4),
            NEEDS_D_SCALES=bool(needs & 8),
            NEEDS_D_COVARS=bool(needs & 16),
            **launch.options,
        )
    if needs & 2:
        d_viewmats[..., :3, :] = d_poses.sum(-3)
        d_viewmats[..., 3, :] = 0
    return tuple(grads)
