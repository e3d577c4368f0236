"""The whole objective of a feature field from what its levels hold: the ops, put together.

There is no kernel of this name. Weights are computed once and read by every op; one kernel for all
terms would move the same bytes but for the weights, and was measured not to be faster
(docs/objective.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from . import dims, ops

_SHAPES = dims.Signature.parse(
    "sigma[..., S] t[..., S+1] rgb?[..., S, C] features?[..., S, D] n?[..., S, 3]"
    " n_pred?[..., S, 3] d?[..., 3] s?[..., S+1] rgb_target?[..., C] features_target?[..., D]"
    " -> losses[...]"
)


class FieldLosses(NamedTuple):
    """What `field_losses` returns: losses, 0 where they are switched off, and renderings."""

    rgb_loss: Tensor
    feature_loss: Tensor
    orientation_loss: Tensor
    predicted_normal_loss: Tensor
    distortion_loss: Tensor
    interlevel_loss: Tensor
    rgb: Tensor  # [..., C]
    depth: Tensor  # [...]
    accumulation: Tensor  # [...]
    weights: Tensor  # [..., S]


def field_losses(
    sigma: Tensor,
    t: Tensor,
    *,
    rgb: Tensor | None = None,
    rgb_target: Tensor | None = None,
    features: Tensor | None = None,
    features_target: Tensor | None = None,
    n: Tensor | None = None,
    d: Tensor | None = None,
    n_pred: Tensor | None = None,
    s: Tensor | None = None,
    proposals: Sequence[tuple[Tensor, Tensor]] = (),
    background: Tensor | float | None = None,
    last_sample: bool = False,
    depth: Literal["expected", "log_mean", "median", "none"] = "expected",
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> FieldLosses:
    """Every term of the objective of F3RM on nerfacto, unweighted, and what the rays render to.

    A term whose tensors are not all there costs nothing and is 0. Gradients flow as in nerfstudio:
    of the normals' losses none to the weights, and of the predicted normals' none to n; of the
    interlevel loss to the proposals alone. That of the predicted normals costs one pass more where
    n wants a gradient (docs/objective.md).

    Args:
        sigma: [..., S] densities of the final level, as in `ray_weights`.
        t: [..., S+1] edges of its intervals, not decreasing, in the unit of depth.

    Keyword Args:
        rgb, rgb_target: [..., S, C] and [..., C] colours of the samples, and those wanted: of
            RGBA targets `blend_background` makes them.
        features, features_target: [..., S, D] and [..., D] features to distil. These and rgb may be
            of half precision beside float32.
        n, d, n_pred: [..., S, 3] normals, [..., 3] directions of the rays, [..., S, 3] predicted
            normals. n and d give the orientation loss, n and n_pred that of the predicted normals.
        s: [..., S+1] the edges in normalised distance; they give the distortion loss.
        proposals: for each level (s_env [..., E+1], w_env [..., E]), its edges in the unit of s and
            its weights; they give the interlevel loss, the sum over the levels.
        background, last_sample, depth: as in `composite_rays`. A random background is a tensor
            [..., C], which the targets are blended with as well.
        reduction, denominator: of every loss over the rays, as in all losses.

    Returns:
        FieldLosses: six losses, 0-d, or [...] with `reduction="none"`; the rendered rgb [..., C],
        depth [...], accumulation [...], and the weights [..., S]. All are differentiable.

    Raises:
        ValueError: for shapes or devices that do not match, and for proposals without s.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ.

    Source:
        Shen et al., F3RM (2023); Tancik et al., Nerfstudio (2023), `NerfactoModel.get_loss_dict`.

    Example:
        >>> import torch, rayfuse
        >>> t = torch.tensor([0.0, 1.0, 2.0])
        >>> out = rayfuse.field_losses(torch.tensor([0.0, torch.inf]), t, s=t / 2, rgb=torch.eye(2),
        ...     rgb_target=torch.tensor([0.5, 1.0]))
        >>> out.rgb_loss, out.distortion_loss, out.depth
        (tensor(0.1250), tensor(0.1667), tensor(1.5000))
    """
    tensors = (sigma, t, rgb, features, n, n_pred, d, s, rgb_target, features_target)
    try:
        _SHAPES.bind([x if x is None else x.shape for x in tensors])
    except dims.ShapeError as error:
        raise ValueError(f"field_losses: {error}") from None
    if s is None and proposals:
        raise ValueError("field_losses: s must be given with proposals, got None")

    options: Any = dict(reduction=reduction, denominator=denominator)
    w, _ = ops.ray_weights(sigma, t)
    fixed = w.detach()
    if w.dtype != sigma.dtype:  # sums of half precision are float32
        t = t.to(w.dtype)
        s, n, d, n_pred = (x if x is None else x.to(w.dtype) for x in (s, n, d, n_pred))
        proposals = [(s_env.to(w.dtype), w_env.to(w.dtype)) for s_env, w_env in proposals]
        if isinstance(background, Tensor):
            background = background.to(w.dtype)
    rendered = ops.composite_rays(
        t, w, f=rgb, background=background, last_sample=last_sample, depth=depth
    )
    none = w.new_zeros(w.shape[:-1] if reduction == "none" else ())
    rgb_loss = feature_loss = orientation = predicted = distortion = interlevel = none
    if rgb is not None and rgb_target is not None:
        # what is rendered already, as one sample of weight 1
        whole = w.new_ones((*w.shape[:-1], 1))
        colour = rendered.features[..., None, :]
        rgb_loss = ops.feature_distillation_loss(whole, colour, rgb_target, **options)
    if features is not None and features_target is not None:
        feature_loss = ops.feature_distillation_loss(w, features, features_target, **options)
    if n is not None and n_pred is not None and n.requires_grad:
        predicted = ops.predicted_normal_loss(fixed, n.detach(), n_pred, **options)
        if d is not None:
            orientation = ops.orientation_loss(fixed, n, d, **options)
    elif n is not None and (d is not None or n_pred is not None):
        orientation, predicted = ops.normal_losses(fixed, n, n_pred=n_pred, d=d, **options)
    if s is not None:
        distortion = ops.distortion_loss(s, w, **options)
        for s_env, w_env in proposals:
            interlevel = interlevel + ops.interlevel_loss(s, fixed, s_env, w_env, **options)
    return FieldLosses(
        rgb_loss,
        feature_loss,
        orientation,
        predicted,
        distortion,
        interlevel,
        rgb=rendered.features,
        depth=rendered.depth,
        accumulation=rendered.accumulation,
        weights=w,
    )
