from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..domain import Domain
from ..op import Op, op

_MOST_DEGREE = 4

_booleans = Domain("be True or False", lambda x, _: x == x, lambda u, _: u < 0.75, "N")


class HarmonicsOp(Op):
    """An op on splats whose coefficients all cameras share; a size depends on the degree."""

    def check(self, args: Sequence[Any]) -> None:
        super().check(args)
        named = dict(zip(self.domain, args, strict=True))
        coeffs, degree = named["coeffs"], named["degree"]
        if not 0 <= degree <= _MOST_DEGREE:
            self._fail(ValueError, "degree", f"be from 0 to {_MOST_DEGREE}", degree)
        if coeffs.shape[-2] < (degree + 1) ** 2:
            rule = f"have shape [..., N, K, D] with K >= {(degree + 1) ** 2} (from degree)"
            self._fail(ValueError, "coeffs", rule, [*coeffs.shape])

    def _check_dtype(self, name: str, dtype: torch.dtype, first: str, want: torch.dtype) -> None:
        if name != "masks":
            super()._check_dtype(name, dtype, first, want)
        elif dtype != torch.bool:
            self._fail(TypeError, name, "be bool", str(dtype).removeprefix("torch."))

    def _positional(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        """Coefficients as the raw ops take them: those of one direction each are of one camera."""
        dirs, coeffs, masks, *scalars = super()._positional(args, named)
        if not (isinstance(dirs, Tensor) and isinstance(coeffs, Tensor)):
            return dirs, coeffs, masks, *scalars
        if coeffs.dim() == dirs.dim() + 1:
            repeated = dirs.dim() > 2 and coeffs.shape[:-2] == dirs.shape[:-1]
            if repeated and coeffs.stride(-4) == 0:
                coeffs = coeffs.select(-4, 0)
            else:
                batch, splats = dirs.shape[:-2], dirs.shape[-2:-1] or (1,)
                dirs = dirs.reshape(*batch, 1, *splats, dirs.shape[-1])
                coeffs = coeffs.reshape(*coeffs.shape[:-3], *splats, *coeffs.shape[-2:])
                if isinstance(masks, Tensor):
                    masks = masks.reshape(*masks.shape[:-1], 1, *splats)
        return dirs, coeffs, masks, *scalars

    def public(self) -> Callable:
        call = super().public()

        @functools.wraps(call)
        def spherical_harmonics(*args: Any, **named: Any) -> Tensor:
            colors = call(*args, **named)
            dirs = named["dirs"] if "dirs" in named else args[0]
            return colors.reshape(*dirs.shape[:-1], colors.shape[-1])

        return spherical_harmonics


@op(
    "dirs[..., C, N, 3] coeffs[..., N, K, D] masks?[..., C, N] -> colors[..., C, N, D]",
    domain=dict(masks=_booleans),
    narrow=("coeffs",),
    base=HarmonicsOp,
)
def spherical_harmonics(
    dirs: Tensor, coeffs: Tensor, *, masks: Tensor | None = None, degree: int
) -> Tensor:
    """Colours of splats from the directions they are seen in, by real spherical harmonics.

    colors = sum_k Y_k(dirs / |dirs|) coeffs_k over the (degree + 1)^2 harmonics up to a degree,
    those of l = 0, 1, ... one after the other and in each of m = -l ... l, with the signs of 3D
    Gaussian splatting: 0.2821, -0.4886 y, 0.4886 z, -0.4886 x, ... (docs/splats.md).

    Args:
        dirs: [..., C, N, 3] from C cameras to N splats, of any length; [..., 3] where `coeffs` has
            the same leading dimensions. A direction of length 0 has x = y = z = 0, and no gradient.
        coeffs: [..., N, K, D] coefficients of D channels, for all cameras; [..., K, D] for one
            direction each. K may be more than (degree + 1)^2: the others are never read. May be
            bfloat16 or float16 where dirs is float32.

    Keyword Args:
        masks: [..., C, N] bool, like `dirs`; where it is False nothing is read, colours and
            gradients are 0.
        degree: up to which harmonics count, from 0 to 4.

    Returns:
        [..., C, N, D] the colours. float32 for half precision inputs. Differentiable in dirs and
        coeffs, twice through the reference.

    Raises:
        ValueError: for shapes, devices or a degree that do not fit.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ; for
            masks that are not bool.

    Source:
        Kerbl et al., 3D Gaussian Splatting (2023); gsplat, `spherical_harmonics`; Sloan, Efficient
        Spherical Harmonic Evaluation (2013).

    Example:
        >>> import torch, rayfuse
        >>> coeffs = torch.tensor([[[1.0], [0.0], [1.0], [0.0]]])
        >>> rayfuse.spherical_harmonics(torch.tensor([[0.0, 0.0, 2.0]]), coeffs, degree=1)
        tensor([[0.7707]])
    """
    if masks is not None:
        dirs = torch.where(masks[..., None], dirs, 0)
    length2 = dirs.square().sum(-1, keepdim=True)
    nowhere = length2 < torch.finfo(dirs.dtype).tiny
    unit = torch.where(nowhere, 0, dirs * torch.where(nowhere, 1, length2).rsqrt())
    bases = torch.stack(_harmonics(unit, degree), -1)  # [..., C, N, (degree + 1)^2]
    used = coeffs[..., None, :, : bases.shape[-1], :].to(bases.dtype)
    colors = (bases[..., None] * used).sum(-2)
    return colors if masks is None else torch.where(masks[..., None], colors, 0)


def _harmonics(unit: Tensor, degree: int) -> list[Tensor]:
    """Y_k of unit vectors. With (x + i y)^m = c + i s, that of l and m is a polynomial in z, times
    c, or s for -m."""
    x, y, z = unit.unbind(-1)
    found = {}
    c, s = torch.ones_like(z), torch.zeros_like(z)
    for m in range(degree + 1):
        for l in range(m, degree + 1):
            polynomial = torch.zeros_like(z)
            for factor in reversed(_polynomial(l, m)):
                polynomial = polynomial * z + factor
            found[l, -m], found[l, m] = polynomial * s, polynomial * c
        c, s = x * c - y * s, x * s + y * c
    return [found[l, m] for l in range(degree + 1) for m in range(-l, l + 1)]


def _polynomial(l: int, m: int) -> list[float]:
    """The factors of z^0, z^1, ...: the m-th derivative of Legendre's polynomial, normalised, with
    the sign of Condon and Shortley."""
    legendre = [0.0] * (l + 1)
    for k in range(l // 2 + 1):
        legendre[l - 2 * k] = (-1) ** k * math.comb(l, k) * math.comb(2 * l - 2 * k, l) / 2**l
    for _ in range(m):
        legendre = [power * factor for power, factor in enumerate(legendre)][1:]
    square = (2 * l + 1) / (4 * math.pi) * math.factorial(l - m) / math.factorial(l + m)
    norm = (-1) ** m * math.sqrt(square * (2 if m else 1))
    return [norm * factor for factor in legendre]
