from __future__ import annotations

import torch
from torch import Tensor

from ..domain import unit
from ..op import op

__all__ = ["alpha_weights", "visibility_mask"]


@op("alpha[..., S] -> w[..., S] transmittance[..., S+1]", domain=dict(alpha=unit))
def alpha_weights(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the samples of a ray from their opacities: w_i = T_i alpha_i.

    T_i = prod_{j<i} (1 - alpha_j) is the light that reaches sample i. The gradient divides by
    nothing and is exact for opaque samples, alpha = 1.

    Args:
        alpha: [..., S] opacities, between 0 and 1.

    Returns:
        w: [..., S] weights, which sum to at most 1.
        transmittance: [..., S+1] light that reaches each sample; the last one is the background's.
        Both are float32 for half precision inputs, differentiable in alpha, twice through the
        reference.

    Raises:
        TypeError: for dtypes other than float64, float32, bfloat16, float16.

    Source:
        Porter and Duff, Compositing digital images (1984). docs/compositing.md

    Example:
        >>> import torch, rayfuse
        >>> rayfuse.alpha_weights(torch.tensor([0.5, 0.5, 1.0]))
        (tensor([0.5000, 0.2500, 0.2500]), tensor([1.0000, 0.5000, 0.2500, 0.0000]))
    """
    all_light = alpha.new_ones((*alpha.shape[:-1], 1))
    transmittance = torch.cat([all_light, 1 - alpha], -1).cumprod(-1)
    return transmittance[..., :-1] * alpha, transmittance


def visibility_mask(
    transmittance: Tensor, alpha: Tensor, early_stop_eps: float = 1e-4, alpha_thre: float = 0.0
) -> Tensor:
    """Samples worth shading: those that light reaches and that stop some of it. Plain PyTorch.

    Args:
        transmittance: [..., S] light that reaches each sample, or [..., S+1], as `ray_weights` and
            `alpha_weights` give it; [P] of packed rays.
        alpha: [..., S] opacities of the samples; [P] of packed rays.
        early_stop_eps: the light that must reach a sample at least.
        alpha_thre: the opacity that a sample must have at least.

    Returns:
        bool [..., S], without gradient.

    Source:
        Li et al., NerfAcc (2023), `render_visibility_from_alpha`.

    Example:
        >>> import torch, rayfuse
        >>> alpha = torch.tensor([0.0, 1.0, 0.5])
        >>> _, transmittance = rayfuse.alpha_weights(alpha)
        >>> rayfuse.visibility_mask(transmittance, alpha, alpha_thre=0.01)
        tensor([False,  True, False])
    """
    reached = transmittance[..., : alpha.shape[-1]] >= early_stop_eps
    return reached & (alpha >= alpha_thre)
