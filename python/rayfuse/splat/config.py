"""The configuration of `rayfuse splat`: presets, command line, checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rayfuse.train import InputError, options
from rayfuse.train.options import RunConfig, hint, require_positive


@dataclass
class RatesConfig:
    """Learning rates of Adam at the first step.

    Four times those of gsplat's trainer, ten times for centres, as runs are ten times as short.
    """

    means: float = 1.6e-3
    """Centres."""
    scales: float = 2e-2
    """Logarithms of the standard deviations."""
    quats: float = 4e-3
    """Rotations."""
    opacities: float = 5e-2
    """Logits of the opacities."""
    sh0: float = 1e-2
    """Colours."""
    shN: float = 5e-4
    """How colours change with the direction."""
    final_share: float = 0.01
    """Share of the rate of the centres that is left at the last step."""
    final_share_others: float = 0.1
    """The same of all other rates."""


@dataclass
class DensifyConfig:
    """How Gaussians come and go: gsplat's strategies."""

    strategy: Literal["mcmc", "default", "none"] = "mcmc"
    """mcmc moves the faint ones and adds up to --densify.most, default splits and prunes."""
    most: int = 100_000
    """The most Gaussians that mcmc makes."""
    start: float = 0.05
    """Share of all steps after which it begins."""
    stop: float = 0.8
    """Share of all steps after which it ends."""
    every: int = 50
    """Steps from one time to the next."""
    grow_gradient: float = 2e-4
    """For default: Gaussians whose mean gradient in the image is larger are split."""
    noise: float = 5e4
    """For mcmc: how far centres are shaken, times the rate of the centres."""
    opacity_weight: float = 0.01
    """For mcmc: weight of the mean opacity in the loss."""
    scale_weight: float = 0.01
    """For mcmc: weight of the mean standard deviation in the loss."""


@dataclass
class SplatConfig(RunConfig):
    """Train Gaussian splats on posed photographs.

    SCENE is a folder or file in transforms.json form (instant-ngp, nerfstudio, Blender). Without
    it, the Motorcycle stereo pair that scikit-image installs is used.
    """

    steps: int = 1000
    """Training steps, one photograph each; the learning rates reach their end at the last one."""
    points: Annotated[Path | None, hint("PLY", "default: pixels of the photographs")] = None
    """A .ply of points or of Gaussians to start from, in the scene's frame."""
    first: int = 50_000
    """How many pixels to lift at the start where there is no .ply and no depth."""
    sh_degree: int = 3
    """Up to which spherical harmonics colours change with the direction, from 0 to 4."""
    sh_every: int = 300
    """Steps until the next degree of them is trained."""
    ssim_weight: float = 0.2
    """Share of 1 - SSIM in the loss; the rest is the mean absolute error."""
    background: Literal["black", "white", "random"] = "black"
    """What stands behind the Gaussians; random is another colour in each step."""
    rates: RatesConfig = dataclasses.field(default_factory=RatesConfig)
    densify: DensifyConfig = dataclasses.field(default_factory=DensifyConfig)


PRESETS: dict[str, tuple[str, SplatConfig]] = {
    "demo": (
        "the Motorcycle pair in about two minutes on two cores",
        SplatConfig(
            steps=600, sh_degree=1, sh_every=200, densify=DensifyConfig(most=90_000, every=20)
        ),
    ),
    "photos": (
        "tens of photographs of a tenth of a megapixel in about three minutes on two cores",
        SplatConfig(),
    ),
    "tiny": (
        "seconds, to see that everything works",
        SplatConfig(
            steps=30,
            checkpoint_every=15,
            log_every=1,
            first=600,
            sh_degree=1,
            sh_every=10,
            rates=RatesConfig(means=2e-3, scales=5e-2, opacities=0.1, sh0=5e-2),
            densify=DensifyConfig(most=300, every=5, noise=1e4),
        ),
    ),
}


def parse(arguments: Sequence[str]) -> SplatConfig:
    """The configuration of a command line; leaves with code 0 for --help, 2 for bad options."""
    return options.parse("splat", PRESETS, arguments)


def check(config: SplatConfig) -> None:
    """Raises InputError for values that cannot train."""
    require_positive(
        {
            "steps": config.steps,
            "checkpoint-every": config.checkpoint_every,
            "log-every": config.log_every,
            "first": config.first,
            "sh-every": config.sh_every,
            "densify.most": config.densify.most,
            "densify.every": config.densify.every,
        }
    )
    if not 0 <= config.sh_degree <= 4:
        raise InputError(f"--sh-degree must be from 0 to 4, got {config.sh_degree}")
    if not 0 <= config.ssim_weight <= 1:
        raise InputError(f"--ssim-weight must be from 0 to 1, got {config.ssim_weight}")
    for name, value in (("start", config.densify.start), ("stop", config.densify.stop)):
        if not 0 <= value <= 1:
            raise InputError(f"--densify.{name} must be from 0 to 1, got {value}")
