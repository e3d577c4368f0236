from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..domain import csr, nonnegative, positive
from ..op import op
from ..packed import PackedOp, PackedRays
from .depth_loss import depth_terms

__all__ = [
    "packed_depth_loss",
    "packed_ds_nerf_depth_loss",
    "packed_urban_radiance_field_depth_loss",
]


@op(
    "w[P] s[P] depth[R] offsets[R+1] lengths?[P] depth_pred?[R] -> loss[R]",
    domain=dict(
        w=nonnegative,
        depth=positive,
        offsets=csr,
        lengths=nonnegative,
        sigma=positive,
        eps=positive,
    ),
    constant=("depth",),
    base=PackedOp,
)
def packed_depth_loss(
    w: Tensor,
    s: Tensor,
    depth: Tensor,
    offsets: Tensor,
    *,
    lengths: Tensor | None = None,
    depth_pred: Tensor | None = None,
    form: Literal["ds_nerf", "urban", "urban_mass"] = "ds_nerf",
    sigma: float = 0.01,
    eps: float = 1e-7,
) -> Tensor:
    """How far the weights of packed rays are from a surface at a measured depth:
    sum_i lengths_i f(w_i, s_i - depth) + (depth - depth_pred)^2.

    `depth_loss` for rays with any numbers of samples; f and the forms are those there
    (docs/depth.md). `packed_ds_nerf_depth_loss` and `packed_urban_radiance_field_depth_loss` take
    the arguments of each.

    Args:
        w: [P] weights of the samples, dimensionless.
        s: [P] positions of the samples along the ray, in the unit of depth.
        depth: [R] measured depths; a ray whose depth is not positive, infinite or NaN counts as 0
            and has gradients of exactly 0, whatever else it holds. Gets no gradient.
        offsets: [R+1] int64: ray r has samples offsets[r] up to offsets[r + 1]. They rise from 0
            to P. On a GPU, where a look at them would synchronise, others give wrong values in
            silence unless in debug mode.
        lengths: [P] lengths of the samples; if absent ones, and zeros for "urban_mass".
        depth_pred: [R] rendered depths; no such term if absent.
        form: which f.
        sigma: how far off depths are, > 0: a variance for "ds_nerf", three standard deviations for
            the others.
        eps: keeps the logarithm of "ds_nerf" finite, > 0.

    Returns:
        The loss: 0-d, or [R] with `reduction="none"`; of a ray without samples the term of
        depth_pred is left. The mean is over all rays, those without a depth included; divide by
        the others with `denominator=`. float32 for half precision inputs. Differentiable in w, s,
        lengths and depth_pred, twice through the reference.

    Raises:
        ValueError: for shapes, devices, a form, sigma or eps that do not fit, and for offsets on
            the CPU that do not rise from 0 to P.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ, and
            for offsets that are not int64.
        NotImplementedError: under vmap: concatenate the batch instead.

    Source:
        Deng et al., Depth-supervised NeRF (2022); Rematas et al., Urban Radiance Fields (2022);
        both as in nerfstudio.

    Example:
        >>> import torch, rayfuse
        >>> w, s = torch.tensor([0.2, 0.5, 0.0]), torch.tensor([1.0, 2.0, 3.0])
        >>> depth, offsets = torch.tensor([2.0, 1.0]), torch.tensor([0, 3, 3])
        >>> rayfuse.packed_depth_loss(w, s, depth, offsets, sigma=0.1, reduction="none")
        tensor([0.8126, 0.0000])
    """
    valid = (depth > 0) & depth.isfinite()
    rays = PackedRays(offsets, len(w))
    # selected before it is used as well: 0 times what is not finite would be a gradient of NaN
    here = valid[rays.ray] if len(w) else w.new_zeros(0, dtype=torch.bool)
    w, s, depth = torch.where(here, w, 1), torch.where(here, s, 1), torch.where(valid, depth, 1)
    lengths = None if lengths is None else torch.where(here, lengths, 1)
    of_samples = depth[rays.ray] if len(w) else w
    loss = rays.total(depth_terms(w, s, of_samples, lengths, form, sigma, eps))
    if depth_pred is not None:
        loss = loss + (depth - torch.where(valid, depth_pred, 1)).square()
    return torch.where(valid, loss, 0)


def packed_ds_nerf_depth_loss(
    w: Tensor,
    s: Tensor,
    lengths: Tensor,
    depth: Tensor,
    offsets: Tensor,
    *,
    sigma: float,
    eps: float = 1e-7,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Depth-supervised NeRF on packed rays: sum_i -log(w_i + eps) exp(-(s_i - depth)^2 / (2 sigma))
    lengths_i.

    Arguments, errors and source are those of `packed_depth_loss`.

    Example:
        >>> import torch, rayfuse
        >>> w, s = torch.tensor([0.2, 0.5, 0.0]), torch.tensor([1.0, 2.0, 3.0])
        >>> depth, offsets = torch.tensor([2.0]), torch.tensor([0, 3])
        >>> rayfuse.packed_ds_nerf_depth_loss(w, s, torch.ones(3), depth, offsets, sigma=0.1)
        tensor(0.8126)
    """
    return packed_depth_loss(
        w,
        s,
        depth,
        offsets,
        lengths=lengths,
        sigma=sigma,
        eps=eps,
        reduction=reduction,
        denominator=denominator,
    )


def packed_urban_radiance_field_depth_loss(
    w: Tensor,
    s: Tensor,
    depth: Tensor,
    depth_pred: Tensor,
    offsets: Tensor,
    *,
    sigma: float,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Urban Radiance Fields on packed rays: (depth - depth_pred)^2, the squared weights before the
    surface, and within sigma of it their squared distance from a normal density.

    Arguments, errors and source are those of `packed_depth_loss`.

    Example:
        >>> import torch, rayfuse
        >>> w, s = torch.tensor([0.2, 0.5, 0.0]), torch.tensor([1.0, 2.0, 3.0])
        >>> depth, depth_pred = torch.tensor([2.0]), torch.tensor([1.5])
        >>> rayfuse.packed_urban_radiance_field_depth_loss(
        ...     w, s, depth, depth_pred, torch.tensor([0, 3]), sigma=0.5
        ... )
        tensor(3.8759)
    """
    return packed_depth_loss(
        w,
        s,
        depth,
        offsets,
        depth_pred=depth_pred,
        form="urban",
        sigma=sigma,
        reduction=reduction,
        denominator=denominator,
    )
