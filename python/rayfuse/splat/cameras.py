"""Pinhole cameras of a scene's photographs, and the points that training starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional as F

from rayfuse.splat.gaussians import Camera
from rayfuse.splat.sweep import sweep
from rayfuse.train.run import write_json
from rayfuse.train.scene import Scene, box_filter

# of a pixel; float32 has fewer digits far from the middle of a wide photograph
STRAIGHT = 1e-2
# how far points may be from cameras, which are typically 1.5 away from what they look at;
# behind something opaque there is more to see
NEAREST, FARTHEST_OBJECT, FARTHEST = 0.4, 2.4, 8.0
# of photographs, in pixels: enough to tell planes apart, and 0.1 s a view
SWEPT_SIDE = 120
# share of pixels whose depth was found that says that photographs overlap; others would be guesses
# that stand before them
ENOUGH = 0.1


def undistorted(scene: Scene) -> Scene:
    """The scene as pinhole cameras would have seen it.

    Where a lens bends, its photographs are resampled to the largest upright rectangle of straight
    rays that they cover, so that no pixel is left without a value; depth goes with them.
    """
    grids = torch.stack([_straight(plane) for plane in scene.plane])
    bent = max(
        ((grid - plane).abs().amax((0, 1)) / _step(grid)).max().item()
        for grid, plane in zip(grids, scene.plane, strict=True)
    )
    if bent < STRAIGHT:
        return scene
    places = [_find(plane, grid) for plane, grid in zip(scene.plane, grids, strict=True)]

    def resample(images: Tensor) -> Tensor:
        """[N, H, W, C]"""
        seen = [
            _sample(image, places[camera])
            for image, camera in zip(images, scene.camera.tolist(), strict=True)
        ]
        return torch.stack(seen)

    alpha = None if scene.alpha is None else resample(scene.alpha[..., None])[..., 0]
    depth = None if scene.depth is None else resample(scene.depth[..., None])[..., 0]
    return replace(scene, rgb=resample(scene.rgb), alpha=alpha, depth=depth, plane=grids)


def cameras(scene: Scene) -> list[Camera]:
    """The camera of each photograph of an undistorted scene."""
    height, width = scene.rgb.shape[1:3]
    # y and z of the scene's cameras point up and back
    flip = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
    result = []
    for pose, number in zip(scene.poses.cpu().double(), scene.camera.tolist(), strict=True):
        to_world = torch.eye(4, dtype=torch.float64)
        to_world[:3] = pose
        plane = scene.plane[number].cpu().double()
        step, first = _step(plane), plane[0, 0]
        K = torch.eye(3, dtype=torch.float64)
        K[[0, 1], [0, 1]] = 1 / step
        K[:2, 2] = 0.5 - first / step
        viewmat = torch.linalg.inv(to_world @ flip)
        result.append(Camera(viewmat.to(scene.poses), K.to(scene.poses), width, height))
    return result


def write_cameras(path: Path, names: list[str], cameras: list[Camera]) -> None:
    """Writes cameras.json as viewers of Gaussians read it: Kerbl et al. (2023)."""
    entries = []
    for number, (name, camera) in enumerate(zip(names, cameras, strict=True)):
        to_world = torch.linalg.inv(camera.viewmat.double()).cpu()
        entry = dict(id=number, img_name=name, width=camera.width, height=camera.height)
        entry |= dict(position=to_world[:3, 3].tolist(), rotation=to_world[:3, :3].tolist())
        entry |= dict(fx=camera.K[0, 0].item(), fy=camera.K[1, 1].item())
        entries.append(entry)
    write_json(path, entries)


def starting_points(scene: Scene, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points [P, 3] and their colours [P, 3]: pixels of training views, lifted by their depth.

    Where photographs have depth, all training pixels of theirs are lifted, those without by that of
    the nearest with it. Else `count` pixels are drawn, and those lifted that are opaque and whose
    depth a plane sweep finds; by random distances if it finds that of few.
    """
    if scene.depth is not None:
        index, distance = _lifted(scene, scene.depth)
    else:
        index, distance = _drawn(scene, count, generator)
    rays = scene.rays(index)
    points = rays.origins + distance[:, None] * rays.directions
    return points, scene.rgb.view(-1, 3)[index]


def _drawn(scene: Scene, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pixels, flat into the photographs, and distances along their rays."""
    views = torch.tensor(scene.train_views)
    chosen = torch.randint(len(views), (count,), generator=generator)
    pixel = torch.randint(scene.pixels, (count,), generator=generator)
    farthest = FARTHEST if scene.alpha is None else FARTHEST_OBJECT
    # evenly in disparity, as that is what moves pixels
    low, high = 1 / farthest, 1 / NEAREST
    distance = 1 / (low + (high - low) * torch.rand(count, generator=generator))
    swept = _swept(scene, views, farthest)[chosen, pixel]
    found = swept.isfinite()
    if found.float().mean() > ENOUGH:
        chosen, pixel, distance = chosen[found], pixel[found], swept[found]
    index = views[chosen] * scene.pixels + pixel
    if scene.alpha is not None:
        opaque = scene.alpha.flatten()[index] > 0.5
        index, distance = index[opaque], distance[opaque]
    return index, distance


def _swept(scene: Scene, views: Tensor, farthest: float) -> Tensor:
    """[views, H * W] distances along the rays of training views, NaN where nothing is found."""
    height, width = scene.rgb.shape[1:3]
    blocks = max(1, round(max(height, width) / SWEPT_SIDE))
    photos = box_filter(scene.rgb[views], blocks)
    seen_by = [cameras(scene)[view] for view in views.tolist()]
    small = [_smaller(camera, blocks) for camera in seen_by]
    depth = sweep(photos, small, NEAREST, farthest)
    # nearest, so that nothing is lifted to between two surfaces
    depth = F.interpolate(depth[:, None], (height, width))[:, 0]
    along_ray = (scene.plane.square().sum(-1) + 1).sqrt()[scene.camera[views]]
    return (depth * along_ray).flatten(1)


def _smaller(camera: Camera, blocks: int) -> Camera:
    K = torch.cat([camera.K[:2] / blocks, camera.K[2:]])
    return Camera(camera.viewmat, K, camera.width // blocks, camera.height // blocks)


def _lifted(scene: Scene, depth: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels, flat into the photographs, and their distances along the ray."""
    held_out = (
        scene.held_out.reshape(len(depth), -1, 1) if scene.split == "views" else scene.held_out
    )
    indices, distances = [], []
    for view, image in enumerate(depth.cpu()):
        known = image.isfinite()
        if not bool(known.any()):
            continue
        rows, columns = distance_transform_edt(
            np.logical_not(known.numpy()), return_distances=False, return_indices=True
        )
        usable = (~held_out[view].expand(image.shape)).flatten().nonzero()[:, 0]
        indices.append(view * scene.pixels + usable)
        distances.append(image[torch.from_numpy(rows), torch.from_numpy(columns)].flatten()[usable])
    return torch.cat(indices), torch.cat(distances)


def _step(plane: Tensor) -> Tensor:
    """[2] from a pixel to the next, in x and y, of a straight plane [H, W, 2]."""
    last = plane.new_tensor([plane.shape[1] - 1, plane.shape[0] - 1]).clamp_min(1)
    return (plane[-1, -1] - plane[0, 0]) / last


def _straight(plane: Tensor) -> Tensor:
    """[H, W, 2] evenly spaced over the largest upright rectangle within the plane's borders."""
    h, w = plane.shape[:2]
    sides = [
        torch.linspace(low.item(), high.item(), count, dtype=torch.float64)
        for low, high, count in (
            (plane[:, 0, 0].max(), plane[:, -1, 0].min(), w),
            (plane[0, :, 1].max(), plane[-1, :, 1].min(), h),
        )
    ]
    return torch.stack(torch.meshgrid(*sides, indexing="xy"), -1).to(plane)


def _find(plane: Tensor, grid: Tensor) -> Tensor:
    """[H, W, 2] at which pixel (x, y) of the plane its value is that of the grid."""
    h, w = plane.shape[:2]
    x, y = torch.arange(w, device=plane.device), torch.arange(h, device=plane.device)
    place = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).to(plane)
    # lenses are so nearly straight that each turn gains digits
    for _ in range(20):
        place = place + (grid - _sample(plane, place)) / _step(grid)
    return place


def _sample(image: Tensor, place: Tensor) -> Tensor:
    """[H, W, C] the image between its pixels, held beyond its borders."""
    h, w = image.shape[:2]
    at = 2 * place / place.new_tensor([w - 1, h - 1]) - 1
    return F.grid_sample(
        image.permute(2, 0, 1)[None], at[None], padding_mode="border", align_corners=True
    )[0].permute(1, 2, 0)
