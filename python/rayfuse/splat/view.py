"""`rayfuse view`: Gaussian splats in a browser, drawn by viser."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
import viser

import rayfuse
from rayfuse.splat.gaussians import FLAT_HARMONIC, Gaussians, read_ply


@dataclass
class ViewConfig:
    """Look at Gaussian splats in a browser. Colours are those of the harmonic of degree 0."""

    ply: tyro.conf.Positional[Path]
    """The standard .ply of Gaussians, as `rayfuse splat` writes it."""
    host: str = "127.0.0.1"
    """Where to listen; 0.0.0.0 for other machines too."""
    port: int = 8080
    """Port to listen on; the next free one if it is taken."""


def parse(arguments: Sequence[str]) -> ViewConfig:
    """The configuration of a command line; leaves with code 0 for --help, 2 for bad options."""
    return tyro.cli(ViewConfig, args=list(arguments), prog="rayfuse view")


def view(config: ViewConfig) -> int:
    """Serves until Ctrl-C."""
    serve(read_ply(config.ply), config.host, config.port)
    while True:
        time.sleep(3600)


def serve(gaussians: Gaussians, host: str, port: int) -> viser.ViserServer:
    """A server that shows them."""
    server = viser.ViserServer(host, port)
    # photographs are taken with y down, so that the world of most scenes is too
    server.scene.set_up_direction("+y")
    covariances = rayfuse.splat_covariances(gaussians.quats, gaussians.scales.exp())
    server.scene.add_gaussian_splats(
        "/splats",
        centers=gaussians.means.numpy(),
        covariances=covariances.numpy(),
        rgbs=(gaussians.sh0[:, 0] * FLAT_HARMONIC + 0.5).clamp(0, 1).numpy(),
        opacities=torch.sigmoid(gaussians.opacities)[:, None].numpy(),
    )
    return server
