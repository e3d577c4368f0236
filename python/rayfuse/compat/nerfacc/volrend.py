"""nerfacc.volrend: weights from densities or opacities, and what rays look like.

In all functions samples are batched [..., S], or packed [P] with `packed_info` [R, 2], or with
`ray_indices` [P], not decreasing, and `n_rays`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops.ray_weights import optical_depths
from .. import promoted, weighted
from .pack import packed_rays

__all__ = [
    "accumulate_along_rays",
    "accumulate_along_rays_",
    "render_transmittance_from_alpha",
    "render_transmittance_from_density",
    "render_visibility_from_alpha",
    "render_visibility_from_density",
    "render_weight_from_alpha",
    "render_weight_from_density",
    "rendering",
]


def rendering(
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    rgb_sigma_fn: Callable | None = None,
    rgb_alpha_fn: Callable | None = None,
    render_bkgd: Tensor | None = None,
    expected_depths: bool = True,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Colour, opacity and depth of rays through a radiance field, in one pass over its samples.

    Args:
        t_starts, t_ends: where the samples' intervals begin and end, batched or packed.
        rgb_sigma_fn: (t_starts, t_ends, ray_indices) -> colours [..., C], densities [...]; not
            called where there are no samples.
        rgb_alpha_fn: the same with opacities, where there is no rgb_sigma_fn.
        render_bkgd: what stands behind the samples, [C] or anything that broadcasts with [R, C].
        expected_depths: divide the depth by the opacity.

    Returns:
        colours [R, C], opacities [R, 1], depths [R, 1], and a dict of "weights", "trans", "alphas",
        "rgbs", and of "sigmas" where there are any.

    Example:
        >>> import torch
        >>> from rayfuse.compat import nerfacc
        >>> t, ray_indices = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0, 0, 2])
        >>> def field(t_starts, t_ends, ray_indices):
        ...     return torch.ones(3, 3), torch.full((3,), torch.inf)
        >>> rgb, opacity, depth, _ = nerfacc.rendering(t, t + 1, ray_indices, 3, field)
        >>> opacity.flatten(), depth.flatten()
        (tensor([1., 0., 1.]), tensor([0.5000, 0.0000, 0.5000]))
    """
    shape = t_starts.shape
    if ray_indices is not None and not shape == t_ends.shape == ray_indices.shape:
        got = [list(x.shape) for x in (t_starts, t_ends, ray_indices)]
        raise ValueError(f"t_starts, t_ends and ray_indices must have the same shape, got {got}")
    field = rgb_sigma_fn or rgb_alpha_fn
    if field is None:
        raise ValueError("give rgb_sigma_fn or rgb_alpha_fn, got neither")
    if t_starts.numel():
        rgbs, opaque = field(t_starts, t_ends, ray_indices)
    else:
        rgbs, opaque = t_starts.new_zeros(*shape, 3), torch.zeros_like(t_starts)
    if opaque.shape != shape or rgbs.shape[:-1] != shape:
        got = [list(x.shape) for x in (rgbs, opaque)]
        rule = f"of shapes {[*shape, 'C']} and {list(shape)}"
        raise ValueError(f"the field must return colours and densities {rule}, got {got}")
    rays: dict[str, Any] = dict(ray_indices=ray_indices, n_rays=n_rays)
    if rgb_sigma_fn is not None:
        weights, trans, alphas = render_weight_from_density(t_starts, t_ends, opaque, **rays)
        extras = {"weights": weights, "alphas": alphas, "trans": trans, "sigmas": opaque}
    else:
        weights, trans = render_weight_from_alpha(opaque, **rays)
        extras = {"weights": weights, "trans": trans, "alphas": opaque}

    starts, ends, w = promoted(t_starts, t_ends, weights)
    w, f = weighted(w, rgbs)
    starts, ends, w, offsets = packed_rays(starts.to(w), ends.to(w), w, **rays)
    f = f.reshape(len(w), -1) if len(w) else f.reshape(0, rgbs.shape[-1])
    if render_bkgd is not None:
        render_bkgd = render_bkgd.to(w).expand(len(offsets) - 1, f.shape[-1])
    colours, depths, opacities = ops.packed_composite_rays(
        starts, ends, w, offsets, f=f, background=render_bkgd
    )
    # nerfacc divides by eps at least, and has no depth where there is no opacity
    depths = depths * opacities
    if expected_depths:
        depths = depths / opacities.clamp_min(torch.finfo(rgbs.dtype).eps)
    leading = shape[:-1] if ray_indices is None else opacities.shape
    return (
        colours.view(*leading, -1),
        opacities.view(*leading, 1),
        depths.view(*leading, 1),
        extras | {"rgbs": rgbs},
    )


def render_transmittance_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> Tensor:
    """The light that reaches each sample: prod_{j<i} (1 - alpha_j), times prefix_trans.

    Example:
        >>> import torch
        >>> from rayfuse.compat import nerfacc
        >>> alphas, ray_indices = torch.tensor([0.5, 0.5, 1.0]), torch.tensor([0, 0, 1])
        >>> nerfacc.render_transmittance_from_alpha(alphas, ray_indices=ray_indices)
        tensor([1.0000, 0.5000, 1.0000])
    """
    return render_weight_from_alpha(alphas, packed_info, ray_indices, n_rays, prefix_trans)[1]


def render_transmittance_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The light that reaches each sample, exp(-sum_{j<i} sigma_j dt_j), and its opacity.

    Returns:
        trans, times prefix_trans, and alphas.

    Example:
        >>> import torch
        >>> from rayfuse.compat import nerfacc
        >>> t, sigmas, ray_indices = torch.zeros(2), torch.full((2,), 0.6931), torch.tensor([0, 0])
        >>> nerfacc.render_transmittance_from_density(t, t + 1, sigmas, ray_indices=ray_indices)
        (tensor([1.0000, 0.5000]), tensor([0.5000, 0.5000]))
    """
    _, trans, alphas = render_weight_from_density(
        t_starts, t_ends, sigmas, packed_info, ray_indices, n_rays, prefix_trans
    )
    return trans, alphas


def render_weight_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights trans_i alpha_i, and the light trans that reaches each sample.

    The gradient is exact at alpha = 1.

    Example:
        >>> import torch
        >>> from rayfuse.compat import nerfacc
        >>> alphas, ray_indices = torch.tensor([0.5, 0.5, 1.0]), torch.tensor([0, 0, 1])
        >>> nerfacc.render_weight_from_alpha(alphas, ray_indices=ray_indices)
        (tensor([0.5000, 0.2500, 1.0000]), tensor([1.0000, 0.5000, 1.0000]))
    """
    rays: dict[str, Any] = dict(packed_info=packed_info, ray_indices=ray_indices, n_rays=n_rays)
    w, trans, _ = ops.packed_alpha_weights(*packed_rays(alphas, **rays))
    return _prefixed(prefix_trans, w.view(alphas.shape), trans.view(alphas.shape))


def render_weight_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights trans_i alpha_i, the light trans that reaches each sample, and its opacity alpha.

    Example:
        >>> import torch
        >>> from rayfuse.compat import nerfacc
        >>> t, sigmas, ray_indices = torch.zeros(2), torch.full((2,), 0.6931), torch.tensor([0, 0])
        >>> nerfacc.render_weight_from_density(t, t + 1, sigmas, ray_indices=ray_indices)
        (tensor([0.5000, 0.2500]), tensor([1.0000, 0.5000]), tensor([0.5000, 0.5000]))
    """
    sigmas, t_starts, t_ends = promoted(sigmas, t_starts, t_ends)
    shape = sigmas.shape
    rays: dict[str, Any] = dict(packed_info=packed_info, ray_indices=ray_indices, n_rays=n_rays)
    w, trans, _ = ops.packed_ray_weights(*packed_rays(sigmas, t_starts, t_ends, **rays))
    alphas = -torch.expm1(-optical_depths(sigmas, t_ends - t_starts))
    return *_prefixed(prefix_trans, w.view(shape), trans.view(shape)), alphas


@torch.no_grad()
def render_visibility_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    early_stop_eps: float = 1e-4,
    alpha_thre: float = 0.0,
    prefix_trans: Tensor | None = None,
) -> Tensor:
    """Which samples have opacity alpha_thre, and get light early_stop_eps, at least: bool.

    Example:
        >>> import torch
        >>> from rayfuse.compat import nerfacc
        >>> alphas, ray_indices = torch.tensor([0.5, 1.0, 1.0]), torch.tensor([0, 0, 0])
        >>> nerfacc.render_visibility_from_alpha(alphas, ray_indices=ray_indices)
        tensor([ True,  True, False])
    """
    trans = render_transmittance_from_alpha(alphas, packed_info, ray_indices, n_rays, prefix_trans)
    return ops.visibility_mask(trans, alphas, early_stop_eps, alpha_thre)


@torch.no_grad()
def render_visibility_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    early_stop_eps: float = 1e-4,
    alpha_thre: float = 0.0,
    prefix_trans: Tensor | None = None,
) -> Tensor:
    """`render_visibility_from_alpha` of densities.

    Example:
        >>> import torch
        >>> from rayfuse.compat import nerfacc
        >>> t, sigmas, ray_indices = torch.zeros(2), torch.tensor([9.0, 0]), torch.tensor([0, 0])
        >>> nerfacc.render_visibility_from_density(
        ...     t, t + 1, sigmas, ray_indices=ray_indices, alpha_thre=0.01
        ... )
        tensor([ True, False])
    """
    trans, alphas = render_transmittance_from_density(
        t_starts, t_ends, sigmas, packed_info, ray_indices, n_rays, prefix_trans
    )
    return ops.visibility_mask(trans, alphas, early_stop_eps, alpha_thre)


def accumulate_along_rays(
    weights: Tensor,
    values: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
) -> Tensor:
    """The weighted sum of values along each ray.

    Args:
        weights: [..., S] or [P].
        values: [..., S, D] or [P, D]; without them the weights are summed, and D is 1.

    Returns:
        [..., D] or [R, D]. Differentiable in weights and values, deterministic on any device.

    Example:
        >>> import torch
        >>> from rayfuse.compat import nerfacc
        >>> w, ray_indices = torch.tensor([0.5, 0.25, 1.0]), torch.tensor([0, 0, 2])
        >>> nerfacc.accumulate_along_rays(w, ray_indices=ray_indices, n_rays=3).flatten()
        tensor([0.7500, 0.0000, 1.0000])
    """
    if values is not None and values.shape[:-1] != weights.shape:
        rule = f"have shape {[*weights.shape, 'D']} like weights"
        raise ValueError(f"accumulate_along_rays: values must {rule}, got {list(values.shape)}")
    if values is not None:
        weights, values = weighted(weights, values)
    if ray_indices is not None:
        w, offsets = packed_rays(weights, ray_indices=ray_indices, n_rays=n_rays)
        return ops.accumulate_along_rays(w, values, offsets=offsets)
    if values is None:
        return weights.sum(-1, keepdim=True)
    return ops.render_features(weights, values)


def accumulate_along_rays_(
    weights: Tensor,
    values: Tensor | None = None,
    ray_indices: Tensor | None = None,
    outputs: Tensor | None = None,
) -> None:
    """Add `accumulate_along_rays` to outputs, [..., D] or [R, D], in place.

    Example:
        >>> import torch
        >>> from rayfuse.compat.nerfacc.volrend import accumulate_along_rays_
        >>> total = torch.ones(2, 1)
        >>> accumulate_along_rays_(torch.tensor([0.5, 1.0]), None, torch.tensor([1, 1]), total)
        >>> total.flatten()
        tensor([1.0000, 2.5000])
    """
    if outputs is None:
        raise ValueError("accumulate_along_rays_: outputs must be a tensor, got None")
    n_rays = None if ray_indices is None else len(outputs)
    outputs.add_(accumulate_along_rays(weights, values, ray_indices, n_rays))


def _prefixed(prefix_trans: Tensor | None, w: Tensor, trans: Tensor) -> tuple[Tensor, Tensor]:
    return (w, trans) if prefix_trans is None else (prefix_trans * w, prefix_trans * trans)
