from __future__ import annotations

from torch import Tensor

from ..domain import csr, unit
from ..op import op
from ..packed import PackedOp, PackedRays

__all__ = ["packed_alpha_weights"]


@op(
    "alpha[P] offsets[R+1] -> w[P] transmittance[P] remaining[R]",
    domain=dict(alpha=unit, offsets=csr),
    base=PackedOp,
)
def packed_alpha_weights(alpha: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the samples of packed rays from their opacities: w_i = T_i alpha_i.

    T_i = prod_{j<i} (1 - alpha_j), of the same ray, is the light that reaches sample i:
    `alpha_weights` for rays with any numbers of samples. The gradient divides by nothing and is
    exact for opaque samples, alpha = 1. `visibility_mask` takes what it returns.

    Args:
        alpha: [P] opacities, between 0 and 1.
        offsets: [R+1] int64: ray r has samples offsets[r] up to offsets[r + 1]. They rise from 0
            to P. On a GPU, where a look at them would synchronise, others give wrong values in
            silence unless in debug mode.

    Returns:
        w: [P] weights, which sum to at most 1 in a ray.
        transmittance: [P] light that reaches each sample.
        remaining: [R] light that the background gets; 1 for an empty ray.
        All are float32 for half precision inputs, differentiable in alpha, twice through the
        reference.

    Raises:
        ValueError: for shapes or devices that do not match, and for offsets on the CPU that do not
            rise from 0 to P.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, and for offsets that
            are not int64.
        NotImplementedError: under vmap: concatenate the batch instead.

    Source:
        Porter and Duff, Compositing digital images (1984); Li et al., NerfAcc (2023),
        `render_weight_from_alpha`. docs/compositing.md

    Example:
        >>> import torch, rayfuse
        >>> alpha = torch.tensor([0.5, 1.0, 0.5])
        >>> rayfuse.packed_alpha_weights(alpha, torch.tensor([0, 2, 2, 3]))
        (tensor([0.5000, 0.5000, 0.5000]), tensor([1.0000, 0.5000, 1.0000]), \
tensor([0.0000, 1.0000, 0.5000]))
    """
    rays = PackedRays(offsets, len(alpha))
    passed = rays.running_product(1 - alpha)
    transmittance = rays.before(passed, 1.0)
    return transmittance * alpha, transmittance, rays.at_last(passed, 1.0)
