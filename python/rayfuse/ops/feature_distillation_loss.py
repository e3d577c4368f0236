from __future__ import annotations

from torch import Tensor

from ..op import op


def error_and_products(w: Tensor, f: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """What all gradients follow from without another look at f."""
    error = (w[..., None] * f).sum(-2) - target
    return error, (f * error[..., None, :]).sum(-1)


@op(
    "w[..., S] f[..., S, C] target[..., C] -> loss[...] keeps error[..., C] product[..., S]",
    narrow=("f", "target"),
    keep=error_and_products,
)
def feature_distillation_loss(w: Tensor, f: Tensor, target: Tensor) -> Tensor:
    """Squared error of the rendered features of each ray: mean_c (sum_s w_s f_sc - target_c)^2.

    With the mean over rays it is `F.mse_loss(rendered, target)`, the term that distils a 2D
    foundation model into a field. The forward keeps the error of the rendering, [..., C], and its
    products with the features, [..., S], so that the backward reads no features
    (docs/features.md).

    Args:
        w: [..., S] weights of the samples, dimensionless.
        f: [..., S, C] features of the samples, any C >= 1, any unit.
        target: [..., C] what they should add up to. f and target may be float16 or bfloat16 where
            w is float32.

    Returns:
        The loss, in the unit of f squared: 0-d, or [...] with `reduction="none"`. float32 for half
        precision inputs. Differentiable in w, f and target, twice through the reference.

    Raises:
        ValueError: for shapes or devices that do not match.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ, but
            for an f or target of half precision.

    Source:
        Shen et al., Distilled Feature Fields Enable Few-Shot Language-Guided Manipulation (F3RM,
        2023), section 3.1.

    Example:
        >>> import torch, rayfuse
        >>> w, f = torch.tensor([0.25, 0.75]), torch.tensor([[0.0, 4.0], [4.0, 4.0]])
        >>> rayfuse.feature_distillation_loss(w, f, torch.tensor([3.0, 2.0]))
        tensor(2.)
    """
    return ((w[..., None] * f).sum(-2) - target).square().mean(-1)
