"""Depth of photographs from each other, by a plane sweep: rough, and enough to start from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rayfuse.splat.gaussians import Camera

PLANES = 64
NEIGHBOURS = 4
# of those that see a pixel best: the others may have something in between
AGREEING = 2
WINDOW = 5
# the least mean error of a pixel, as a share of its median over all planes, that is a find
DISTINCT = 0.4


@torch.no_grad()
def depth_of(
    view: int, photos: Tensor, cameras: list[Camera], nearest: float, farthest: float
) -> Tensor:
    """Depth along z [H, W] of a photograph, NaN where no plane stands out.

    Planes stand across the photograph's axis, evenly in disparity. On each the others that were
    taken nearby are compared with it; a plane counts by the mean absolute difference over a window.

    Args:
        photos: [N, H, W, 3] with the cameras that took them.
        nearest, farthest: depths of the first and the last plane.
    """
    h, w = photos.shape[1:3]
    camera = cameras[view]
    image = photos[view].permute(2, 0, 1)
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)]).flatten(1).to(photos)
    at_one = torch.linalg.inv(camera.K) @ pixels
    depths = 1 / torch.linspace(1 / nearest, 1 / farthest, PLANES).to(photos)
    errors = []
    for other in _neighbours(view, cameras):
        theirs = cameras[other]
        to_theirs = theirs.viewmat @ torch.linalg.inv(camera.viewmat)
        seen = theirs.K @ (
            depths[:, None, None] * (to_theirs[:3, :3] @ at_one) + to_theirs[:3, 3:]
        )
        at = 2 * seen[:, :2] / seen[:, 2:].clamp_min(1e-6) / seen.new_tensor([w, h])[:, None] - 1
        outside = (at.abs() > 1).any(1) | (seen[:, 2] <= 0)
        sampled = F.grid_sample(
            photos[other].permute(2, 0, 1)[None].expand(PLANES, -1, -1, -1),
            at.mT.view(PLANES, h, w, 2),
            align_corners=False,
        )
        error = (sampled - image).abs().mean(1, keepdim=True)
        error = F.avg_pool2d(error, WINDOW, 1, WINDOW // 2, count_include_pad=False)[:, 0]
        errors.append(error.masked_fill(outside.view(PLANES, h, w), torch.inf))
    # [planes, H, W]
    error = torch.stack(errors).sort(0).values[:AGREEING].mean(0)
    least, plane = error.min(0)
    usual = error.nan_to_num(posinf=torch.nan).nanmedian(0).values
    found = least.isfinite() & (least < DISTINCT * usual)
    return torch.where(found, depths[plane], torch.nan)


def _neighbours(view: int, cameras: list[Camera]) -> list[int]:
    """The nearest cameras that look about the same way."""
    to_world = torch.stack([torch.linalg.inv(camera.viewmat) for camera in cameras])
    distance = (to_world[:, :3, 3] - to_world[view, :3, 3]).norm(dim=1)
    alike = (to_world[:, :3, 2] * to_world[view, :3, 2]).sum(1) > 0.5
    distance = torch.where(alike, distance, torch.inf)
    distance[view] = torch.inf
    order = distance.argsort()[:NEIGHBOURS].tolist()
    return [other for other in order if distance[other].isfinite()]
