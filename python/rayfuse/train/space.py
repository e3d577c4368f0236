"""Where a field lives: a bounded warp of the world, and the spacing of samples along a ray."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor


class Space(Protocol):
    """A map of the world onto the unit cube, with the matching distances along a ray."""

    def warp(self, x: Tensor) -> Tensor:
        """Positions x[..., 3] in the world to [..., 3] in the unit cube; differentiable."""

    def distance(self, s: Tensor, near: Tensor, far: Tensor) -> Tensor:
        """Spacing s in [0, 1] to the distance between near and far, increasing in s."""

    def spacing(self, t: Tensor, near: Tensor, far: Tensor) -> Tensor:
        """The inverse of `distance`."""

    def box(self) -> tuple[list[float], bool]:
        """[6] least and greatest x, y, z of what matters most, and whether there is more."""


class Contraction:
    """Unbounded scenes: the ball of radius 1 is kept, the rest folded into radius 2.

    Source: Mip-NeRF 360 (Barron et al. 2022), equation 10. Distances are linear in s up to
    `linear`, then linear in inverse distance, with a continuous slope.
    """

    def __init__(self, linear: float = 2.0) -> None:
        self.linear = linear

    def warp(self, x: Tensor) -> Tensor:
        norm = x.norm(dim=-1, keepdim=True).clamp_min(1.0)
        return (x * ((2.0 - 1.0 / norm) / norm)) * 0.25 + 0.5

    def _curve(self, t: Tensor) -> Tensor:
        return torch.where(t < self.linear, t / (2 * self.linear), 1 - self.linear / (2 * t))

    def spacing(self, t: Tensor, near: Tensor, far: Tensor) -> Tensor:
        a, b = self._curve(near), self._curve(far)
        return (self._curve(t) - a) / (b - a)

    def distance(self, s: Tensor, near: Tensor, far: Tensor) -> Tensor:
        a, b = self._curve(near), self._curve(far)
        g = a + s * (b - a)
        return torch.where(g < 0.5, g * (2 * self.linear), self.linear / (2 * (1 - g)))

    def box(self) -> tuple[list[float], bool]:
        return [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0], True


class Frustum:
    """What a few cameras in front of a scene see: (x/z, y/z, 1/z) of one reference camera.

    Cells keep the size of a pixel at every depth, and distances are linear in disparity.

    Args:
        lower, upper: bounds of (x/z, y/z, 1/z), z the depth in front of the reference camera,
            which looks down -z with y up.
    """

    def __init__(self, lower: list[float], upper: list[float]) -> None:
        self.lower, self.upper = lower, upper

    def warp(self, x: Tensor) -> Tensor:
        disparity = 1.0 / (-x[..., 2:]).clamp_min(1e-3)
        u = torch.cat([x[..., :2] * disparity, disparity], dim=-1)
        lower = u.new_tensor(self.lower)
        return ((u - lower) / (u.new_tensor(self.upper) - lower)).clamp(0.0, 1.0)

    def distance(self, s: Tensor, near: Tensor, far: Tensor) -> Tensor:
        return 1.0 / (1.0 / near + s * (1.0 / far - 1.0 / near))

    def spacing(self, t: Tensor, near: Tensor, far: Tensor) -> Tensor:
        return (1.0 / near - 1.0 / t) / (1.0 / near - 1.0 / far)

    def box(self) -> tuple[list[float], bool]:
        near, far = 1 / self.upper[2], 1 / self.lower[2]
        low = [min(self.lower[axis] * z for z in (near, far)) for axis in (0, 1)]
        high = [max(self.upper[axis] * z for z in (near, far)) for axis in (0, 1)]
        return [*low, -far, *high, -near], False


def spherical_harmonics(d: Tensor) -> Tensor:
    """Real spherical harmonics of degree 0 to 2 of unit vectors d[..., 3]: [..., 9]."""
    x, y, z = d.unbind(-1)
    a, b = math.sqrt(3 / (4 * math.pi)), math.sqrt(15 / (4 * math.pi))
    return torch.stack(
        [
            torch.full_like(x, 0.5 / math.sqrt(math.pi)),
            a * y,
            a * z,
            a * x,
            b * x * y,
            b * y * z,
            0.25 * math.sqrt(5 / math.pi) * (3 * z * z - 1),
            b * x * z,
            0.5 * b * (x * x - y * y),
        ],
        dim=-1,
    )
