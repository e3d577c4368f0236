"""The training objective of F3RM on nerfacto: every term with its weight, schedule and metric.

Names and defaults of the configuration are F3RM's and nerfstudio's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.profiler import record_function

import rayfuse
from rayfuse import FieldLosses
from rayfuse.train.model import Samples
from rayfuse.train.run import Terms

Background = Literal["random", "last_sample", "black", "white", "none"]


@dataclass
class ObjectiveConfig:
    """Weights and schedules of the terms; 0 switches a term off."""

    feat_loss_weight: float = 1e-3
    """Weight of every feature distillation term."""
    feat_loss_warmup_steps: int = 0
    """Steps over which that weight rises from 0, linearly; 0 for none."""
    adaptive_feature_weight: bool = False
    """Halve or double that weight while the RGB loss is far above or below the feature loss."""
    distortion_loss_mult: float = 0.002
    """Weight of the distortion term (Mip-NeRF 360)."""
    interlevel_loss_mult: float = 1.0
    """Weight of the interlevel term (Mip-NeRF 360), summed over the proposal levels."""
    orientation_loss_mult: float = 1e-4
    """Weight of the orientation term (Ref-NeRF)."""
    pred_normal_loss_mult: float = 1e-3
    """Weight of the predicted-normal term (Ref-NeRF)."""
    depth_loss_mult: float = 1e-3
    """Weight of depth supervision, where the scene has depth."""
    depth_sigma: float = 0.01
    """Half-width of the band around a measured depth, as a share of that depth."""
    predict_normals: bool = True
    """Compute normals, and with them the orientation and predicted-normal terms."""
    normal_rays: int | None = None
    """How many rays of a step pay for normals (a mean over fewer rays); None for all."""
    background_color: Background = "random"
    """What shows through: random colours while training, the last sample, black, white, none."""


@dataclass
class Batch:
    """Targets of R rays: rgb[R, 3] multiplied by alpha[R, 1] (None: opaque), depth[R] along the ray
    (NaN: unknown) or None, features by head [R, C], and the background that is drawn for them."""

    rgb: Tensor
    alpha: Tensor | None
    depth: Tensor | None
    features: dict[str, Tensor]
    background: Tensor | None


def get_scheduled_loss_weight(step: int, base_weight: float, warmup_steps: int = 5000) -> float:
    """base_weight, reached linearly from 0 over warmup_steps."""
    return base_weight * step / warmup_steps if step < warmup_steps else base_weight


def adaptive_feature_weight(
    rgb_loss: float, feature_loss: float, base_weight: float = 1e-3
) -> float:
    """Half of base_weight while rgb_loss / feature_loss > 0.01, twice while it is < 0.001."""
    ratio = rgb_loss / (feature_loss + 1e-8)
    if ratio > 0.01:
        return 0.5 * base_weight
    return 2.0 * base_weight if ratio < 0.001 else base_weight


def depth_loss(samples: Samples, rendered: FieldLosses, depth: Tensor, sigma: float) -> Tensor:
    """Urban Radiance Fields' depth term by mass, mean over the rays whose depth[R] is known.

    Distances are shares of the depth, and so is `sigma`. Of the few and wide intervals here most
    middles are outside the band around a depth: what `form="urban"` would look at.
    """
    known = depth.isfinite() & (depth > 0)
    target = torch.where(known, depth, 1.0)
    begin, end = (t / samples.spread(target) for t in samples.intervals())
    return samples.depth_loss(
        rendered.weights,
        (begin + end) / 2,
        known.to(begin.dtype),
        lengths=end - begin,
        depth_pred=rendered.depth / target,
        form="urban_mass",
        sigma=sigma,
        denominator=known.sum().clamp_min(1),
    )


class Objective:
    """Computes every term: those of `rayfuse.field_losses`, of features, and of depth."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    def background(self, samples: Samples, drawn: Tensor | None) -> Tensor | float | None:
        """What stands behind the samples; a random colour is drawn in training alone.

        Without one "random" shows black, as nerfstudio does: the field was trained to be opaque or
        empty.
        """
        colour = self.config.background_color
        if colour == "last_sample":
            return samples.last_rgb()
        return 1.0 if colour == "white" else drawn

    def render(self, samples: Samples, batch: Batch) -> FieldLosses:
        """What samples render to, and the terms on them, in front of the same background."""
        background = self.background(samples, batch.background)
        target = batch.rgb
        if batch.alpha is not None and background is not None:
            target = target + (1.0 - batch.alpha) * background
        with record_function("part:losses"):
            return samples.losses(target, background)

    def __call__(
        self,
        samples: Samples,
        rendered: FieldLosses,
        features: dict[str, Tensor],
        batch: Batch,
        step: int,
    ) -> Terms:
        """All terms of samples, what they `render` to, and the features of every head."""
        c = self.config
        terms = Terms()

        def add(name: str, weight: float, loss: Tensor) -> None:
            terms.losses[name], terms.weights[name] = loss, weight

        with record_function("part:losses"):
            add("rgb_loss", 1.0, rendered.rgb_loss)
            add("distortion_loss", c.distortion_loss_mult, rendered.distortion_loss)
            if samples.has_proposals:
                add("interlevel_loss", c.interlevel_loss_mult, rendered.interlevel_loss)
            for name, feature in features.items():
                # rendered before the last linear map of its head, which makes it one sample a ray
                whole = feature.new_ones(len(feature), 1)
                loss = rayfuse.feature_distillation_loss(
                    whole, feature[:, None], batch.features[name]
                )
                weight = get_scheduled_loss_weight(
                    step, c.feat_loss_weight, c.feat_loss_warmup_steps
                )
                if c.adaptive_feature_weight:
                    weight = adaptive_feature_weight(rendered.rgb_loss.item(), loss.item(), weight)
                add(f"{name}_loss", weight, loss)
                terms.metrics[f"{name}_error"] = loss.detach()
            if samples.n is not None:
                add("orientation_loss", c.orientation_loss_mult, rendered.orientation_loss)
                add("pred_normal_loss", c.pred_normal_loss_mult, rendered.predicted_normal_loss)
            if batch.depth is not None:
                loss = depth_loss(samples, rendered, batch.depth, c.depth_sigma)
                add("depth_loss", c.depth_loss_mult, loss)
        terms.metrics["psnr"] = -10.0 * torch.log10(rendered.rgb_loss.detach())
        terms.metrics["distortion"] = rendered.distortion_loss.detach()
        return terms
