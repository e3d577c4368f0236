from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..domain import Domain, nonnegative
from ..op import Op, op

# where the entries of a matrix are in its upper triangle, row by row
_OF_TRIANGLE = (0, 1, 2, 1, 3, 4, 2, 4, 5)

# precisions of small ones are too steep for finite differences
_extents = Domain(nonnegative.rule, nonnegative.holds, lambda u: 0.25 + u)


class MatrixOp(Op):
    """An op whose output is a matrix, as 9 values, or as the 6 of its upper triangle."""

    def bind(self, args: Sequence[Any]) -> tuple[tuple[int, ...], dict[str, int]]:
        leading, sizes = super().bind(args)
        triu = dict(zip(self.domain, args, strict=True))["triu"]
        return leading, {**sizes, "M": 6 if triu else 9}

    def public(self) -> Callable:
        call = super().public()

        @functools.wraps(call)
        def splat_covariances(*args: Any, **named: Any) -> Tensor:
            matrices = call(*args, **named)
            return matrices if named.get("triu") else matrices.unflatten(-1, (3, 3))

        return splat_covariances


@op(
    "quats[..., 4] scales[..., 3] -> covariances[..., M]",
    domain=dict(scales=_extents),
    base=MatrixOp,
)
def splat_covariances(
    quats: Tensor, scales: Tensor, *, inverse: bool = False, triu: bool = False
) -> Tensor:
    """Covariances of Gaussian splats, or their inverses, from rotations and extents.

    R diag(scales)^2 R^T with R the rotation by quats / |quats|; with `inverse` R diag(scales)^-2
    R^T (docs/splats.md).

    Args:
        quats: [..., 4] quaternions w, x, y, z of any length. One of length 0 does not rotate, and
            has no gradient.
        scales: [..., 3] standard deviations along the axes, >= 0.

    Keyword Args:
        inverse: the precisions instead. An extent of 0 counts as 0 in them, and has no gradient:
            the pseudo-inverse.
        triu: only the upper triangle, as xx, xy, xz, yy, yz, zz.

    Returns:
        [..., 3, 3], or [..., 6] with `triu`. float32 for half precision inputs. Differentiable in
        both, twice through the reference.

    Raises:
        ValueError: for shapes or devices that do not fit.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ.

    Source:
        Kerbl et al., 3D Gaussian Splatting (2023), eq. 6; gsplat, `quat_scale_to_covar_preci`.

    Example:
        >>> import torch, rayfuse
        >>> quarter_turn_about_z = torch.tensor([1.0, 0.0, 0.0, 1.0])
        >>> scales = torch.tensor([1.0, 2.0, 3.0])
        >>> rayfuse.splat_covariances(quarter_turn_about_z, scales, triu=True)
        tensor([4., 0., 0., 1., 0., 9.])
    """
    length2 = quats.square().sum(-1, keepdim=True)
    still = length2 < torch.finfo(quats.dtype).tiny
    unit = torch.where(still, 0, quats * torch.where(still, 1, length2).rsqrt())
    w, x, y, z = unit.unbind(-1)
    rotation = torch.stack(
        [
            *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
            *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
            *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
        ],
        -1,
    ).unflatten(-1, (3, 3))
    if inverse:
        flat = scales == 0
        scales = torch.where(flat, 0, 1 / torch.where(flat, 1, scales))
    axes = rotation * scales[..., None, :]
    triangle = [(axes[..., i, :] * axes[..., j, :]).sum(-1) for i in range(3) for j in range(i, 3)]
    return torch.stack(triangle if triu else [triangle[i] for i in _OF_TRIANGLE], -1)
