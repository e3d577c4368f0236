"""What nerfstudio's renderers compute of samples that are not packed."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ... import ops
from .. import promoted, weighted
from .losses import edges

__all__ = ["combine_rgb", "render_depth", "render_normals", "render_semantics"]

# what stands for no colour
BACKGROUNDS = ("random", "last_sample")


def combine_rgb(
    rgb: Tensor, weights: Tensor, background_color: Tensor | Literal["random", "last_sample"]
) -> Tensor:
    """Colours [..., C] of rays, from those of samples [..., S, C] and weights [..., S, 1].

    A random background is put behind them with the loss, and not here.
    """
    w, f = weighted(weights[..., 0], rgb)
    last_sample = isinstance(background_color, str) and background_color == "last_sample"
    background = None if isinstance(background_color, str) else background_color.to(w.dtype)
    # of no meaning without a depth
    t = w.new_zeros(*w.shape[:-1], w.shape[-1] + 1)
    return ops.composite_rays(
        t, w, f, background=background, depth="none", last_sample=last_sample
    ).features


def render_depth(
    weights: Tensor, starts: Tensor, ends: Tensor, method: Literal["median", "expected"]
) -> Tensor:
    """Depth [..., 1] of rays, from weights and touching intervals [..., S, 1].

    The expected one lies between the first and the last midpoint of its own ray; in nerfstudio, of
    all rays of the batch.
    """
    t, w = promoted(edges(starts, ends), weights[..., 0])
    return ops.composite_rays(t, w, depth=method).depth[..., None]


def render_semantics(semantics: Tensor, weights: Tensor) -> Tensor:
    """Features [..., C] of rays, from those of samples [..., S, C] and weights [..., S, 1]."""
    return ops.render_features(*weighted(weights[..., 0], semantics))


def render_normals(normals: Tensor, weights: Tensor, normalize: bool = True) -> Tensor:
    """Normals [..., 3] of rays, from those of samples [..., S, 3] and weights [..., S, 1]."""
    n = render_semantics(normals, weights)
    return n / (n.norm(dim=-1, keepdim=True) + 1e-10) if normalize else n
