"""`rayfuse view`: Gaussian splats in a browser, drawn by viser."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
import viser

import rayfuse
from rayfuse.splat.gaussians import FLAT_HARMONIC, Gaussians, read_ply
from rayfuse.train import InputError


@dataclass
class ViewConfig:
    """Look at Gaussian splats in a browser.

    Colours are those of the harmonic of degree 0. The first camera of cameras.json, if there is one
    beside the .ply, is where the view begins.
    """

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
    serve(read_ply(config.ply), config.host, config.port, _first_camera(config.ply)).sleep_forever()
    return 0


def serve(
    gaussians: Gaussians, host: str, port: int, camera: dict[str, Any] | None = None
) -> viser.ViserServer:
    """A server that shows them.

    Args:
        camera: an entry of cameras.json, for where the view begins.
    """
    server = viser.ViserServer(host, port)
    server.scene.set_background_image(np.zeros((1, 1, 3), np.uint8))
    covariances = rayfuse.splat_covariances(gaussians.quats, gaussians.scales.exp())
    server.scene.add_gaussian_splats(
        "/splats",
        centers=gaussians.means.numpy(),
        covariances=covariances.numpy(),
        rgbs=(gaussians.sh0[:, 0] * FLAT_HARMONIC + 0.5).clamp(0, 1).numpy(),
        opacities=torch.sigmoid(gaussians.opacities)[:, None].numpy(),
    )
    if camera is not None:
        position, (_, down, ahead) = np.array(camera["position"]), np.array(camera["rotation"]).T
        # what is seen is about as far as the Gaussians are
        distance = np.median((gaussians.means.numpy() - position) @ ahead)
        server.scene.set_up_direction(tuple(-down))
        server.initial_camera.position = position
        server.initial_camera.look_at = position + distance * ahead
        server.initial_camera.fov = 2 * math.atan(0.5 * camera["height"] / camera["fy"])
    return server


def _first_camera(ply: Path) -> dict[str, Any] | None:
    path = ply.with_name("cameras.json")
    if not path.is_file():
        return None
    try:
        camera = json.loads(path.read_text(encoding="utf-8"))[0]
        return {key: camera[key] for key in ("position", "rotation", "height", "fy")}
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} must list cameras, got {error}") from error
