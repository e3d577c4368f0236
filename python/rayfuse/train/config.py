"""The configuration of `rayfuse train`, and its presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rayfuse.train import InputError, options
from rayfuse.train.features import FeatureConfig
from rayfuse.train.field import FieldConfig
from rayfuse.train.model import SamplerConfig
from rayfuse.train.objective import ObjectiveConfig
from rayfuse.train.options import RunConfig


@dataclass
class OptimiserConfig:
    """AdamW over rays drawn from all training pixels; the rates fall along a cosine."""

    rays_per_step: int = 4096
    """Rays in a step, or the most with an occupancy grid."""
    grid_lr: float = 0.05
    """Peak learning rate of the field's and the features' grids."""
    proposal_lr: float = 0.05
    """Peak learning rate of the proposal grids."""
    mlp_lr: float = 0.01
    """Peak learning rate of the MLPs."""
    grid_decay: float = 0.0
    """Weight decay of the field's and the features' grids."""
    warmup_steps: int = 50
    """Steps in which the rates rise from 0."""
    final_share: float = 0.02
    """Share of the peak rates that is left at the last step."""


@dataclass
class TrainConfig(RunConfig):
    """Train a feature field on posed photographs.

    SCENE is a folder or file in transforms.json form (instant-ngp, nerfstudio, Blender). Without
    it, the Motorcycle stereo pair that scikit-image installs is used.
    """

    compare_steps: int = 100
    """Steps to make first on the reference and on the kernels, for the report; 0 for none."""
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    features: FeatureConfig = dataclasses.field(default_factory=FeatureConfig)
    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)
    field: FieldConfig = dataclasses.field(default_factory=FieldConfig)
    optimiser: OptimiserConfig = dataclasses.field(default_factory=OptimiserConfig)


# held-out dB on Motorcycle after 1500 steps, one seed: 28 field samples for 20 gain 0.3, 2**19 rows
# for 2**17 gain 0.7, grid rate 0.03 for 0.05 gains 0.3, finest 300 for 200 loses 0.2, decay 0.03
# for 0.1 loses 0.2; 24 samples are the compromise with time
_SMALL = TrainConfig(
    steps=4000,
    objective=ObjectiveConfig(normal_rays=256),
    sampler=SamplerConfig(num_proposal_samples_per_ray=(48, 24), num_nerf_samples_per_ray=24),
    optimiser=OptimiserConfig(rays_per_step=1024),
)
PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "demo": (
        "the Motorcycle pair in about three minutes on two cores",
        replace(
            _SMALL,
            steps=2500,
            objective=replace(_SMALL.objective, depth_loss_mult=0.02),
            field=FieldConfig(levels=5, log2_rows=19, finest=200),
            optimiser=replace(_SMALL.optimiser, grid_lr=0.03, grid_decay=0.1),
        ),
    ),
    "photos": ("tens of small photographs in about four minutes on two cores", _SMALL),
    "occupancy": (
        "as photos, with an occupancy grid in place of proposals",
        replace(
            _SMALL,
            steps=3000,
            # while the grid is full a ray has ten times the samples of the other presets
            objective=ObjectiveConfig(normal_rays=16),
            sampler=SamplerConfig(kind="occupancy"),
        ),
    ),
    "nerfacto": (
        "the sampling of nerfstudio's nerfacto: 4096 rays of 256, 96 and 48 samples; for a GPU",
        TrainConfig(steps=30000, field=FieldConfig(levels=8, log2_rows=19, finest=2048)),
    ),
    "tiny": (
        "seconds, to see that everything works",
        TrainConfig(
            steps=50,
            checkpoint_every=25,
            log_every=1,
            compare_steps=5,
            objective=ObjectiveConfig(normal_rays=32),
            sampler=SamplerConfig(
                num_proposal_samples_per_ray=(16, 12), num_nerf_samples_per_ray=8
            ),
            field=FieldConfig(
                levels=3, log2_rows=12, finest=64, feature_finest=32, proposal_finest=(32, 64)
            ),
            optimiser=OptimiserConfig(rays_per_step=128, warmup_steps=5),
            features=FeatureConfig(channels=8),
        ),
    ),
}


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The configuration of a command line; leaves with code 0 for --help, 2 for bad options."""
    return options.parse("train", PRESETS, arguments)


def check(config: TrainConfig) -> None:
    """Raises InputError for values that cannot train."""
    options.require_positive(
        {
            "steps": config.steps,
            "checkpoint-every": config.checkpoint_every,
            "log-every": config.log_every,
            "optimiser.rays-per-step": config.optimiser.rays_per_step,
            "sampler.num-nerf-samples-per-ray": config.sampler.num_nerf_samples_per_ray,
            "sampler.num-proposal-samples-per-ray": min(
                config.sampler.num_proposal_samples_per_ray
            ),
            "sampler.grid-resolution": config.sampler.grid_resolution,
            "sampler.grid-levels": config.sampler.grid_levels,
            "sampler.grid-steps": config.sampler.grid_steps,
            "sampler.samples-per-step": config.sampler.samples_per_step,
            "field.levels": config.field.levels,
            "field.channels": config.field.channels,
            "field.hidden": config.field.hidden,
            "field.feature-levels": config.field.feature_levels,
            "field.feature-channels": config.field.feature_channels,
        }
    )
    field = config.field
    if field.coarsest < 2 or min(field.finest, field.feature_finest) < field.coarsest:
        raise InputError(
            "--field.coarsest must be at least 2 and at most --field.finest and "
            f"--field.feature-finest, got {field.coarsest}"
        )
    if min(field.proposal_finest) < 8:
        raise InputError(
            f"--field.proposal-finest must be at least 8, got {min(field.proposal_finest)}"
        )
