"""From rays to rendered outputs: proposal sampling, density to weights, compositing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

import rayfuse
from rayfuse.train.field import Field, FieldConfig, ProposalField
from rayfuse.train.profile import fused
from rayfuse.train.scene import Rays
from rayfuse.train.space import Space

Background = Literal["random", "last_sample", "black", "white", "none"]


@dataclass
class SamplerConfig:
    """Samples along a ray; the defaults are nerfstudio's, presets scale them down."""

    num_proposal_samples_per_ray: tuple[int, int] = (256, 96)
    """Samples of the two proposal levels."""
    num_nerf_samples_per_ray: int = 48
    """Samples of the field itself."""
    histogram_padding: float = 0.01
    """Added to every proposal weight before resampling, so that no part is never seen."""


@dataclass
class Level:
    """One sampling level: edges in spacing [0, 1] and in distance [R, S+1], weights [R, S]."""

    s: Tensor
    t: Tensor
    weights: Tensor


@dataclass
class Outputs:
    """What one batch of rays renders to.

    rgb[R, 3] without background, accumulation[R, 1], depth[R, 1] (expected distance), last_rgb
    [R, 3] (the colour of the last sample), levels from coarse to fine, features by head [R, C].
    For the first R' rays, where normals are asked for: normals and predicted_normals
    [R', S, 3], normal_directions[R', 3]; else None.
    """

    rgb: Tensor
    accumulation: Tensor
    depth: Tensor
    last_rgb: Tensor
    levels: list[Level]
    features: dict[str, Tensor]
    normals: Tensor | None = None
    predicted_normals: Tensor | None = None
    normal_directions: Tensor | None = None


def resample(s: Tensor, weights: Tensor, count: int, padding: float, jitter: Tensor) -> Tensor:
    """count + 1 edges drawn from the histogram weights[R, S] over edges s[R, S+1].

    Args:
        jitter: [R, 1] in [0, 1), where in its stratum every edge of a ray falls.
    """
    pdf = weights + padding
    cdf = torch.cumsum(pdf / pdf.sum(dim=-1, keepdim=True), dim=-1)
    cdf = torch.cat([torch.zeros_like(cdf[:, :1]), cdf.clamp(max=1.0)], dim=-1)
    stratum = torch.arange(count + 1, device=s.device, dtype=s.dtype)
    u = (stratum + jitter) / (count + 1)
    upper = torch.searchsorted(cdf, u.contiguous(), right=True).clamp_(1, s.shape[1] - 1)
    c0, c1 = cdf.gather(1, upper - 1), cdf.gather(1, upper)
    s0, s1 = s.gather(1, upper - 1), s.gather(1, upper)
    part = ((u - c0) / (c1 - c0).clamp_min(1e-9)).clamp(0.0, 1.0)
    return torch.lerp(s0, s1, part)


class FeatureFieldModel(nn.Module):
    """Two proposal levels and the field behind them.

    Args:
        features: channels of each feature head by name; empty for none.
    """

    def __init__(
        self,
        field: FieldConfig,
        sampler: SamplerConfig,
        space: Space,
        features: dict[str, int],
    ) -> None:
        super().__init__()
        self.space, self.sampler = space, sampler
        self.proposals = nn.ModuleList(
            ProposalField(1, side // 4, side, 21) for side in field.proposal_finest
        )
        self.field = Field(field, space, features)

    def forward(
        self,
        rays: Rays,
        generator: torch.Generator | None = None,
        normal_rays: int | None = 0,
    ) -> Outputs:
        """Renders rays.

        Args:
            generator: for training: jitters the samples and draws gradient corners; None renders
                at fixed places.
            normal_rays: how many rays, from the first, also get normals; None for all.
        """
        levels: list[Level] = []
        s = weights = None
        counts = self.sampler.num_proposal_samples_per_ray
        for proposal, count in zip(self.proposals, counts, strict=True):
            with record_function("part:proposals"):
                s, t, x = self._samples(rays, s, weights, count, generator)
                density = proposal(self.space.warp(x).view(-1, 3), generator)
                level_weights, _ = fused(rayfuse.ray_weights, density.view(len(s), count), t)
            levels.append(Level(s, t, level_weights))
            weights = level_weights.detach()
        count = self.sampler.num_nerf_samples_per_ray
        with record_function("part:proposals"):
            s, t, x = self._samples(rays, s, weights, count, generator)
            u = self.space.warp(x)
        with record_function("part:density"):
            density, embedding = self.field.geometry(u.view(-1, 3), generator)
            embedding = embedding.view(len(s), count, -1)
        with record_function("part:colour"):
            colours = self.field.colour(embedding, rays.directions)
        with record_function("part:compositing"):
            weights, _ = fused(rayfuse.ray_weights, density.view(len(s), count), t)
            levels.append(Level(s, t, weights))
            rgb, depth, accumulation = fused(rayfuse.composite_rays, t, weights, f=colours)
        with record_function("part:features"):
            features = {
                name: head(u, weights, generator) for name, head in self.field.feature_heads.items()
            }
        outputs = Outputs(
            rgb, accumulation[:, None], depth[:, None], colours[:, -1], levels, features
        )
        if normal_rays is None or normal_rays > 0:
            with record_function("part:normals"):
                some = slice(normal_rays)
                outputs.normals = self.field.normals(x[some].reshape(-1, 3)).view(x[some].shape)
                outputs.predicted_normals = self.field.predicted_normals(embedding[some], u[some])
                outputs.normal_directions = rays.directions[some]
        return outputs

    def _samples(
        self,
        rays: Rays,
        s: Tensor | None,
        weights: Tensor | None,
        count: int,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Edges in spacing and distance [R, count+1], and the middles' positions [R, count, 3]."""
        with torch.no_grad():
            jitter = torch.full_like(rays.near, 0.5)
            if generator is not None:
                jitter = torch.rand(jitter.shape, generator=generator, device=jitter.device)
            if s is None or weights is None:
                strata = torch.arange(count + 1, device=jitter.device, dtype=jitter.dtype)
                s = ((strata + jitter - 0.5) / count).clamp(0.0, 1.0)
            else:
                s = resample(s, weights, count, self.sampler.histogram_padding, jitter)
            t = self.space.distance(s, rays.near, rays.far)
            middle = 0.5 * (t[:, 1:] + t[:, :-1])
            return s, t, rays.origins[:, None] + rays.directions[:, None] * middle[..., None]


def blend(rgb: Tensor, accumulation: Tensor, last: Tensor, background: Background) -> Tensor:
    """rgb[R, 3] + (1 - accumulation[R, 1]) * background, as evaluation shows it.

    "random" shows black, as nerfstudio does: the field was trained to be opaque or empty.
    """
    if background in ("random", "black", "none"):
        return rgb
    colour = last if background == "last_sample" else torch.ones_like(rgb)
    return rgb + (1 - accumulation) * colour
