"""nerfacc.losses: the distortion loss."""

from __future__ import annotations

from torch import Tensor

from ... import ops
from .. import promoted
from .pack import packed_rays

__all__ = ["distortion"]


def distortion(
    weights: Tensor, t_starts: Tensor, t_ends: Tensor, ray_indices: Tensor, n_rays: int
) -> Tensor:
    """Spread of the weights along each ray: sum_ij w_i w_j |m_i - m_j| + 1/3 sum_i w_i^2 dt_i.

    Args:
        weights: [P] weights of the samples.
        t_starts, t_ends: [P] where their intervals begin and end, in order along a ray.
        ray_indices: [P] int64, the ray of each sample, not decreasing.
        n_rays: R, the number of rays.

    Returns:
        [R, 1], 0 for an empty ray. Differentiable in weights, t_starts and t_ends.

    Source:
        Barron et al., Mip-NeRF 360 (2022), eq. 15; nerfacc, `losses.distortion`.

    Example:
        >>> import torch
        >>> from rayfuse.compat.nerfacc.losses import distortion
        >>> t = torch.tensor([0.0, 0.5, 0.0])
        >>> distortion(torch.ones(3), t, t + 0.5, torch.tensor([0, 0, 1]), 2)
        tensor([[1.3333],
                [0.1667]])
    """
    t_starts, t_ends, w = promoted(t_starts, t_ends, weights)
    args = packed_rays(t_starts, t_ends, w, ray_indices=ray_indices, n_rays=n_rays)
    return ops.packed_distortion_loss(*args, reduction="none")[:, None]
