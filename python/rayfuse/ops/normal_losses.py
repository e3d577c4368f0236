from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..domain import nonnegative
from ..op import op

__all__ = ["normal_losses", "orientation_loss", "predicted_normal_loss"]


@op(
    "w[..., S] n[..., S, 3] n_pred?[..., S, 3] d?[..., 3]"
    " -> orientation_loss[...] predicted_normal_loss[...]",
    domain=dict(w=nonnegative),
)
def normal_losses(
    w: Tensor,
    n: Tensor,
    *,
    n_pred: Tensor | None = None,
    d: Tensor | None = None,
    nan: Literal["drop", "propagate"] = "drop",
) -> tuple[Tensor, Tensor]:
    """Both losses of Ref-NeRF on normals in one pass: sum_i w_i min(0, n_i . v)^2 with v = -d, and
    sum_i w_i (1 - n_i . n_pred_i).

    The first turns visible normals towards the camera, the second ties predicted normals to those
    of the density. Nothing is normalised. A loss whose tensor is absent costs nothing and is 0:
    without d the first, without n_pred the second. `orientation_loss` and `predicted_normal_loss`
    are each of them alone.

    Args:
        w: [..., S] weights of the samples, dimensionless.
        n: [..., S, 3] normals.
        n_pred: [..., S, 3] predicted normals.
        d: [..., 3] directions of the rays, from the camera into the scene.
        nan: what a sample whose n . v is NaN adds to the orientation loss: `"drop"` nothing, with
            gradients of exactly 0 (nerfstudio), `"propagate"` NaN (multinerf).

    Returns:
        orientation_loss and predicted_normal_loss, dimensionless, for unit vectors between 0 and
        the sum of the weights, and twice that: each 0-d, or [...] with `reduction="none"`. float32
        for half precision inputs. Differentiable in all four, twice through the reference.

    Raises:
        ValueError: for shapes or devices that do not match.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ.

    Source:
        Verbin et al., Ref-NeRF (2022), as in nerfstudio and multinerf.

    Example:
        >>> import torch, rayfuse
        >>> n, n_pred = torch.eye(3)[None], torch.eye(3)[None, [0, 2, 1]]
        >>> d = torch.tensor([[0.6, -0.8, 0.0]])
        >>> rayfuse.normal_losses(torch.tensor([[0.5, 0.25, 0.25]]), n, n_pred=n_pred, d=d)
        (tensor(0.1800), tensor(0.5000))
    """
    orientation = predicted = w.new_zeros(w.shape[:-1])
    if d is not None:
        away = (n * d[..., None, :]).sum(-1)
        seen = away > 0 if nan == "drop" else ~(away <= 0)
        # selected before the product as well: 0 times what is not finite would be a gradient of NaN
        n_seen, d_seen = (torch.where(seen[..., None], x, 0.0) for x in (n, d[..., None, :]))
        orientation = (w * (n_seen * d_seen).sum(-1).square()).sum(-1)
    if n_pred is not None:
        predicted = (w * (1 - (n * n_pred).sum(-1))).sum(-1)
    return orientation, predicted


def orientation_loss(
    w: Tensor,
    n: Tensor,
    d: Tensor,
    *,
    nan: Literal["drop", "propagate"] = "drop",
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Weight of the normals that turn away from the camera: sum_i w_i min(0, n_i . v)^2, v = -d.

    Arguments, errors and source are those of `normal_losses`, which computes both losses of
    Ref-NeRF in the time of one.

    Example:
        >>> import torch, rayfuse
        >>> n, d = torch.eye(3)[None], torch.tensor([[0.6, -0.8, 0.0]])
        >>> rayfuse.orientation_loss(torch.tensor([[0.5, 0.25, 0.25]]), n, d)
        tensor(0.1800)
    """
    options = dict(nan=nan, reduction=reduction, denominator=denominator)
    return normal_losses(w, n, d=d, **options)[0]


def predicted_normal_loss(
    w: Tensor,
    n: Tensor,
    n_pred: Tensor,
    *,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """How far predicted normals are from those of the density: sum_i w_i (1 - n_i . n_pred_i).

    Arguments, errors and source are those of `normal_losses`, which computes both losses of
    Ref-NeRF in the time of one.

    Example:
        >>> import torch, rayfuse
        >>> n, n_pred = torch.eye(3)[None], torch.eye(3)[None, [0, 2, 1]]
        >>> rayfuse.predicted_normal_loss(torch.tensor([[0.5, 0.25, 0.25]]), n, n_pred)
        tensor(0.5000)
    """
    options = dict(reduction=reduction, denominator=denominator)
    return normal_losses(w, n, n_pred=n_pred, **options)[1]
