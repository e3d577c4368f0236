"""From rays to what a field holds along them, where proposals or an occupancy grid look."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

import rayfuse
from rayfuse import FieldLosses
from rayfuse.compat.nerfacc import OccGridEstimator
from rayfuse.train.field import FeatureHead, Field, FieldConfig, ProposalField
from rayfuse.train.scene import Rays
from rayfuse.train.space import Space

# density from which on a cell of the grid is not empty; it rises to that in the first steps, as a
# new field has 0.37 everywhere
OCCUPIED = 2.0
GRID_WARMUP = 256
# opacity from which on a sample is worth its gradient
VISIBLE = 0.002


@dataclass
class SamplerConfig:
    """Samples along a ray; the defaults are nerfstudio's, presets scale them down."""

    kind: Literal["proposals", "occupancy"] = "proposals"
    """proposals: two levels of small fields say where a fixed number of samples goes. occupancy: a
    grid that remembers where the field is empty; a ray has as many samples as it meets."""
    num_proposal_samples_per_ray: tuple[int, int] = (256, 96)
    """Samples of the two proposal levels."""
    num_nerf_samples_per_ray: int = 48
    """Samples of the field itself, behind proposals."""
    histogram_padding: float = 0.01
    """Added to every proposal weight before resampling, so that no part is never seen."""
    grid_resolution: int = 32
    """Cells along a side of the occupancy grid."""
    grid_levels: int = 4
    """Occupancy grids, each twice as large as the one within it; 1 where the scene has an end."""
    grid_steps: int = 128
    """Steps of a ray along a side of the innermost occupancy grid."""
    cone_angle: float = 1 / 64
    """Least length of a step as a share of the distance, where there are more grids than one."""
    samples_per_step: int = 2**14
    """Samples of a training step, by drawing fewer rays while the occupancy grid is full."""


@dataclass(kw_only=True)
class Samples(ABC):
    """What the field holds along R rays, not yet rendered.

    Of every sample its density, its colour rgb[..., 3] and its place u[..., 3] in the unit cube; of
    those of the first rays, as many as directions d, the normals n and the predicted ones n_pred.
    """

    density: Tensor
    rgb: Tensor
    u: Tensor
    n: Tensor | None = None
    n_pred: Tensor | None = None
    d: Tensor | None = None
    has_proposals: ClassVar[bool] = False

    def losses(self, target: Tensor, background: Tensor | float | None) -> FieldLosses:
        """Every term that needs no more than these and the colours [R, 3] that are wanted."""
        normals = dict(n=self.n, n_pred=self.n_pred, d=self.d)
        count = None if self.d is None else len(self.d)
        return self._field_losses(
            **(self._spacing() | normals),
            rgb_target=target,
            background=background,
            normal_rays=count,
        )

    def render(self, background: Tensor | float | None) -> FieldLosses:
        """The same without any term."""
        return self._field_losses(background=background)

    @abstractmethod
    def _field_losses(self, **named: Any) -> FieldLosses: ...

    @abstractmethod
    def _spacing(self) -> dict[str, Any]:
        """The arguments of the terms on the spacing of samples."""

    @abstractmethod
    def composite(self, w: Tensor, f: Tensor) -> Tensor:
        """[R, C] the sum along each ray of features f[..., C] by weights w."""

    @abstractmethod
    def depth_loss(self, w: Tensor, s: Tensor, depth: Tensor, **named: Any) -> Tensor:
        """That of weights w at positions s, and of the depth [R] of each ray."""

    @abstractmethod
    def spread(self, x: Tensor) -> Tensor:
        """x[R] at every sample."""

    @abstractmethod
    def intervals(self) -> tuple[Tensor, Tensor]:
        """The distances at which the interval of each sample begins and ends."""

    @abstractmethod
    def last_rgb(self) -> Tensor:
        """[R, 3] the colour of the last sample of each ray."""


@dataclass(kw_only=True)
class DenseSamples(Samples):
    """S samples of every ray: edges in spacing [0, 1] and in distance [R, S+1]; the proposals that
    chose them, edges in spacing and weights of each level."""

    s: Tensor
    t: Tensor
    proposals: list[tuple[Tensor, Tensor]]
    has_proposals: ClassVar[bool] = True

    def _field_losses(self, **named: Any) -> FieldLosses:
        return rayfuse.field_losses(self.density, self.t, rgb=self.rgb, **named)

    def _spacing(self) -> dict[str, Any]:
        return dict(s=self.s, proposals=self.proposals)

    def composite(self, w: Tensor, f: Tensor) -> Tensor:
        return rayfuse.render_features(w, f)

    def depth_loss(self, w: Tensor, s: Tensor, depth: Tensor, **named: Any) -> Tensor:
        return rayfuse.depth_loss(w, s, depth, **named)

    def spread(self, x: Tensor) -> Tensor:
        return x[:, None]

    def intervals(self) -> tuple[Tensor, Tensor]:
        return self.t[:, :-1], self.t[:, 1:]

    def last_rgb(self) -> Tensor:
        return self.rgb[:, -1]


@dataclass(kw_only=True)
class PackedSamples(Samples):
    """P samples of all rays end to end, ray r's from offsets[r] up to offsets[r + 1], its number
    for each in ray[P]; where their intervals begin and end, in distance and in spacing."""

    ray: Tensor
    offsets: Tensor
    t_starts: Tensor
    t_ends: Tensor
    s_starts: Tensor
    s_ends: Tensor

    def _field_losses(self, **named: Any) -> FieldLosses:
        rays = self.density, self.t_starts, self.t_ends, self.offsets
        return rayfuse.packed_field_losses(*rays, rgb=self.rgb, **named)

    def _spacing(self) -> dict[str, Any]:
        return dict(s_starts=self.s_starts, s_ends=self.s_ends)

    def composite(self, w: Tensor, f: Tensor) -> Tensor:
        return rayfuse.packed_render_features(w, f, self.offsets)

    def depth_loss(self, w: Tensor, s: Tensor, depth: Tensor, **named: Any) -> Tensor:
        return rayfuse.packed_depth_loss(w, s, depth, self.offsets, **named)

    def spread(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.ray)

    def intervals(self) -> tuple[Tensor, Tensor]:
        return self.t_starts, self.t_ends

    def last_rgb(self) -> Tensor:
        last = self.rgb.new_zeros(len(self.offsets) - 1, 3)
        some = self.offsets.diff() > 0
        return last.masked_scatter(some[:, None], self.rgb[self.offsets[1:][some] - 1])


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


class FieldModel(nn.Module, ABC):
    """A field, and what chooses samples of it.

    Args:
        features: channels of each feature head by name; empty for none.
    """

    def __init__(
        self, field: FieldConfig, sampler: SamplerConfig, space: Space, features: dict[str, int]
    ) -> None:
        super().__init__()
        self.space, self.sampler = space, sampler
        self._add_sampler(field)
        self.field = Field(field, space, features)

    @abstractmethod
    def _add_sampler(self, field: FieldConfig) -> None:
        """Makes what is trained beside the field."""

    @abstractmethod
    def forward(
        self,
        rays: Rays,
        generator: torch.Generator | None = None,
        normal_rays: int | None = 0,
    ) -> Samples:
        """The samples of rays.

        Args:
            generator: for training: jitters the samples and draws gradient corners; None looks at
                fixed places.
            normal_rays: how many rays, from the first, also get normals; None for all.
        """

    def prepare(self, step: int, generator: torch.Generator) -> None:
        """What a step of training begins with."""

    def rays_per_step(self, most: int) -> int:
        """How many rays the next step of training can afford."""
        return most

    def metrics(self) -> dict[str, Tensor]:
        """What is worth logging of the sampler."""
        return {}

    def features(
        self, samples: Samples, rendered: FieldLosses, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """[R, C] of every head. As in F3RM their loss shapes the density through the weights."""
        rendered_features = {}
        with record_function("part:features"):
            for name, head in self.field.feature_heads.items():
                assert isinstance(head, FeatureHead)
                hidden = head.hidden_layer(samples.u, generator)
                total = samples.composite(rendered.weights, hidden)
                rendered_features[name] = head(total, rendered.accumulation)
        return rendered_features

    def _normals(self, samples: Samples, x: Tensor, embedding: Tensor, directions: Tensor) -> None:
        """Adds normals to the samples at positions x of the first rays."""
        some = slice(len(x))
        with record_function("part:normals"):
            samples.n = self.field.normals(x.reshape(-1, 3)).view(x.shape)
            samples.n_pred = self.field.predicted_normals(embedding[some], samples.u[some])
            samples.d = directions


class ProposalModel(FieldModel):
    """Two proposal levels and the field behind them."""

    def _add_sampler(self, field: FieldConfig) -> None:
        self.proposals = nn.ModuleList(
            ProposalField(1, side // 4, side, 21) for side in field.proposal_finest
        )

    def forward(
        self,
        rays: Rays,
        generator: torch.Generator | None = None,
        normal_rays: int | None = 0,
    ) -> DenseSamples:
        proposals: list[tuple[Tensor, Tensor]] = []
        s = weights = None
        counts = self.sampler.num_proposal_samples_per_ray
        for proposal, count in zip(self.proposals, counts, strict=True):
            with record_function("part:proposals"):
                s, t, x = self._samples(rays, s, weights, count, generator)
                density = proposal(self.space.warp(x).view(-1, 3), generator)
                level_weights, _ = rayfuse.ray_weights(density.view(len(s), count), t)
            proposals.append((s, level_weights))
            weights = level_weights.detach()
        count = self.sampler.num_nerf_samples_per_ray
        with record_function("part:proposals"):
            s, t, x = self._samples(rays, s, weights, count, generator)
            u = self.space.warp(x)
        with record_function("part:density"):
            density, embedding = self.field.geometry(u.view(-1, 3), generator)
            density, embedding = density.view(len(s), count), embedding.view(len(s), count, -1)
        with record_function("part:colour"):
            rgb = self.field.colour(embedding, self.field.view(rays.directions)[:, None])
        samples = DenseSamples(density=density, rgb=rgb, u=u, s=s, t=t, proposals=proposals)
        if normal_rays != 0:
            self._normals(samples, x[:normal_rays], embedding, rays.directions[:normal_rays])
        return samples

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


class OccupancyModel(FieldModel):
    """The field where an occupancy grid says that space is not empty."""

    samples_per_ray: Tensor

    def _add_sampler(self, field: FieldConfig) -> None:
        c, (box, open_end) = self.sampler, self.space.box()
        levels = c.grid_levels if open_end else 1
        self.step_size = max(b - a for a, b in zip(box[:3], box[3:], strict=True)) / c.grid_steps
        self.cone_angle = c.cone_angle if open_end else 0.0
        self.grid = OccGridEstimator(box, c.grid_resolution, levels)
        self.register_buffer("samples_per_ray", torch.tensor(float(c.grid_steps)))

    def prepare(self, step: int, generator: torch.Generator) -> None:
        def density(x: Tensor) -> Tensor:
            return self._density(x)[:, None]

        with record_function("part:grid"), self._drawing_from(generator):
            self.grid.update_every_n_steps(
                *(step, density),
                occ_thre=OCCUPIED * min(step / GRID_WARMUP, 1.0),
                ema_decay=0.8,
                warmup_steps=GRID_WARMUP,
                n=8,
            )

    def metrics(self) -> dict[str, Tensor]:
        occupied = self.grid.binaries.float().mean()
        return {"samples_per_ray": self.samples_per_ray.clone(), "occupied_share": occupied}

    def rays_per_step(self, most: int) -> int:
        affordable = self.sampler.samples_per_step / max(self.samples_per_ray.item(), 1.0)
        return max(min(most, int(affordable)), most // 16, 1)

    def forward(
        self,
        rays: Rays,
        generator: torch.Generator | None = None,
        normal_rays: int | None = 0,
    ) -> PackedSamples:
        o, d, near, far = rays.origins, rays.directions, rays.near, rays.far

        def position(t_starts: Tensor, t_ends: Tensor, ray: Tensor) -> Tensor:
            middle = (t_starts + t_ends)[:, None] / 2
            return o.index_select(0, ray) + d.index_select(0, ray) * middle

        with record_function("part:grid"), self._drawing_from(generator):
            ray, t_starts, t_ends = self.grid.sampling(
                *(o, d),
                sigma_fn=lambda *interval: self._density(position(*interval)),
                t_min=near[:, 0],
                t_max=far[:, 0],
                render_step_size=self.step_size,
                alpha_thre=VISIBLE,
                cone_angle=self.cone_angle,
                stratified=generator is not None,
            )
            offsets = rayfuse.ray_offsets(ray, len(o))
            x = position(t_starts, t_ends, ray)
            u = self.space.warp(x)
            ends = near.index_select(0, ray)[:, 0], far.index_select(0, ray)[:, 0]
            s_starts, s_ends = (self.space.spacing(t, *ends) for t in (t_starts, t_ends))
        if generator is not None:
            self.samples_per_ray.fill_(len(ray) / len(o))
        with record_function("part:density"):
            density, embedding = self.field.geometry(u, generator)
        with record_function("part:colour"):
            rgb = self.field.colour(embedding, self.field.view(d).index_select(0, ray))
        samples = PackedSamples(
            density=density,
            rgb=rgb,
            u=u,
            ray=ray,
            offsets=offsets,
            t_starts=t_starts,
            t_ends=t_ends,
            s_starts=s_starts,
            s_ends=s_ends,
        )
        if normal_rays != 0:
            directions = d[:normal_rays]
            self._normals(samples, x[: int(offsets[len(directions)])], embedding, directions)
        return samples

    @torch.no_grad()
    def _density(self, x: Tensor) -> Tensor:
        return self.field.geometry(self.space.warp(x), None)[0]

    @contextmanager
    def _drawing_from(self, generator: torch.Generator | None) -> Iterator[None]:
        """Lets the grid, which draws from torch's own generators, draw what `generator` says."""
        if generator is None:
            yield
            return
        device = generator.device
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type=device.type):
            seed = torch.randint(2**62, (), generator=generator, device=device)
            torch.manual_seed(seed.item())
            yield


def make_model(
    field: FieldConfig, sampler: SamplerConfig, space: Space, features: dict[str, int]
) -> FieldModel:
    kind = {"proposals": ProposalModel, "occupancy": OccupancyModel}[sampler.kind]
    return kind(field, sampler, space, features)
