from __future__ import annotations

import torch
from torch import Tensor

from ..domain import Domain, increasing
from ..op import op

__all__ = ["ray_weights"]

# samples reach from glass to walls; an infinite density is a wall
density = Domain("be finite or inf, and >= 0", lambda x: x >= 0, lambda u: 16 * u**3)


@op(
    "sigma[..., S] t[..., S+1] -> w[..., S] transmittance[..., S+1]",
    domain=dict(sigma=density, t=increasing),
)
def ray_weights(
    sigma: Tensor, t: Tensor, *, opaque_background: bool = False
) -> tuple[Tensor, Tensor]:
    """Weights of the samples of a ray from their densities: w_i = T_i (1 - exp(-sigma_i dt_i)).

    T_i = exp(-sum_{j<i} sigma_j dt_j) is the light that reaches sample i. Values and gradients are
    finite for sigma = inf, which stands for an opaque sample, with inf * 0 = 0.

    Args:
        sigma: [..., S] densities, >= 0, per unit of t; inf is allowed.
        t: [..., S+1] edges of the intervals along the ray, not decreasing.

    Keyword Args:
        opaque_background: the last sample lets nothing through, whatever its density.

    Returns:
        w: [..., S] weights, which sum to at most 1.
        transmittance: [..., S+1] light that reaches each edge; the last one is the background's.
        Both are float32 for half precision inputs, differentiable in sigma and t, twice through the
        reference. An infinite density is a constant: sigma and t get no gradient there.

    Raises:
        ValueError: for shapes or devices that do not match.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ.

    Source:
        Max, Optical models for direct volume rendering (1995); Mildenhall et al., NeRF (2020),
        eq. 3. docs/compositing.md

    Example:
        >>> import torch, rayfuse
        >>> t = torch.tensor([0.0, 1.0, 2.0])
        >>> rayfuse.ray_weights(torch.tensor([0.6931, torch.inf]), t)
        (tensor([0.5000, 0.5000]), tensor([1.0000, 0.5000, 0.0000]))
    """
    x = optical_depths(sigma, t.diff(dim=-1))
    if opaque_background:
        x = torch.cat([x[..., :-1], torch.full_like(x[..., -1:], torch.inf)], -1)
    none = x.new_zeros((*x.shape[:-1], 1))
    transmittance = torch.exp(-torch.cat([none, x], -1).cumsum(-1))
    return transmittance[..., :-1] * -torch.expm1(-x), transmittance


def optical_depths(sigma: Tensor, dt: Tensor) -> Tensor:
    """sigma dt with inf * 0 = 0 of densities and widths of one shape.

    An infinite density is a constant. Plain PyTorch, on any device.
    """
    wall = sigma == torch.inf
    through_wall = torch.where(dt == 0, dt, dt * torch.inf).detach()
    return torch.where(wall, through_wall, sigma.masked_fill(wall, 0) * dt)
