from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..domain import csr, nonnegative
from ..op import op
from ..packed import PackedOp, PackedRays

__all__ = ["packed_normal_losses", "packed_orientation_loss", "packed_predicted_normal_loss"]


@op(
    "w[P] n[P, 3] offsets[R+1] n_pred?[P, 3] d?[R, 3]"
    " -> orientation_loss[R] predicted_normal_loss[R]",
    domain=dict(w=nonnegative, offsets=csr),
    base=PackedOp,
)
def packed_normal_losses(
    w: Tensor,
    n: Tensor,
    offsets: Tensor,
    *,
    n_pred: Tensor | None = None,
    d: Tensor | None = None,
    nan: Literal["drop", "propagate"] = "drop",
) -> tuple[Tensor, Tensor]:
    """Both losses of Ref-NeRF on normals of packed rays in one pass: sum_k w_k min(0, n_k . v)^2
    with v = -d, and sum_k w_k (1 - n_k . n_pred_k).

    `normal_losses` for rays with any numbers of samples, empty rays included. A loss whose tensor
    is absent costs nothing and is 0: without d the first, without n_pred the second.
    `packed_orientation_loss` and `packed_predicted_normal_loss` are each of them alone
    (docs/normals.md).

    Args:
        w: [P] weights of the samples, dimensionless.
        n: [P, 3] normals.
        offsets: [R+1] int64: ray r has samples offsets[r] up to offsets[r + 1]. They rise from 0
            to P. On a GPU, where a look at them would synchronise, others give wrong values in
            silence unless in debug mode.
        n_pred: [P, 3] predicted normals.
        d: [R, 3] directions of the rays, from the camera into the scene.
        nan: what a sample whose n . v is NaN adds to the orientation loss: `"drop"` nothing, with
            gradients of exactly 0 (nerfstudio), `"propagate"` NaN (multinerf).

    Returns:
        orientation_loss and predicted_normal_loss, dimensionless: each 0-d, or [R] with
        `reduction="none"`; exactly 0 for an empty ray, which counts in the mean. float32 for half
        precision inputs. Differentiable in w, n, n_pred and d, twice through the reference.

    Raises:
        ValueError: for shapes or devices that do not match, and for offsets on the CPU that do not
            rise from 0 to P.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ, and
            for offsets that are not int64.
        NotImplementedError: under vmap: concatenate the batch instead.

    Source:
        Verbin et al., Ref-NeRF (2022), as in nerfstudio and multinerf.

    Example:
        >>> import torch, rayfuse
        >>> n, n_pred = torch.eye(3), torch.eye(3)[[0, 2, 1]]
        >>> w, offsets = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0, 1, 3])
        >>> d = torch.tensor([[0.6, -0.8, 0.0], [0.0, 0.0, 1.0]])
        >>> options = dict(n_pred=n_pred, d=d, reduction="none")
        >>> rayfuse.packed_normal_losses(w, n, offsets, **options)
        (tensor([0.1800, 0.2500]), tensor([0.0000, 0.5000]))
    """
    rays = PackedRays(offsets, len(w))
    orientation = predicted = w.new_zeros(len(offsets) - 1)
    if d is not None:
        # the way back adds up in order, whatever the number of threads
        d_here = d.index_select(0, rays.ray)
        away = (n * d_here).sum(-1)
        seen = away > 0 if nan == "drop" else ~(away <= 0)
        # selected before the product as well: 0 times what is not finite would be a gradient of NaN
        n_seen, d_seen = (torch.where(seen[:, None], x, 0.0) for x in (n, d_here))
        orientation = rays.total(w * (n_seen * d_seen).sum(-1).square())
    if n_pred is not None:
        predicted = rays.total(w * (1 - (n * n_pred).sum(-1)))
    return orientation, predicted


def packed_orientation_loss(
    w: Tensor,
    n: Tensor,
    d: Tensor,
    offsets: Tensor | None = None,
    *,
    ray_indices: Tensor | None = None,
    rays: int | None = None,
    nan: Literal["drop", "propagate"] = "drop",
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Weight of the normals of packed rays that turn away from the camera: sum_k w_k
    min(0, n_k . v)^2, v = -d.

    Arguments, errors and source are those of `packed_normal_losses`, which computes both losses of
    Ref-NeRF in the time of one.

    Example:
        >>> import torch, rayfuse
        >>> n, d = torch.eye(3), torch.tensor([[0.6, -0.8, 0.0]])
        >>> w, offsets = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0, 3])
        >>> rayfuse.packed_orientation_loss(w, n, d, offsets)
        tensor(0.1800)
    """
    where = _where(offsets, ray_indices, rays)
    options = dict(nan=nan, reduction=reduction, denominator=denominator)
    return packed_normal_losses(w, n, d=d, **where, **options)[0]


def packed_predicted_normal_loss(
    w: Tensor,
    n: Tensor,
    n_pred: Tensor,
    offsets: Tensor | None = None,
    *,
    ray_indices: Tensor | None = None,
    rays: int | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """How far predicted normals of packed rays are from those of the density: sum_k w_k
    (1 - n_k . n_pred_k).

    Arguments, errors and source are those of `packed_normal_losses`, which computes both losses of
    Ref-NeRF in the time of one.

    Example:
        >>> import torch, rayfuse
        >>> n, n_pred = torch.eye(3), torch.eye(3)[[0, 2, 1]]
        >>> w, offsets = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0, 3])
        >>> rayfuse.packed_predicted_normal_loss(w, n, n_pred, offsets)
        tensor(0.5000)
    """
    where = _where(offsets, ray_indices, rays)
    options = dict(reduction=reduction, denominator=denominator)
    return packed_normal_losses(w, n, n_pred=n_pred, **where, **options)[1]


def _where(offsets: Tensor | None, ray_indices: Tensor | None, rays: int | None) -> dict[str, Any]:
    """Those of the three that are given."""
    given = dict(offsets=offsets, ray_indices=ray_indices, rays=rays)
    return {name: x for name, x in given.items() if x is not None}
