"""The weights of nerfstudio's `RaySamples`, for any number of batch dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import ops
from .. import promoted

__all__ = ["get_weights", "get_weights_and_transmittance_from_alphas"]


def get_weights(self: Any, densities: Tensor) -> Tensor:
    """Weights [..., S, 1] of samples from their densities and `deltas`, both [..., S, 1].

    Where delta is 0 the weight and its gradient are 0, also for an infinite density. A weight that
    is not a number is 0, as in nerfstudio.
    """
    deltas, densities = promoted(self.deltas[..., 0], densities[..., 0])
    # finite, so that 0 times it is 0; and intervals of width 1 leave the product as it is
    depths = deltas * densities.clamp(max=torch.finfo(densities.dtype).max)
    t = torch.arange(depths.shape[-1] + 1, dtype=depths.dtype, device=depths.device)
    w, _ = ops.ray_weights(depths, t.expand(*depths.shape[:-1], -1))
    # not a step of the graph: a ray whose weights are not numbers has no gradient to save
    with torch.no_grad():
        w.nan_to_num_()
    return w[..., None]


def get_weights_and_transmittance_from_alphas(
    alphas: Tensor, weights_only: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Weights [..., S, 1] of samples from their opacities, and the light that reaches each edge
    [..., S+1, 1]. Without the 1e-7 that nerfstudio adds: exact, with its gradient, at 1.
    """
    w, transmittance = ops.alpha_weights(alphas[..., 0])
    return w[..., None] if weights_only else (w[..., None], transmittance[..., None])
