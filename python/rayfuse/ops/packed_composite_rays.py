from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..domain import csr
from ..op import op
from ..packed import PackedOp, PackedRays
from .composite_rays import EXPECTED_EPS, LOG_MEAN_EPS, CompositeOp, weight
from .ray_weights import optical_depths

__all__ = ["accumulate_along_rays", "packed_composite_rays"]


class PackedCompositeOp(PackedOp, CompositeOp):
    def _rays(self, values: dict[str, Any]) -> tuple[int, ...] | None:
        offsets = values["offsets"]
        return (max(offsets.numel() - 1, 0),) if isinstance(offsets, Tensor) else None


@op(
    "t_starts[P] t_ends[P] w[P] offsets[R+1] f?[P, C] background?[R, C]"
    " -> features[R, C] depth[R] accumulation[R]",
    domain=dict(w=weight, offsets=csr),
    narrow=("f",),
    base=PackedCompositeOp,
)
def packed_composite_rays(
    t_starts: Tensor,
    t_ends: Tensor,
    w: Tensor,
    offsets: Tensor,
    *,
    f: Tensor | None = None,
    background: Tensor | None = None,
    depth: Literal["expected", "log_mean", "median", "none"] = "expected",
    density: bool = False,
    last_sample: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Colour, depth and opacity of packed rays from their samples, in one pass.

    features = sum_i w_i f_i + (1 - sum_i w_i) background: `composite_rays` for rays with any
    numbers of samples, and intervals that need not touch. With `density=True` w holds densities;
    their weights are then computed on the fly, and never stored. An empty ray shows its background
    at depth 0.

    Args:
        t_starts: [P] where the intervals begin, those of a ray in order.
        t_ends: [P] where they end, not after the next one begins.
        w: [P] weights, >= 0; or densities per unit of t with `density=True`, where inf is an opaque
            sample.
        offsets: [R+1] int64: ray r has samples offsets[r] up to offsets[r + 1]. They rise from 0
            to P. On a GPU, where a look at them would synchronise, others give wrong values in
            silence unless in debug mode.

    Keyword Args:
        f: [P, C] colours, or any features, of the samples. May be bfloat16 or float16 where the
            others are float32.
        background: [R, C], or [C] or a number, the same for all rays; None for black.
        depth: of the samples' midpoints s (docs/compositing.md):
            `"expected"`: sum w s / sum w, within the ray's own first and last midpoint.
            `"log_mean"`: exp(sum w log s / sum w), within the ray's first start and last end, for
            t > 0.
            `"median"`: the midpoint at which the sum of the weights reaches 1/2.
            `"none"`: 0, at no cost.
        density: w holds densities.
        last_sample: the features of a ray's last sample are its background.

    Returns:
        Composite(features [R, C], depth [R], accumulation [R] = sum w), float32 for half precision
        inputs. Differentiable in all tensors but offsets, twice through the reference; `"median"`
        is piecewise constant in w.

    Raises:
        ValueError: for shapes or devices that do not match, for two backgrounds, and for offsets on
            the CPU that do not rise from 0 to P.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ, and
            for offsets that are not int64.
        NotImplementedError: under vmap: concatenate the batch instead.

    Source:
        Mildenhall et al., NeRF (2020), eq. 3; Li et al., NerfAcc (2023), `rendering`; nerfstudio,
        `RGBRenderer`, `DepthRenderer`, which have neither the last sample nor the median for packed
        rays.

    Example:
        >>> import torch, rayfuse
        >>> t, w = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0.25, 0.25, 1.0])
        >>> f, offsets = torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([0, 2, 2, 3])
        >>> out = rayfuse.packed_composite_rays(t, t + 1, w, offsets, f, background=1.0)
        >>> out.features[:, 0], out.depth
        (tensor([1.5000, 1.0000, 2.0000]), tensor([2.0000, 0.0000, 5.5000]))
    """
    rays = PackedRays(offsets, len(w))
    if density:
        x = optical_depths(w, t_ends - t_starts)
        w = torch.exp(-rays.before(rays.running_sum(x), 0.0)) * -torch.expm1(-x)
    accumulation = rays.total(w)
    if f is None:
        channels = 0 if background is None else background.shape[-1]
        features = w.new_zeros(len(accumulation), channels)
    else:
        features = rays.total(w[:, None] * f)
        if last_sample:
            background = rays.at_last(f)
    if background is not None:
        features = features + (1 - accumulation)[:, None] * background
    if depth == "none":
        return features, torch.zeros_like(accumulation), accumulation

    # of a sum both would get one and the same tensor as their gradient
    mid = t_starts / 2 + t_ends / 2
    if depth == "median":
        # samples of a half at most are summed in double, as in a dense cumsum
        below = rays.total((rays.running_sum(w.double()) < 0.5).double()).long()
        last = rays.offsets.diff() - 1
        mids = torch.cat([mid.new_zeros(1), mid])
        at = rays.offsets[:-1] + torch.minimum(below, last)
        return features, mids[torch.where(last < 0, 0, at + 1)], accumulation
    if depth == "expected":
        distance = rays.total(w * mid) / (accumulation + EXPECTED_EPS)
        least, most = rays.at_last(rays.at_first(mid)), rays.at_last(mid)
    else:
        log_mid = mid.clamp(min=torch.finfo(mid.dtype).tiny).log()
        distance = (rays.total(w * log_mid) / accumulation.clamp(min=LOG_MEAN_EPS)).exp()
        least, most = rays.at_last(rays.at_first(t_starts)), rays.at_last(t_ends)
    distance = torch.where(distance < least, least, torch.where(distance > most, most, distance))
    return features, distance, accumulation


def accumulate_along_rays(
    w: Tensor,
    values: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    ray_indices: Tensor | None = None,
    rays: int | None = None,
) -> Tensor:
    """Sums over the samples of each packed ray, sum_i w_i values_i.

    Args:
        w: [P] weights.
        values: [P, D] of the samples; None for ones, D = 1.

    Keyword Args:
        offsets: [R+1] int64: ray r has samples offsets[r] up to offsets[r + 1].
        ray_indices, rays: [P] int64, not decreasing, and the number of rays, in place of offsets.

    Returns:
        [R, D]; 0 for an empty ray. Differentiable in w and values.

    Source:
        Li et al., NerfAcc (2023), the function of this name; on a GPU it adds in any order, this
        one always in the same.

    Example:
        >>> import torch, rayfuse
        >>> w, ray_indices = torch.tensor([0.25, 0.25, 1.0]), torch.tensor([0, 0, 2])
        >>> rayfuse.accumulate_along_rays(w, ray_indices=ray_indices, rays=3)
        tensor([[0.5000],
                [0.0000],
                [1.0000]])
    """
    given = dict(offsets=offsets, ray_indices=ray_indices, rays=rays)
    named = {name: x for name, x in given.items() if x is not None}
    # depth="none" looks at no interval
    t = w.detach() if isinstance(w, Tensor) else w
    out = packed_composite_rays(t, t, w, f=values, depth="none", **named)
    return out.accumulation[:, None] if values is None else out.features
