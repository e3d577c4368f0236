from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..domain import increasing, nonnegative, positive
from ..op import op

__all__ = ["depth_loss", "ds_nerf_depth_loss", "urban_radiance_field_depth_loss"]


@op(
    "w[..., S] s[..., S] depth[...] lengths?[..., S] depth_pred?[...] -> loss[...]",
    domain=dict(
        w=nonnegative,
        s=increasing,
        depth=positive,
        lengths=nonnegative,
        sigma=positive,
        eps=positive,
    ),
    constant=("depth",),
)
def depth_loss(
    w: Tensor,
    s: Tensor,
    depth: Tensor,
    *,
    lengths: Tensor | None = None,
    depth_pred: Tensor | None = None,
    form: Literal["ds_nerf", "urban", "urban_mass"] = "ds_nerf",
    sigma: float = 0.01,
    eps: float = 1e-7,
) -> Tensor:
    """How far a ray's weights are from a surface at a measured depth:
    sum_i lengths_i f(w_i, s_i - depth) + (depth - depth_pred)^2.

    `form="ds_nerf"`: f = -log(w + eps) exp(-(s - depth)^2 / (2 sigma)), of Depth-supervised NeRF;
    it divides by 2 sigma, not by 2 sigma^2, as nerfstudio does. `form="urban"`: f = (w - N)^2
    within sigma of the depth, N the normal density of standard deviation sigma / 3 at s - depth;
    w^2 before that; 0 behind: of Urban Radiance Fields. `ds_nerf_depth_loss` and
    `urban_radiance_field_depth_loss` take the arguments of each.

    `form="urban_mass"` asks of intervals, which may be wider than sigma, what "urban" asks of
    points: sum_i (w_i - m_i)^2 with m the mass of that normal distribution between
    s - lengths / 2 and s + lengths / 2, 0 where an interval begins behind depth + sigma. Lengths
    are no factor there; without them an interval holds no mass.

    Args:
        w: [..., S] weights of the samples, dimensionless.
        s: [..., S] positions of the samples along the ray, in the unit of depth.
        depth: [...] measured depths; a ray whose depth is not positive, infinite or NaN counts as 0
            and has gradients of exactly 0, whatever else it holds. Gets no gradient.
        lengths: [..., S] lengths of the samples; if absent ones, and zeros for "urban_mass".
        depth_pred: [...] rendered depths; no such term if absent.
        form: which f.
        sigma: how far off depths are, > 0: a variance for "ds_nerf", three standard deviations for
            the others.
        eps: keeps the logarithm of "ds_nerf" finite, > 0.

    Returns:
        The loss: 0-d, or [...] with `reduction="none"`. The mean is over all rays, those without a
        depth included; divide by the others with `denominator=`. float32 for half precision inputs.
        Differentiable in w, s, lengths and depth_pred, twice through the reference.

    Raises:
        ValueError: for shapes, devices, a form, sigma or eps that do not fit.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ.

    Source:
        Deng et al., Depth-supervised NeRF (2022); Rematas et al., Urban Radiance Fields (2022);
        both as in nerfstudio.

    Example:
        >>> import torch, rayfuse
        >>> s = torch.tensor([[1.0, 2.0, 3.0]])
        >>> rayfuse.depth_loss(torch.tensor([[0.2, 0.5, 0.0]]), s, torch.tensor([2.0]), sigma=0.1)
        tensor(0.8126)
    """
    valid = (depth > 0) & depth.isfinite()
    # selected before it is used as well: 0 times what is not finite would be a gradient of NaN
    here = valid[..., None]
    w, s, depth = torch.where(here, w, 1), torch.where(here, s, 1), torch.where(valid, depth, 1)
    lengths = None if lengths is None else torch.where(here, lengths, 1)
    loss = depth_terms(w, s, depth[..., None], lengths, form, sigma, eps).sum(-1)
    if depth_pred is not None:
        loss = loss + (depth - torch.where(valid, depth_pred, 1)).square()
    return torch.where(valid, loss, 0)


def depth_terms(
    w: Tensor,
    s: Tensor,
    depth: Tensor,
    lengths: Tensor | None,
    form: str,
    sigma: float,
    eps: float,
) -> Tensor:
    """What each sample adds to the loss of its ray, which has this depth."""
    if form == "urban_mass":
        half = 0 if lengths is None else lengths / 2
        begin, end = s - half, s + half
        scale = 3 / (sigma * math.sqrt(2))
        mass = (torch.erf((end - depth) * scale) - torch.erf((begin - depth) * scale)) / 2
        # a NaN is not behind
        return torch.where(begin > depth + sigma, 0, (w - mass).square())
    z = s - depth
    if form == "ds_nerf":
        f = -torch.log(w + eps) * torch.exp(-z.square() / (2 * sigma))
    else:
        scale = sigma / 3
        density = torch.exp(-(z / scale).square() / 2) / (scale * math.sqrt(2 * math.pi))
        # a NaN is neither before nor behind
        before, behind = s < depth - sigma, s > depth + sigma
        f = torch.where(behind, 0, (w - torch.where(before, 0, density)).square())
    return f if lengths is None else lengths * f


def ds_nerf_depth_loss(
    w: Tensor,
    s: Tensor,
    lengths: Tensor,
    depth: Tensor,
    *,
    sigma: float,
    eps: float = 1e-7,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Depth-supervised NeRF: sum_i -log(w_i + eps) exp(-(s_i - depth)^2 / (2 sigma)) lengths_i.

    Arguments, errors and source are those of `depth_loss`.

    Example:
        >>> import torch, rayfuse
        >>> w, s = torch.tensor([[0.2, 0.5, 0.0]]), torch.tensor([[1.0, 2.0, 3.0]])
        >>> rayfuse.ds_nerf_depth_loss(w, s, torch.ones(1, 3), torch.tensor([2.0]), sigma=0.1)
        tensor(0.8126)
    """
    return depth_loss(
        w,
        s,
        depth,
        lengths=lengths,
        sigma=sigma,
        eps=eps,
        reduction=reduction,
        denominator=denominator,
    )


def urban_radiance_field_depth_loss(
    w: Tensor,
    s: Tensor,
    depth: Tensor,
    depth_pred: Tensor,
    *,
    sigma: float,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Urban Radiance Fields: (depth - depth_pred)^2, the squared weights before the surface, and
    within sigma of it their squared distance from a normal density.

    Arguments, errors and source are those of `depth_loss`.

    Example:
        >>> import torch, rayfuse
        >>> w, s = torch.tensor([[0.2, 0.5, 0.0]]), torch.tensor([[1.0, 2.0, 3.0]])
        >>> depth, depth_pred = torch.tensor([2.0]), torch.tensor([1.5])
        >>> rayfuse.urban_radiance_field_depth_loss(w, s, depth, depth_pred, sigma=0.5)
        tensor(3.8759)
    """
    return depth_loss(
        w,
        s,
        depth,
        depth_pred=depth_pred,
        form="urban",
        sigma=sigma,
        reduction=reduction,
        denominator=denominator,
    )
