"""The configuration of a training run, its presets, and its form in JSON."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from rayfuse.train import InputError
from rayfuse.train.features import FeatureConfig
from rayfuse.train.field import FieldConfig
from rayfuse.train.model import SamplerConfig
from rayfuse.train.objective import ObjectiveConfig


def _arg(metavar: str, hint: str) -> Any:
    """How --help shows an option whose default is worked out later."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"({hint})")


@dataclass
class OptimiserConfig:
    """AdamW over rays drawn from all training pixels; the rates fall along a cosine."""

    rays_per_step: int = 4096
    """Rays in a step."""
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
class TrainConfig:
    """Train a feature field on posed photographs.

    SCENE is a folder or file in transforms.json form (instant-ngp, nerfstudio, Blender). Without
    it, the Motorcycle stereo pair that scikit-image installs is used.
    """

    scene: Annotated[
        Path | None, tyro.conf.Positional, _arg("[SCENE]", "default: the Motorcycle pair")
    ] = None
    """Folder with transforms.json, or that file."""
    preset: Annotated[str, _arg("NAME", "default: demo for the Motorcycle pair, else photos")] = ""
    """Where all other values start, see above."""
    downscale: Annotated[int, _arg("N", "default: 2 for the Motorcycle pair, else 1")] = 0
    """Average the photographs over blocks of N x N pixels."""
    steps: int = 3000
    """Training steps; the learning rates reach their end at the last one."""
    output: Annotated[Path | None, _arg("DIR", "default: runs/<scene>-<date>-<time>")] = None
    """Folder for the run, new or empty."""
    resume: Annotated[Path | None, _arg("DIR", "default: a new run")] = None
    """Folder of a run to continue from its checkpoint; only --steps and --device then count."""
    seed: int = 0
    """Same seed, same run, bit for bit on a CPU."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, xpu, ..."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written at the end and on Ctrl-C."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
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
    name = _preset_of(arguments)
    config = _parse_from(name or "demo", arguments)
    if name or config.scene is None:
        return config
    return _parse_from("photos", arguments)


def _preset_of(arguments: Sequence[str]) -> str:
    for number, option in enumerate(arguments):
        if option == "--preset":
            return "".join(arguments[number + 1 : number + 2])
        if option.startswith("--preset="):
            return option.partition("=")[2]
    return ""


def _parse_from(name: str, arguments: Sequence[str]) -> TrainConfig:
    if name not in PRESETS:
        raise InputError(f"--preset must be one of {', '.join(PRESETS)}, got {name!r}")
    default = replace(PRESETS[name][1], preset=name)
    presets = "\n\n".join(f"preset {key}: {about}." for key, (about, _) in PRESETS.items())
    about = inspect.cleandoc(TrainConfig.__doc__ or "")
    return tyro.cli(
        TrainConfig,
        args=list(arguments),
        prog="rayfuse train",
        default=default,
        description=f"{about}\n\n{presets}",
    )


def check(config: TrainConfig) -> None:
    """Raises InputError for values that cannot train."""
    positive = {
        "steps": config.steps,
        "checkpoint-every": config.checkpoint_every,
        "log-every": config.log_every,
        "optimiser.rays-per-step": config.optimiser.rays_per_step,
        "sampler.num-nerf-samples-per-ray": config.sampler.num_nerf_samples_per_ray,
        "sampler.num-proposal-samples-per-ray": min(config.sampler.num_proposal_samples_per_ray),
        "field.levels": config.field.levels,
        "field.channels": config.field.channels,
        "field.hidden": config.field.hidden,
        "field.feature-levels": config.field.feature_levels,
        "field.feature-channels": config.field.feature_channels,
    }
    for name, value in positive.items():
        if value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
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


def to_json(config: Any) -> Any:
    """A dataclass as nested dicts of JSON values."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return str(config) if isinstance(config, Path) else config


def from_json(kind: Any, value: Any) -> Any:
    """The inverse of to_json, for the type `kind`; unknown keys raise KeyError."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = value.keys() - hints.keys()
        if unknown:
            raise KeyError(f"unknown settings {sorted(unknown)}")
        return kind(**{key: from_json(hints[key], item) for key, item in value.items()})  # type: ignore[operator]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        return None if value is None else from_json(options[0], value)
    if kind is Path:
        return Path(value)
    return tuple(value) if typing.get_origin(kind) is tuple else value
