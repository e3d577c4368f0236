from __future__ import annotations

from torch import Tensor

from ..domain import csr
from ..op import op
from ..packed import PackedOp, PackedRays

__all__ = ["packed_feature_distillation_loss"]


def error_and_products(
    w: Tensor, f: Tensor, target: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """What all gradients follow from without another look at f."""
    rays = PackedRays(offsets, len(w))
    error = rays.total(w[:, None] * f) - target
    of_sample = error[rays.ray] if len(error) else f.new_zeros(f.shape)
    return error, (f * of_sample).sum(-1)


@op(
    "w[P] f[P, C] target[R, C] offsets[R+1] -> loss[R] keeps error[R, C] product[P]",
    domain=dict(offsets=csr),
    narrow=("f", "target"),
    keep=error_and_products,
    base=PackedOp,
)
def packed_feature_distillation_loss(
    w: Tensor, f: Tensor, target: Tensor, offsets: Tensor
) -> Tensor:
    """Squared error of the rendered features of each packed ray: mean_c (sum_k w_k f_kc -
    target_c)^2.

    `feature_distillation_loss` for rays with any numbers of samples, empty rays included, which
    render to 0. Nothing of the size of f is ever stored but its gradient (docs/features.md).

    Args:
        w: [P] weights of the samples, dimensionless.
        f: [P, C] features of the samples, any C >= 1, any unit.
        target: [R, C] what those of a ray should add up to. f and target may be float16 or bfloat16
            where w is float32.
        offsets: [R+1] int64: ray r has samples offsets[r] up to offsets[r + 1]. They rise from 0
            to P. On a GPU, where a look at them would synchronise, others give wrong values in
            silence unless in debug mode.

    Returns:
        The loss, in the unit of f squared: 0-d, or [R] with `reduction="none"`. float32 for half
        precision inputs. Differentiable in w, f and target, twice through the reference.

    Raises:
        ValueError: for shapes or devices that do not match, and for offsets on the CPU that do not
            rise from 0 to P.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ, but
            for an f or target of half precision, and for offsets that are not int64.
        NotImplementedError: under vmap: concatenate the batch instead.

    Source:
        Shen et al., Distilled Feature Fields Enable Few-Shot Language-Guided Manipulation (F3RM,
        2023), section 3.1, on packed rays.

    Example:
        >>> import torch, rayfuse
        >>> w, f = torch.tensor([0.25, 0.75]), torch.tensor([[0.0, 4.0], [4.0, 4.0]])
        >>> target, offsets = torch.tensor([[3.0, 2.0], [0.0, 2.0]]), torch.tensor([0, 2, 2])
        >>> rayfuse.packed_feature_distillation_loss(w, f, target, offsets, reduction="none")
        tensor([2., 2.])
    """
    rendered = PackedRays(offsets, len(w)).total(w[:, None] * f)
    return (rendered - target).square().mean(-1)
