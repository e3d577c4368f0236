"""The training objective of F3RM on nerfacto: every term with its weight, schedule and metric.

Names and defaults of the configuration are F3RM's and nerfstudio's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import record_function

import rayfuse
from rayfuse.train.model import Background, Level, Outputs
from rayfuse.train.profile import fused
from rayfuse.train.run import Terms


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
    """Targets of R rays: rgb[R, 3] multiplied by alpha[R, 1] (None: opaque), depth[R, 1] along
    the ray (NaN: unknown) or None, features by head [R, C], background[R, 3] to blend with."""

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


def interlevel_loss(levels: list[Level]) -> Tensor:
    """Σ over proposal levels of the mean of max(0, w - outer)² / (w + ε); w is detached."""
    s, w = levels[-1].s, levels[-1].weights.detach()
    return torch.stack(
        [fused(rayfuse.interlevel_loss, s, w, level.s, level.weights) for level in levels[:-1]]
    ).sum()


def depth_loss(level: Level, depth: Tensor, rendered: Tensor, sigma: float) -> Tensor:
    """Urban Radiance Fields' depth term, mean over the rays whose depth[R, 1] is known.

    (D̂ - D)² + Σ (w - m)² over the intervals that begin before D + σ, with distances as shares of D
    and σ = `sigma`. m is the mass of N(D, σ/3) in an interval, so empty space before D costs w²,
    and an interval wider than the band that holds D is asked for all the weight.
    `rayfuse.depth_loss` takes the density at the middle of an interval instead, and so misses a
    band that lies between two of the few middles here.
    """
    known = depth.isfinite() & (depth > 0)
    target = torch.where(known, depth, 1.0)
    edges = level.t / target
    cumulative = 0.5 * torch.erf((edges - 1.0) * (3.0 / (sigma * math.sqrt(2.0))))
    mass = cumulative.diff(dim=-1)
    seen = edges[:, :-1] <= 1.0 + sigma
    sight = torch.where(seen, (level.weights - mass) ** 2, 0.0).sum(dim=-1)
    loss = sight + (rendered / target - 1.0)[:, 0] ** 2
    known = known[:, 0]
    return torch.where(known, loss, 0.0).sum() / known.sum().clamp_min(1)


class Objective:
    """Computes every term from a model's outputs and a batch of targets."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    def __call__(self, outputs: Outputs, batch: Batch, step: int) -> Terms:
        c = self.config
        terms = Terms()

        def add(name: str, weight: float, loss: Tensor) -> None:
            terms.losses[name], terms.weights[name] = loss, weight

        with record_function("part:losses"):
            with record_function("op:rgb_loss"):
                predicted, target = self.blend(outputs, batch)
                add("rgb_loss", 1.0, F.mse_loss(predicted, target))
            final = outputs.levels[-1]
            distortion = fused(rayfuse.distortion_loss, final.s, final.weights)
            add("distortion_loss", c.distortion_loss_mult, distortion)
            add("interlevel_loss", c.interlevel_loss_mult, interlevel_loss(outputs.levels))
            for name, rendered in outputs.features.items():
                with record_function("op:feature_loss"):
                    loss = F.mse_loss(rendered, batch.features[name])
                weight = get_scheduled_loss_weight(
                    step, c.feat_loss_weight, c.feat_loss_warmup_steps
                )
                if c.adaptive_feature_weight:
                    rgb_loss = terms.losses["rgb_loss"].item()
                    weight = adaptive_feature_weight(rgb_loss, loss.item(), weight)
                add(f"{name}_loss", weight, loss)
                terms.metrics[f"{name}_error"] = loss.detach()
            if outputs.normals is not None:
                some = slice(len(outputs.normals))
                weights = final.weights[some].detach()
                orientation, predicted = fused(
                    rayfuse.normal_losses,
                    weights,
                    outputs.normals,
                    n_pred=outputs.predicted_normals,
                    d=outputs.normal_directions,
                )
                add("orientation_loss", c.orientation_loss_mult, orientation)
                add("pred_normal_loss", c.pred_normal_loss_mult, predicted)
            if batch.depth is not None:
                with record_function("op:depth_term"):
                    loss = depth_loss(final, batch.depth, outputs.depth, c.depth_sigma)
                add("depth_loss", c.depth_loss_mult, loss)
        mse = terms.losses["rgb_loss"].detach()
        terms.metrics["psnr"] = -10.0 * torch.log10(mse)
        terms.metrics["distortion"] = distortion.detach()
        return terms

    def blend(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predicted and target colour [R, 3], both in front of the same background."""
        background = batch.background
        if self.config.background_color == "last_sample":
            background = outputs.last_rgb
        if background is None:
            return outputs.rgb, batch.rgb
        predicted = outputs.rgb + (1.0 - outputs.accumulation) * background
        if batch.alpha is None:
            return predicted, batch.rgb
        return predicted, batch.rgb + (1.0 - batch.alpha) * background
