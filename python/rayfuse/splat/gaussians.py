"""Gaussians: their parameters, what starts them, their pictures, and the standard .ply."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import plyfile
import torch
from scipy.spatial import cKDTree
from torch import Tensor

import rayfuse
from rayfuse.train import InputError

TILE_SIZE = 16
# of the harmonic of degree 0
FLAT_HARMONIC = 0.5 / math.sqrt(math.pi)
NEIGHBOURS = 3
FIRST_OPACITY = 0.5
LEAST_SCALE = 1e-7


class Camera(NamedTuple):
    """A pinhole camera that looks along z, y down."""

    viewmat: Tensor  # [4, 4] world to camera
    K: Tensor  # [3, 3] in pixels
    width: int
    height: int


class Picture(NamedTuple):
    """What a camera sees of Gaussians, and what densification asks of a step."""

    rgb: Tensor  # [H, W, 3]
    alpha: Tensor  # [H, W]
    depth: Tensor  # [H, W] along z, 0 where there is nothing
    info: dict[str, Any]


@dataclass
class Gaussians:
    """N Gaussians as they are trained and stored.

    Args:
        means: [N, 3] centres.
        scales: [N, 3] logarithms of the standard deviations.
        quats: [N, 4] rotations (w, x, y, z) of any length.
        opacities: [N] logits.
        sh0, shN: [N, 1, 3] and [N, K - 1, 3] coefficients of the colours, less 0.5.
    """

    means: Tensor
    scales: Tensor
    quats: Tensor
    opacities: Tensor
    sh0: Tensor
    shN: Tensor

    @property
    def degree(self) -> int:
        """Up to which harmonics there are coefficients."""
        return math.isqrt(1 + self.shN.shape[1]) - 1

    def picture(
        self, camera: Camera, background: Tensor | None = None, degree: int | None = None
    ) -> Picture:
        """Colour, opacity and expected depth in one pass.

        Args:
            background: [3] or [H, W, 3]; None for black.
            degree: up to which harmonics count; all by default.
        """
        means, viewmats, Ks = self.means, camera.viewmat[None], camera.K[None]
        opacities = self.opacities.sigmoid()
        splats = rayfuse.project_gaussians(
            means,
            viewmats,
            Ks,
            quats=self.quats,
            scales=self.scales.exp(),
            opacities=opacities,
            image_width=camera.width,
            image_height=camera.height,
        )
        position = torch.linalg.inv(camera.viewmat)[:3, 3]
        colours = rayfuse.spherical_harmonics(
            (means - position)[None],
            torch.cat([self.sh0, self.shN], 1),
            masks=splats.radii[..., 0] > 0,
            degree=self.degree if degree is None else degree,
        )
        columns, rows = (-(-side // TILE_SIZE) for side in (camera.width, camera.height))
        lists = rayfuse.intersect_tiles(
            splats.means2d,
            splats.radii,
            splats.depths,
            TILE_SIZE,
            columns,
            rows,
            conics=splats.conics,
            opacities=opacities[None],
        )
        image = rayfuse.composite_tiles(
            splats.means2d,
            splats.conics,
            (colours + 0.5).clamp_min(0),
            opacities[None],
            lists.tile_offsets,
            lists.flatten_ids,
            depths=splats.depths,
            background=None if background is None else background[None],
            image_width=camera.width,
            image_height=camera.height,
            tile_size=TILE_SIZE,
        )
        info = dict(
            means2d=splats.means2d,
            radii=splats.radii,
            gaussian_ids=None,
            width=camera.width,
            height=camera.height,
            n_cameras=1,
        )
        return Picture(image.colors[0], image.alpha[0], image.depth[0], info)


def from_points(points: Tensor, rgb: Tensor, degree: int) -> Gaussians:
    """Round Gaussians at points [N, 3] of colours rgb [N, 3], as wide as their neighbours are far.

    Raises:
        InputError: for fewer than 4 points, or such as are not finite.
    """
    if len(points) <= NEIGHBOURS:
        raise InputError(f"points must be at least {NEIGHBOURS + 1}, got {len(points)}")
    if not bool(points.isfinite().all()):
        raise InputError("points must be finite, got NaN or infinity")
    at = points.double().cpu().numpy()
    distances = cKDTree(at).query(at, NEIGHBOURS + 1, workers=-1)[0][:, 1:]
    spread = torch.from_numpy(np.sqrt((distances**2).mean(1))).to(points).clamp_min(LEAST_SCALE)
    count = len(points)
    return Gaussians(
        means=points.clone(),
        scales=spread.log()[:, None].repeat(1, 3),
        quats=torch.tensor([1.0, 0.0, 0.0, 0.0]).to(points).repeat(count, 1),
        opacities=torch.full((count,), FIRST_OPACITY).logit().to(points),
        sh0=((rgb - 0.5) / FLAT_HARMONIC)[:, None],
        shN=points.new_zeros(count, (degree + 1) ** 2 - 1, 3),
    )


# ---- the .ply of 3D Gaussian splatting: Kerbl et al. (2023), as viewers read it

_PLACE = ("x", "y", "z")
_NORMAL = ("nx", "ny", "nz")
_SHAPE = ("opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3")


def write_ply(path: Path, gaussians: Gaussians) -> None:
    """Writes the standard .ply, with logits, logarithms and coefficients as they are trained."""
    g = gaussians
    flat = torch.cat(
        [
            g.means,
            torch.zeros_like(g.means),
            g.sh0[:, 0],
            # all coefficients of red, then of green, then of blue
            g.shN.mT.flatten(1),
            g.opacities[:, None],
            g.scales,
            g.quats / g.quats.norm(dim=1, keepdim=True),
        ],
        1,
    )
    names = [*_PLACE, *_NORMAL, *_colours(3 * g.shN.shape[1]), *_SHAPE]
    rows = np.ascontiguousarray(flat.detach().cpu().numpy().astype("<f4"))
    rows = rows.view([(name, "<f4") for name in names])[:, 0]
    part = path.with_name(path.name + ".part")
    plyfile.PlyData([plyfile.PlyElement.describe(rows, "vertex")]).write(str(part))
    part.replace(path)


def read_ply(path: Path) -> Gaussians:
    """The Gaussians of a standard .ply.

    Raises:
        InputError: for a file that is not there, cut short, not of Gaussians, or not finite.
    """
    vertices = _vertices(path)
    names = vertices.dtype.names or ()
    rest = sum(name.startswith("f_rest_") for name in names)
    wanted = [*_PLACE, *_colours(rest), *_SHAPE]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise InputError(f"{path} must hold Gaussians, got no {missing[0]} of its points")
    degree = math.isqrt(1 + rest // 3) - 1
    if 3 * (degree + 1) ** 2 != 3 + rest or degree > 4:
        raise InputError(f"{path} must have f_rest of a degree from 0 to 4, got {rest} of them")
    flat = torch.from_numpy(np.stack([vertices[name] for name in wanted], 1).astype(np.float32))
    if not bool(flat.isfinite().all()):
        raise InputError(f"{path} must be finite, got NaN or infinity")
    means, sh0, shN, opacities, scales, quats = flat.split([3, 3, rest, 1, 3, 4], 1)
    return Gaussians(
        means=means.contiguous(),
        scales=scales.contiguous(),
        quats=quats.contiguous(),
        opacities=opacities[:, 0].contiguous(),
        sh0=sh0[:, None].contiguous(),
        shN=shN.unflatten(1, (3, rest // 3)).mT.contiguous(),
    )


def read_start(path: Path, degree: int) -> Gaussians:
    """The Gaussians of a .ply with harmonics up to a degree, or those of its points, grey where it
    has no colours."""
    if "f_dc_0" in (_vertices(path).dtype.names or ()):
        read = read_ply(path)
        shN = read.means.new_zeros(len(read.means), (degree + 1) ** 2 - 1, 3)
        both = min(shN.shape[1], read.shN.shape[1])
        shN[:, :both] = read.shN[:, :both]
        return replace(read, shN=shN)
    return from_points(*read_points(path), degree)


def read_points(path: Path) -> tuple[Tensor, Tensor]:
    """Points [N, 3] of a .ply and their colours [N, 3], grey where it has none."""
    vertices = _vertices(path)
    names = vertices.dtype.names or ()
    if any(name not in names for name in _PLACE):
        raise InputError(f"{path} must have points with x, y and z, got {', '.join(names)}")
    points = np.stack([vertices[name] for name in _PLACE], 1).astype(np.float32)
    colours = ("red", "green", "blue")
    if all(name in names for name in colours):
        rgb = np.stack([vertices[name] for name in colours], 1).astype(np.float32) / 255
    else:
        rgb = np.full_like(points, 0.5)
    return torch.from_numpy(points), torch.from_numpy(rgb)


def _colours(rest: int) -> list[str]:
    return [*(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(rest))]


def _vertices(path: Path) -> np.ndarray:
    if not path.is_file():
        raise InputError(f"points must be an existing .ply, got {path}")
    try:
        return np.asarray(plyfile.PlyData.read(str(path), mmap=False)["vertex"].data)
    except (plyfile.PlyParseError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} must be a whole .ply of points, got {error}") from error
