from __future__ import annotations

from torch import Tensor

from ..op import op


@op("w[..., S] f[..., S, C] -> features[..., C]", narrow=("f",))
def render_features(w: Tensor, f: Tensor) -> Tensor:
    """Features of each ray: sum_s w_s f_s over its samples.

    No product of the size of f is ever stored, and f is read as it is: in half precision it moves
    half the bytes, with sums in float32 (docs/features.md).

    Args:
        w: [..., S] weights of the samples, dimensionless.
        f: [..., S, C] features of the samples, any C, any unit; float16 or bfloat16 where w is
            float32, or of the dtype of w.

    Returns:
        [..., C], in the unit of f. float32 for half precision inputs. Differentiable in w and f,
        twice through the reference.

    Raises:
        ValueError: for shapes or devices that do not match.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ, but
            for an f of half precision.

    Source:
        Shen et al., Distilled Feature Fields Enable Few-Shot Language-Guided Manipulation (F3RM,
        2023), section 3.1.

    Example:
        >>> import torch, rayfuse
        >>> w = torch.tensor([0.25, 0.75])
        >>> rayfuse.render_features(w, torch.tensor([[0.0, 4.0, 8.0], [4.0, 4.0, 4.0]]))
        tensor([3., 4., 5.])
    """
    return (w[..., None] * f).sum(-2)
