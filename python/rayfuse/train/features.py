"""Dense features of the photographs, as targets for distillation."""

from __future__ import annotations

import importlib.metadata
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rayfuse.train import InputError
from rayfuse.train.scene import Scene

WEIGHTS = "weights/vST0.0/alex_shift_tolerant.pth"
# which convolution a head distils when its features are not given as files: no DINO or CLIP
# weights can be installed as a package, so a middle and a deep layer of one trunk stand in
LAYERS = {"feature": 5, "feature_dino": 3, "feature_clip": 5}


@dataclass
class FeatureConfig:
    """Which features the field distils."""

    feature_type: Literal["ALEXNET", "DINOCLIP", "NONE"] = "ALEXNET"
    """ALEXNET: one head, the trunk of the stlpips-pytorch package. DINOCLIP: two heads,
    feature_dino and feature_clip; give them as --features.files, or else two depths of that same
    trunk stand in (they are not DINO or CLIP features). NONE: train without features."""
    files: Path | None = None
    """Your own features instead: a folder with one [h, w, C] array per photograph, named like it
    with .npy or .pt (for DINOCLIP in its sub-folders dino and clip)."""
    channels: int = 64
    """Principal components kept."""


@dataclass
class FeatureMap:
    """Features of every photograph on a coarse lattice.

    values: [N, h, w, C], fitted on training photographs to mean 0 and root mean square 1.
    start, step: (y, x) pixel position of the first lattice point, and the lattice spacing.
    """

    values: Tensor
    start: tuple[float, float]
    step: tuple[float, float]

    @property
    def channels(self) -> int:
        return self.values.shape[-1]

    def at(self, scene: Scene, index: Tensor) -> Tensor:
        """Bilinear lookup [R, C] at the centres of pixels index[R], flat into [N, H, W]."""
        _, h, w, _ = self.values.shape
        view, pixel = index // scene.pixels, index % scene.pixels
        width = scene.rgb.shape[2]
        y = (((pixel // width) + 0.5 - self.start[0]) / self.step[0]).clamp(0, h - 1)
        x = (((pixel % width) + 0.5 - self.start[1]) / self.step[1]).clamp(0, w - 1)
        y0, x0 = y.long().clamp(max=max(h - 2, 0)), x.long().clamp(max=max(w - 2, 0))
        y1, x1 = (y0 + 1).clamp(max=h - 1), (x0 + 1).clamp(max=w - 1)
        fy, fx = (y - y0), (x - x0)
        rows = torch.stack([(view * h + a) * w + b for a in (y0, y1) for b in (x0, x1)], dim=-1)
        weights = torch.stack([a * b for a in (1 - fy, fy) for b in (1 - fx, fx)], dim=-1)
        flat = self.values.view(-1, self.channels)
        return F.embedding_bag(rows, flat, per_sample_weights=weights, mode="sum")


def extract(scene: Scene, config: FeatureConfig) -> dict[str, FeatureMap]:
    """The feature map of each head, by its name in the losses; empty for NONE.

    Held-out pixels are filled from their neighbours before a network sees the photograph, and
    mean, principal components and scale come from the photographs with training pixels alone.
    """
    if config.feature_type == "NONE":
        return {}
    if config.channels < 1:
        raise InputError(f"features.channels must be at least 1, got {config.channels}")
    double = config.feature_type == "DINOCLIP"
    heads = ["feature_dino", "feature_clip"] if double else ["feature"]
    if config.files is not None:
        folders = {head: config.files / head.partition("_")[2] for head in heads}
        raw = {head: _read_files(scene, folder) for head, folder in folders.items()}
    else:
        raw = _run_trunk(scene, {head: LAYERS[head] for head in heads})
    for head, feature in raw.items():
        raw[head].values = _principal(feature.values, scene.train_views, config.channels)
    return raw


def _principal(values: Tensor, train: list[int], channels: int) -> Tensor:
    """Leading principal components of values[N, h, w, C], scaled to root mean square 1."""
    flat = values[train].flatten(0, 2).double()
    mean = flat.mean(0)
    covariance = (flat - mean).T @ (flat - mean) / len(flat)
    basis = torch.linalg.eigh(covariance).eigenvectors.flip(-1)[:, :channels]
    # the sign of an eigenvector is arbitrary; fixing it keeps runs repeatable across libraries
    basis = basis * basis.sum(0).sign()
    projected = (values - mean.float()) @ basis.float()
    return (projected / projected[train].square().mean().sqrt().clamp_min(1e-8)).contiguous()


def _trunk_weights() -> dict[str, Tensor]:
    install = "pip install --no-deps stlpips-pytorch==0.0.2, or --features.feature-type NONE"
    try:
        files = importlib.metadata.files("stlpips-pytorch") or []
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"AlexNet weights must be installed ({install}), got no package") from None
    path = next((Path(str(f.locate())) for f in files if str(f).endswith(WEIGHTS)), None)
    try:
        if path is None:
            raise FileNotFoundError(WEIGHTS)
        return torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise InputError(f"AlexNet weights must be readable ({install}), got {error}") from error


class Trunk:
    """The convolutions of the shift-tolerant AlexNet of ST-LPIPS (Ghildyal and Liu 2022).

    Differs from AlexNet in that every stride is a blur of [1, 2, 1] followed by subsampling. Each
    layer's output keeps the pixel position of its first element and its spacing.
    """

    def __init__(self) -> None:
        state = _trunk_weights()
        self.shift, self.scale = state["scaling_layer.shift"], state["scaling_layer.scale"]
        keys = ("slice1.0", "slice2.5", "slice3.9", "slice4.11", "slice5.13")
        self.convolutions = [(state[f"net.{k}.weight"], state[f"net.{k}.bias"]) for k in keys]
        blur = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.blur = blur[:, None] * blur

    def __call__(self, rgb: Tensor, layers: set[int]) -> dict[int, FeatureMap]:
        """Unit outputs for rgb[H, W, 3] of the convolutions in `layers`, numbered 1 to 5."""
        x = (2 * rgb.permute(2, 0, 1)[None] - 1 - self.shift) / self.scale
        start, step = 0.5, 1
        result = {}
        for number, (weight, bias) in enumerate(self.convolutions, start=1):
            if number in (2, 3):
                x, start = F.max_pool2d(x, 3, stride=1), start + step
                x, start, step = self._halve(x), start - step, 2 * step
            padding = 2 if number <= 2 else 1
            x = F.conv2d(x, weight, bias, padding=padding)
            start += step * ((weight.shape[-1] - 1) / 2 - padding)
            if number == 1:
                x, start, step = self._halve(x), start - step, 2 * step
            x = F.relu(x)
            if number in layers:
                values = F.normalize(x[0].permute(1, 2, 0), dim=-1)
                result[number] = FeatureMap(values, (start, start), (step, step))
        return result

    def _halve(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.blur.expand(channels, 1, 3, 3)
        return F.conv2d(F.pad(x, (2, 2, 2, 2), "reflect"), kernel, stride=2, groups=channels)


@torch.no_grad()
def _run_trunk(scene: Scene, heads: dict[str, int]) -> dict[str, FeatureMap]:
    h, w = scene.rgb.shape[1:3]
    if min(h, w) < 32:
        raise InputError(
            f"photographs must be at least 32 pixels a side for features, got {w} x {h}"
        )
    trunk = Trunk()
    per_view = [trunk(photo, set(heads.values())) for photo in scene.photographs()]
    return {
        head: FeatureMap(
            torch.stack([maps[layer].values for maps in per_view]),
            per_view[0][layer].start,
            per_view[0][layer].step,
        )
        for head, layer in heads.items()
    }


def _read_files(scene: Scene, folder: Path) -> FeatureMap:
    if not folder.is_dir():
        raise InputError(f"features.files must be an existing folder, got {folder}")
    if scene.split == "pixels":
        raise InputError(
            "features.files must go with held-out views (files made from whole photographs would "
            f"show held-out pixels), got the scene {scene.name}"
        )
    arrays: list[Tensor] = []
    for name in scene.names:
        path = next((p for e in (".npy", ".pt") if (p := folder / f"{name}{e}").is_file()), None)
        if path is None:
            raise InputError(f"features.files must hold {name}.npy or {name}.pt, got {folder}")
        try:
            array = (
                torch.from_numpy(np.load(path, allow_pickle=False))
                if path.suffix == ".npy"
                else torch.load(path, weights_only=True, map_location="cpu")
            )
            array = array.float()
        except Exception as error:
            raise InputError(f"{path} must be a readable array, got {error}") from error
        first = arrays[0] if arrays else array
        if array.dim() != 3 or array.shape != first.shape or not bool(array.isfinite().all()):
            raise InputError(
                f"{path} must hold finite values [h, w, C] like the other files, "
                f"got {list(array.shape)}"
            )
        arrays.append(array)
    values = torch.stack(arrays)
    step = (scene.rgb.shape[1] / values.shape[1], scene.rgb.shape[2] / values.shape[2])
    return FeatureMap(values, (0.5 * step[0], 0.5 * step[1]), step)
