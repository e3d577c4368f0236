from __future__ import annotations

import torch
from torch import Tensor

from ..domain import csr
from ..op import op
from ..packed import PackedOp, PackedRays
from .ray_weights import density, optical_depths

__all__ = ["packed_ray_weights"]


@op(
    "sigma[P] t_starts[P] t_ends[P] offsets[R+1] -> w[P] transmittance[P] remaining[R]",
    domain=dict(sigma=density, offsets=csr),
    base=PackedOp,
)
def packed_ray_weights(
    sigma: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    offsets: Tensor,
    *,
    opaque_background: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the samples of packed rays from their densities: w_i = T_i (1 - exp(-x_i)).

    x_i = sigma_i dt_i is the optical depth of a sample and T_i = exp(-sum_{j<i} x_j), of the same
    ray, the light that reaches it: `ray_weights` for rays with any numbers of samples, and
    intervals that need not touch. Values and gradients are finite for sigma = inf, which stands for
    an opaque sample, with inf * 0 = 0.

    Args:
        sigma: [P] densities, >= 0, per unit of t; inf is allowed.
        t_starts: [P] where the intervals begin, those of a ray in order.
        t_ends: [P] where they end, not after the next one begins.
        offsets: [R+1] int64: ray r has samples offsets[r] up to offsets[r + 1]. They rise from 0
            to P. On a GPU, where a look at them would synchronise, others give wrong values in
            silence unless in debug mode.

    Keyword Args:
        opaque_background: the last sample of a ray lets nothing through, whatever its density.

    Returns:
        w: [P] weights, which sum to at most 1 in a ray.
        transmittance: [P] light that reaches each sample.
        remaining: [R] light that the background gets; 1 for an empty ray.
        All are float32 for half precision inputs, differentiable in sigma, t_starts and t_ends,
        twice through the reference. An infinite density is a constant: nothing gets a gradient
        there.

    Raises:
        ValueError: for shapes or devices that do not match, and for offsets on the CPU that do not
            rise from 0 to P.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ, and
            for offsets that are not int64.
        NotImplementedError: under vmap: concatenate the batch instead.

    Source:
        Max, Optical models for direct volume rendering (1995); Li et al., NerfAcc (2023),
        `render_weight_from_density`. docs/compositing.md

    Example:
        >>> import torch, rayfuse
        >>> t, sigma = torch.tensor([0.0, 2.0, 0.0]), torch.tensor([0.6931, torch.inf, 0.6931])
        >>> rayfuse.packed_ray_weights(sigma, t, t + 1, torch.tensor([0, 2, 2, 3]))
        (tensor([0.5000, 0.5000, 0.5000]), tensor([1.0000, 0.5000, 1.0000]), \
tensor([0.0000, 1.0000, 0.5000]))
    """
    rays = PackedRays(offsets, len(sigma))
    x = optical_depths(sigma, t_ends - t_starts)
    if opaque_background:
        x = torch.where(rays.is_last, torch.inf, x)
    depth = rays.running_sum(x)
    transmittance = torch.exp(-rays.before(depth, 0.0))
    return transmittance * -torch.expm1(-x), transmittance, torch.exp(-rays.at_last(depth, 0.0))
