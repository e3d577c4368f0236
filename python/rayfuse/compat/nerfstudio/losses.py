"""The ray losses of nerfstudio 1.1.5, `nerfstudio.model_components.losses`, which is not needed.

Ray samples are anything with `spacing_starts`, `spacing_ends` and `frustums.starts`, `.ends`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ... import backend, ops
from .. import packed, promoted

__all__ = [
    "DepthLossType",
    "depth_loss",
    "distortion_loss",
    "ds_nerf_depth_loss",
    "interlevel_loss",
    "lossfun_distortion",
    "lossfun_outer",
    "nerfstudio_distortion_loss",
    "orientation_loss",
    "outer",
    "pred_normal_loss",
    "ray_samples_to_sdist",
    "urban_radiance_field_depth_loss",
]

# what nerfstudio has as functions
FUNCTIONS = tuple(name for name in __all__ if name != "DepthLossType")
EPS = 1e-7


class DepthLossType(Enum):
    """Of `depth_loss`, which takes nerfstudio's own as well."""

    DS_NERF = 1
    URF = 2
    SPARSENERF_RANKING = 3


def outer(
    t0_starts: Tensor, t0_ends: Tensor, t1_starts: Tensor, t1_ends: Tensor, y1: Tensor
) -> Tensor:
    """Weight [..., S] of all bins [..., E] that an interval touches, intervals of any kind.

    Plain PyTorch, as intervals here need not touch; `lossfun_outer` is fused.
    """
    last = y1.shape[-1] - 1
    first_bin = torch.searchsorted(t1_starts.contiguous(), t0_starts.contiguous(), right=True) - 1
    last_bin = torch.searchsorted(t1_ends.contiguous(), t0_ends.contiguous(), right=True)
    until = torch.nn.functional.pad(y1, (1, 0)).cumsum(-1)
    begin, end = first_bin.clamp(0, last), last_bin.clamp(0, last) + 1
    return until.gather(-1, end) - until.gather(-1, begin)


def lossfun_outer(t: Tensor, w: Tensor, t_env: Tensor, w_env: Tensor) -> Tensor:
    """Weight that the envelope fails to cover [..., S]: max(0, w - w_outer)^2 / (w + 1e-7)."""
    t, w, t_env, w_env = promoted(t, w, t_env, w_env)
    return (w - ops.outer_bound(t, t_env, w_env)).clamp(min=0) ** 2 / (w + EPS)


def ray_samples_to_sdist(ray_samples: Any) -> Tensor:
    """Edges [..., S+1] of the samples in normalised distance."""
    return edges(ray_samples.spacing_starts, ray_samples.spacing_ends)


def edges(starts: Tensor, ends: Tensor) -> Tensor:
    """Edges [..., S+1] of intervals [..., S, 1] that touch, as nerfstudio's samplers make them.

    Without a copy where both are views of the edges, as there. In debug mode intervals that do not
    touch are an error.
    """
    if _are_views_of_edges(starts, ends):
        *leading, S, _ = starts.shape
        return starts.as_strided((*leading, S + 1), starts.stride()[:-1])
    if backend.debugging() and not torch.equal(starts[..., 1:, :], ends[..., :-1, :]):
        raise ValueError("edges: starts must be where the interval before ends, got a gap")
    return torch.cat([starts[..., 0], ends[..., -1:, 0]], -1)


def _are_views_of_edges(starts: Tensor, ends: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    step = starts.stride(-2) * starts.element_size()
    return (
        not starts.requires_grad
        and not ends.requires_grad
        and starts.shape == ends.shape
        and starts.dtype == ends.dtype
        and starts.stride()[:-1] == ends.stride()[:-1]
        and step > 0
        and ends.data_ptr() == starts.data_ptr() + step
    )


def interlevel_loss(weights_list: Sequence[Tensor], ray_samples_list: Sequence[Any]) -> Tensor:
    """Sum over the proposals of the mean of `lossfun_outer`; the final level gets no gradient."""
    if len(weights_list) < 2:
        got = len(weights_list)
        raise ValueError(
            f"interlevel_loss: weights_list must hold a proposal and the final level, got {got}"
        )
    t = ray_samples_to_sdist(ray_samples_list[-1]).detach()
    w = weights_list[-1][..., 0].detach()
    losses = [
        ops.interlevel_loss(*promoted(t, w, ray_samples_to_sdist(samples), weights[..., 0]))
        for samples, weights in zip(ray_samples_list[:-1], weights_list[:-1], strict=True)
    ]
    return torch.stack(losses).sum()


def lossfun_distortion(t: Tensor, w: Tensor) -> Tensor:
    """Distortion loss of each ray [...] from edges [..., S+1] and weights [..., S]."""
    return ops.distortion_loss(*promoted(t, w), reduction="none")


def distortion_loss(weights_list: Sequence[Tensor], ray_samples_list: Sequence[Any]) -> Tensor:
    """Mean of `lossfun_distortion` over the rays of the final level."""
    t, w = ray_samples_to_sdist(ray_samples_list[-1]), weights_list[-1][..., 0]
    return ops.distortion_loss(*promoted(t, w))


def nerfstudio_distortion_loss(
    ray_samples: Any, densities: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Distortion loss of each ray [..., 1] from weights [..., S, 1], or from densities.

    Intervals need not touch.
    """
    if (densities is None) == (weights is None):
        got = "neither" if weights is None else "both"
        raise ValueError(f"nerfstudio_distortion_loss: give densities or weights, got {got}")
    w = ray_samples.get_weights(densities) if weights is None else weights
    tensors = promoted(ray_samples.spacing_starts, ray_samples.spacing_ends, w)
    tensors = [x[..., 0].broadcast_to(w.shape[:-1]) for x in tensors]
    loss = ops.packed_distortion_loss(*packed(*tensors), reduction="none")
    return loss.view(*w.shape[:-2], 1)


def orientation_loss(weights: Tensor, normals: Tensor, viewdirs: Tensor) -> Tensor:
    """Weight of the normals that turn away from the camera, of each ray [...]."""
    w, n, d = promoted(weights[..., 0], normals, viewdirs)
    return ops.orientation_loss(w, n, d, reduction="none")


def pred_normal_loss(weights: Tensor, normals: Tensor, pred_normals: Tensor) -> Tensor:
    """How far predicted normals are from those of the density, of each ray [...]."""
    w, n, n_pred = promoted(weights[..., 0], normals, pred_normals)
    return ops.predicted_normal_loss(w, n, n_pred, reduction="none")


def ds_nerf_depth_loss(
    weights: Tensor,
    termination_depth: Tensor,
    steps: Tensor,
    lengths: Tensor,
    sigma: float | Tensor,
) -> Tensor:
    """Depth loss of DS-NeRF, 0-d: the mean over all rays of those whose depth is > 0.

    weights, steps and lengths are [..., S, 1], termination_depth is [..., 1]. A sigma on a GPU is
    waited for.
    """
    tensors = promoted(*(x[..., 0] for x in (weights, steps, lengths, termination_depth)))
    return ops.ds_nerf_depth_loss(*tensors, sigma=float(sigma))


def urban_radiance_field_depth_loss(
    weights: Tensor,
    termination_depth: Tensor,
    predicted_depth: Tensor,
    steps: Tensor,
    sigma: float | Tensor,
) -> Tensor:
    """Lidar losses of Urban Radiance Fields, 0-d: the mean over all rays of those with depth > 0.

    weights and steps are [..., S, 1], both depths are [..., 1]. A sigma on a GPU is waited for.
    """
    arguments = (weights, steps, termination_depth, predicted_depth)
    tensors = promoted(*(x[..., 0] for x in arguments))
    return ops.urban_radiance_field_depth_loss(*tensors, sigma=float(sigma))


def depth_loss(
    weights: Tensor,
    ray_samples: Any,
    termination_depth: Tensor,
    predicted_depth: Tensor,
    sigma: float | Tensor,
    directions_norm: Tensor,
    is_euclidean: bool,
    depth_loss_type: Enum,
) -> Tensor:
    """`ds_nerf_depth_loss` or `urban_radiance_field_depth_loss`, at the midpoints of the samples.

    A depth along the camera's axis becomes one along the ray by the norm of its direction.
    """
    if not is_euclidean:
        termination_depth = termination_depth * directions_norm
    starts, ends = ray_samples.frustums.starts, ray_samples.frustums.ends
    steps = (starts + ends) / 2
    # by name, as nerfstudio has the same choices of its own
    if depth_loss_type.name == "DS_NERF":
        return ds_nerf_depth_loss(weights, termination_depth, steps, ends - starts, sigma)
    if depth_loss_type.name == "URF":
        return urban_radiance_field_depth_loss(
            weights, termination_depth, predicted_depth, steps, sigma
        )
    raise NotImplementedError(
        f"depth_loss: depth_loss_type must be DS_NERF or URF, got {depth_loss_type.name}"
    )
