"""Renders what was held out, measures it, and writes the images of the report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from rayfuse.train.features import FeatureMap
from rayfuse.train.model import FieldModel
from rayfuse.train.objective import Objective
from rayfuse.train.scene import Scene, fill_from_neighbours

RAYS_AT_ONCE = 4096
FULL_ERROR = 0.25  # the absolute colour error at the bright end of the error image


@dataclass
class View:
    """A rendered photograph: [H, W, C] images, normals in the camera's frame."""

    rgb: Tensor
    accumulation: Tensor
    depth: Tensor
    normal: Tensor | None = None
    predicted_normal: Tensor | None = None
    heads: dict[str, Tensor] = field(default_factory=dict)


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of colours in [0, 1]."""
    return -10.0 * math.log10(max(mse, 1e-10))


@torch.no_grad()
def render_view(model: FieldModel, objective: Objective, scene: Scene, view: int) -> View:
    """Renders the whole of one photograph's frame."""
    h, w = scene.rgb.shape[1:3]
    pixels = torch.arange(scene.pixels, device=scene.rgb.device) + view * scene.pixels
    parts: list[dict[str, Tensor]] = []
    for index in pixels.split(RAYS_AT_ONCE):
        normal_rays = None if objective.config.predict_normals else 0
        samples = model(scene.rays(index), normal_rays=normal_rays)
        out = samples.render(objective.background(samples, None))
        part = dict(rgb=out.rgb.clamp(0.0, 1.0), accumulation=out.accumulation, depth=out.depth)
        if samples.n is not None and samples.n_pred is not None:
            to_camera = scene.poses[view, :, :3]
            part["normal"] = samples.composite(out.weights, samples.n) @ to_camera
            part["predicted_normal"] = samples.composite(out.weights, samples.n_pred) @ to_camera
        features = model.features(samples, out)
        parts.append(part | features)
    images = {name: torch.cat([part[name] for part in parts]).view(h, w, -1) for name in parts[0]}
    heads = {name: images.pop(name) for name in features}
    return View(**images, heads=heads)


def evaluate(
    render: Callable[[int], View],
    scene: Scene,
    run_dir: Path,
    features: dict[str, FeatureMap],
    white: bool = False,
) -> dict[str, Any]:
    """PSNR and SSIM of what was held out, with the images of every view that holds it.

    Args:
        render: the whole frame of a photograph by its index.
        features: what the heads of a view were trained on, by name.
        white: photographs stand in front of white, else of black.

    Held-out pixels: PSNR over all of them together, SSIM as the mean over them of the SSIM map of
    the whole render. Held-out views: means over views. Returns the content of evaluation.json but
    for times and sizes.
    """
    folder = run_dir / "renders"
    folder.mkdir(exist_ok=True)
    views: list[dict[str, Any]] = []
    squared, count = 0.0, 0
    for number in scene.test_views:
        view = render(number)
        photo = scene.rgb[number]
        if scene.alpha is not None and white:
            photo = photo + (1 - scene.alpha[number])[..., None]
        held = scene.held_out[number].expand(photo.shape[:2])
        error = (view.rgb - photo).square().mean(-1)[held]
        squared, count = squared + error.sum().item(), count + error.numel()
        images, ranges = _images(view, photo, features, number, scene)
        name = scene.names[number]
        paths = {}
        for kind, image in images.items():
            paths[kind] = f"renders/{name}_{kind}.png"
            pixels = (image.clamp(0, 1) * 255).round().byte().cpu().numpy()
            Image.fromarray(pixels).save(run_dir / paths[kind])
        views.append(
            {
                "name": name,
                "psnr": psnr(error.mean().item()),
                "ssim": _ssim(view.rgb, photo, held),
                "images": paths,
                "ranges": ranges,
            }
        )
    by_pixel = scene.split == "pixels"
    ssims = [view["ssim"] for view in views if view["ssim"] is not None]
    return {
        "scene": scene.name,
        "held_out": scene.split,
        "psnr": psnr(squared / count) if by_pixel else float(np.mean([v["psnr"] for v in views])),
        "ssim": float(np.mean(ssims)) if ssims else None,
        "baseline": _baseline(scene) if by_pixel else None,
        "views": views,
    }


def _baseline(scene: Scene) -> dict[str, Any]:
    filled = fill_from_neighbours(scene.rgb, scene.held_out)
    error = (filled - scene.rgb)[scene.held_out].square().mean().item()
    return {"name": "mean of the un-held side neighbours", "psnr": psnr(error)}


def _ssim(rgb: Tensor, photo: Tensor, held: Tensor) -> float | None:
    # the window of 11 pixels must fit
    if min(photo.shape[:2]) < 11:
        return None
    a, b = (image.permute(2, 0, 1)[None] for image in (rgb, photo))
    result = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    assert isinstance(result, tuple)
    return result[1][0].mean(0)[held].mean().item()


def _images(
    view: View, photo: Tensor, features: dict[str, FeatureMap], number: int, scene: Scene
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Images [H, W, 3] in [0, 1] of one view, and the meaning of the ends of colour maps."""
    error = (view.rgb - photo).abs().mean(-1)
    opaque = view.accumulation[..., 0] > 0.5
    known = view.depth[..., 0][opaque] if bool(opaque.any()) else view.depth
    near, far = (max(torch.quantile(known.flatten()[::7], q).item(), 1e-6) for q in (0.01, 0.99))
    # a ray that met nothing has depth 0, and is farther than all others
    disparity = torch.where(view.depth[..., 0] > 0, 1 / view.depth[..., 0], 0.0)
    disparity = (disparity - 1 / far) / max(1 / near - 1 / far, 1e-9)
    images = {
        "photo": photo,
        "render": view.rgb,
        "error": _coloured(error / FULL_ERROR, "inferno"),
        "depth": _coloured(disparity, "viridis"),
        "accumulation": view.accumulation.expand(-1, -1, 3),
    }
    ranges = {
        "depth": f"{near:.2f} (bright) to {far:.2f} (dark), linear in inverse depth",
        "error": f"0 (dark) to {FULL_ERROR} (bright), mean absolute error of the colours",
    }
    for kind in ("normal", "predicted_normal"):
        normal = getattr(view, kind)
        if normal is not None:
            images[kind] = 0.5 + 0.5 * normal
    pixels = torch.arange(scene.pixels, device=photo.device) + number * scene.pixels
    for head, rendered in view.heads.items():
        target = features[head].at(scene, pixels).view(*photo.shape[:2], -1)
        # channels are principal components in order: the first three make the colours
        first = target[..., :3].flatten(0, 1)
        low, high = torch.quantile(first, 0.02, dim=0), torch.quantile(first, 0.98, dim=0)
        for kind, value in ((head, rendered), (f"{head}_target", target)):
            shade = (value[..., :3] - low) / (high - low).clamp_min(1e-6)
            images[kind] = torch.nn.functional.pad(shade, (0, 3 - shade.shape[-1]))
    return images, ranges


def _coloured(value: Tensor, name: str) -> Tensor:
    return torch.from_numpy(colormaps[name](value.clamp(0, 1).cpu().numpy())[..., :3]).float()
