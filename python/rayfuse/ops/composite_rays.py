from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..domain import Domain, increasing
from ..op import Op, op
from .ray_weights import ray_weights

__all__ = ["Composite", "blend_background", "blend_for_loss", "composite_rays"]

# weights or densities
weight = Domain("be finite or inf, and >= 0", lambda x: x >= 0, lambda u: 3 * u)

# what keeps the mean depth of a ray without weight finite: nerfstudio's, and multinerf's
EXPECTED_EPS = 1e-10
LOG_MEAN_EPS = torch.finfo(torch.float32).eps


class Composite(NamedTuple):
    """What `composite_rays` returns."""

    features: Tensor  # [..., C]
    depth: Tensor  # [...]
    accumulation: Tensor  # [...]


class CompositeOp(Op):
    """Takes a background that all rays share, f without its name, and names its results."""

    def _positional(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        required = [name for name in self._required if name not in named]
        if len(args) == len(required) + 1 and "f" not in named:
            args, named = args[:-1], {**named, "f": args[-1]}
        given = super()._positional(args, named)
        values: dict[str, Any] = dict(zip(self.domain, given, strict=True))
        background = values["background"]
        if background is not None and values["last_sample"]:
            self._fail(
                ValueError, "background", "be None with last_sample=True", type(background).__name__
            )
        w, f, rays = values["w"], values["f"], self._rays(values)
        if isinstance(background, (int, float)) and isinstance(w, Tensor):
            background = w.new_tensor([background])
        if isinstance(background, Tensor) and rays is not None:
            shared = background.dim() <= len(rays) or background.shape == (1,)
            if shared and (f is None or isinstance(f, Tensor)):
                channels = background.shape[-1:] if f is None else f.shape[-1:]
                background = background.expand(*rays, *channels)
        return tuple((values | dict(background=background)).values())

    def _rays(self, values: dict[str, Any]) -> tuple[int, ...] | None:
        """The shape of an output that has one value a ray; None where no tensor says it."""
        w = values["w"]
        return w.shape[:-1] if isinstance(w, Tensor) else None

    def public(self) -> Callable:
        call = super().public()

        @functools.wraps(call)
        def composite_rays(*args: Any, **named: Any) -> Composite:
            return Composite(*call(*args, **named))

        return composite_rays


@op(
    "t[..., S+1] w[..., S] f?[..., S, C] background?[..., C]"
    " -> features[..., C] depth[...] accumulation[...]",
    domain=dict(t=increasing, w=weight),
    narrow=("f",),
    base=CompositeOp,
)
def composite_rays(
    t: Tensor,
    w: Tensor,
    *,
    f: Tensor | None = None,
    background: Tensor | None = None,
    depth: Literal["expected", "log_mean", "median", "none"] = "expected",
    density: bool = False,
    last_sample: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Colour, depth and opacity of rays from their samples, in one pass.

    features = sum_i w_i f_i + (1 - sum_i w_i) background, with any number of channels: colour,
    normals, semantics. With `density=True` w holds densities; the weights of `ray_weights` are then
    computed on the fly, and never stored.

    Args:
        t: [..., S+1] edges of the intervals along the ray, not decreasing.
        w: [..., S] weights, >= 0; or densities per unit of t with `density=True`, where inf is an
            opaque sample.

    Keyword Args:
        f: [..., S, C] colours, or any features, of the samples. May be bfloat16 or float16 where
            t and w are float32.
        background: [..., C], or [C] or a number, the same for all rays; None for black.
        depth: of the samples' midpoints s (docs/compositing.md):
            `"expected"`: sum w s / sum w, within the ray's own first and last midpoint.
            `"log_mean"`: exp(sum w log s / sum w), within the ray's first and last edge, for t > 0.
            `"median"`: the midpoint at which the sum of the weights reaches 1/2.
            `"none"`: 0, at no cost.
        density: w holds densities.
        last_sample: the features of the last sample are the background.

    Returns:
        Composite(features [..., C], depth [...], accumulation [...] = sum w), float32 for
        half precision inputs. Differentiable in all tensors, twice through the reference;
        `"median"` is piecewise constant in w.

    Raises:
        ValueError: for shapes or devices that do not match, and for two backgrounds.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ.

    Source:
        Mildenhall et al., NeRF (2020), eq. 3; Barron et al., multinerf, `volumetric_rendering`;
        nerfstudio, `RGBRenderer`, `DepthRenderer`.

    Example:
        >>> import torch, rayfuse
        >>> t = torch.tensor([1.0, 2.0, 3.0])
        >>> w, f = torch.tensor([0.25, 0.25]), torch.tensor([[1.0], [3.0]])
        >>> rayfuse.composite_rays(t, w, f=f, background=1.0)
        Composite(features=tensor([1.5000]), depth=tensor(2.), accumulation=tensor(0.5000))
    """
    if density:
        w, _ = ray_weights.op.reference(w, t)
    accumulation = w.sum(-1)
    if f is None:
        features = w.new_zeros((*w.shape[:-1], 0 if background is None else background.shape[-1]))
    else:
        features = (w[..., None] * f).sum(-2)
        if last_sample and f.shape[-2]:
            background = f[..., -1, :]
    if background is not None:
        features = features + (1 - accumulation)[..., None] * background
    if depth == "none" or w.shape[-1] == 0:
        return features, torch.zeros_like(accumulation), accumulation

    mid = (t[..., 1:] + t[..., :-1]) / 2
    if depth == "median":
        k = (w.cumsum(-1) < 0.5).sum(-1, keepdim=True).clamp(max=w.shape[-1] - 1)
        return features, mid.gather(-1, k)[..., 0], accumulation
    if depth == "expected":
        distance = (w * mid).sum(-1) / (accumulation + EXPECTED_EPS)
        least, most = mid[..., 0], mid[..., -1]
    else:
        log_mid = mid.clamp(min=torch.finfo(mid.dtype).tiny).log()
        distance = ((w * log_mid).sum(-1) / accumulation.clamp(min=LOG_MEAN_EPS)).exp()
        least, most = t[..., 0], t[..., -1]
    distance = torch.where(distance < least, least, torch.where(distance > most, most, distance))
    return features, distance, accumulation


def blend_background(image: Tensor, background: Tensor | float) -> Tensor:
    """An RGBA image, its alpha not multiplied in, over a background. Plain PyTorch.

    Args:
        image: [..., 4], or [..., 3] without alpha, which is returned as it is.
        background: anything that broadcasts with [..., 3].

    Returns:
        [..., 3].

    Source:
        nerfstudio, `RGBRenderer.blend_background`.

    Example:
        >>> import torch, rayfuse
        >>> rayfuse.blend_background(torch.tensor([1.0, 0.0, 0.0, 0.25]), 1.0)
        tensor([1.0000, 0.7500, 0.7500])
    """
    if image.shape[-1] < 4:
        return image
    rgb, alpha = image[..., :3], image[..., 3:4]
    return rgb * alpha + background * (1 - alpha)


def blend_for_loss(
    features: Tensor,
    accumulation: Tensor,
    target: Tensor,
    background: Tensor | float | Literal["random", "last_sample"] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rendered colours and RGBA targets over the same background, to be compared. Plain PyTorch.

    A random background is put behind both here, and behind nothing in `composite_rays`: a field can
    then not hide transparency behind a colour that it knows.

    Args:
        features: [..., 3] rendered colours.
        accumulation: [...] their opacity.
        target: [..., 4], or [..., 3] without alpha.
        background: what `composite_rays` was given, which stands behind `features` already;
            `"random"` for a new colour per ray, with features rendered without a background; with
            `"last_sample"`, or None, the targets are put on black.

    Returns:
        features and target, [..., 3] each.

    Source:
        nerfstudio, `RGBRenderer.blend_background_for_loss_computation`.

    Example:
        >>> import torch, rayfuse
        >>> features, accumulation = torch.tensor([0.5, 0.0, 0.0]), torch.tensor(0.5)
        >>> rgba = torch.tensor([1.0, 0.0, 0.0, 0.5])
        >>> rayfuse.blend_for_loss(features, accumulation, rgba)
        (tensor([0.5000, 0.0000, 0.0000]), tensor([0.5000, 0.0000, 0.0000]))
    """
    if isinstance(background, str) and background == "random":
        background = torch.rand_like(features)
        features = features + background * (1 - accumulation)[..., None]
    elif background is None or isinstance(background, str):
        background = 0.0
    return features, blend_background(target, background)
