"""The picture in docs/splats.md: python bench/garden_picture.py SCENE.npz PICTURE.jpg

Colour, expected depth and opacity of the Gaussians of gsplat_step.py, in one pass.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

from gsplat_step import scene
from rayfuse.splat.gaussians import Camera, Gaussians

WIDTH = 432  # of each of the three images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scene")
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    values, (viewmats, Ks, width, height) = scene(args.scene)
    gaussians = Gaussians(
        means=values["means"],
        scales=values["scales"].log(),
        quats=values["quats"],
        opacities=values["opacities"].logit(),
        sh0=values["colors"][:, :1],
        shN=values["colors"][:, 1:],
    )
    with torch.no_grad():
        seen = gaussians.picture(Camera(viewmats[0], Ks[0], width, height))
    solid = (seen.alpha > 0.5).numpy()
    disparity = 1 / seen.depth.clamp_min(1e-3).numpy()
    low, high = np.quantile(disparity[solid], [0.02, 0.98])
    depth = colormaps["viridis"]((disparity - low) / (high - low))[..., :3] * solid[..., None]
    opacity = seen.alpha[..., None].expand(-1, -1, 3)
    images = np.concatenate([seen.rgb.clamp(0, 1), depth, opacity], axis=1)
    size = 3 * WIDTH, round(WIDTH * height / width)
    Image.fromarray((255 * images).astype(np.uint8)).resize(size).save(args.picture, quality=85)


if __name__ == "__main__":
    main()
