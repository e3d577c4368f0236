"""Depth of photographs from each other, by plane sweeps: rough, and enough to start from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rayfuse.splat.gaussians import Camera

PLANES = 64
NEIGHBOURS = 6
# of those that see a pixel best: the others may have something in between
AGREEING = 2
WINDOW = 5
# the least error of a pixel, as a share of its median over all planes, that is a find
DISTINCT = 0.5
# by how much two photographs may differ in the depth of a point
TOLERANCE = 0.05


@torch.no_grad()
def sweep(photos: Tensor, cameras: list[Camera], nearest: float, farthest: float) -> Tensor:
    """Depths along z [N, H, W], NaN where none stands out or others do not confirm it.

    Planes stand across each photograph's axis, evenly in disparity. On each the others that were
    taken nearby are compared with it; the plane of the least mean absolute difference over a window
    is the find. It stays where at least two of the others have found the same point.

    Args:
        photos: [N, H, W, 3] with the cameras that took them.
        nearest, farthest: depths of the first and the last plane.
    """
    planes = 1 / torch.linspace(1 / nearest, 1 / farthest, PLANES).to(photos)
    neighbours = [_neighbours(view, cameras) for view in range(len(cameras))]
    found = torch.stack(
        [_find(view, others, photos, cameras, planes) for view, others in enumerate(neighbours)]
    )
    confirmed = []
    for view, others in enumerate(neighbours):
        agree = torch.zeros_like(found[view])
        for other in others:
            at, z = _seen_by(cameras[other], cameras[view], found[view][None])
            theirs = _sample(found[other][None], at, "nearest")[:, 0]
            agree += ((theirs / z - 1).abs() < TOLERANCE)[0]
        confirmed.append(found[view].masked_fill(agree < AGREEING, torch.nan))
    return torch.stack(confirmed)


def _find(
    view: int, others: list[int], photos: Tensor, cameras: list[Camera], planes: Tensor
) -> Tensor:
    h, w = photos.shape[1:3]
    if len(others) < AGREEING:
        return photos.new_full((h, w), torch.nan)
    errors = []
    for other in others:
        at, z = _seen_by(cameras[other], cameras[view], planes[:, None, None].expand(-1, h, w))
        seen = _sample(photos[other].permute(2, 0, 1), at, "bilinear")
        error = (seen - photos[view].permute(2, 0, 1)).abs().mean(1, keepdim=True)
        error = F.avg_pool2d(error, WINDOW, 1, WINDOW // 2, count_include_pad=False)[:, 0]
        outside = (at.abs() > 1).any(-1) | (z <= 0)
        errors.append(error.masked_fill(outside, torch.inf))
    # [planes, H, W]
    error = torch.stack(errors).sort(0).values[:AGREEING].mean(0)
    least, plane = error.min(0)
    usual = error.masked_fill(error.isinf(), torch.nan).nanmedian(0).values
    return torch.where(least < DISTINCT * usual, planes[plane], torch.nan)


def _seen_by(theirs: Camera, ours: Camera, depth: Tensor) -> tuple[Tensor, Tensor]:
    """Where another camera sees our pixels at depth [K, H, W]: [K, H, W, 2] from -1 to 1 across its
    image, and the depth there [K, H, W]."""
    h, w = depth.shape[1:]
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], -1).to(depth)
    to_theirs = theirs.viewmat @ torch.linalg.inv(ours.viewmat)
    turn = theirs.K @ to_theirs[:3, :3] @ torch.linalg.inv(ours.K)
    seen = depth[..., None] * (pixels @ turn.T) + theirs.K @ to_theirs[:3, 3]
    z = seen[..., 2]
    size = depth.new_tensor([theirs.width, theirs.height])
    return 2 * seen[..., :2] / (z[..., None].clamp_min(1e-6) * size) - 1, z


def _sample(image: Tensor, at: Tensor, mode: str) -> Tensor:
    """An image [C, H, W] at places [K, H, W, 2]: [K, C, H, W]."""
    images = image[None].expand(len(at), -1, -1, -1)
    return F.grid_sample(images, at, mode=mode, align_corners=False)


def _neighbours(view: int, cameras: list[Camera]) -> list[int]:
    """The nearest cameras that look about the same way."""
    to_world = torch.stack([torch.linalg.inv(camera.viewmat) for camera in cameras])
    distance = (to_world[:, :3, 3] - to_world[view, :3, 3]).norm(dim=1)
    alike = (to_world[:, :3, 2] * to_world[view, :3, 2]).sum(1) > 0.5
    distance = torch.where(alike, distance, torch.inf)
    distance[view] = torch.inf
    order = distance.argsort()[:NEIGHBOURS].tolist()
    return [other for other in order if distance[other].isfinite()]
