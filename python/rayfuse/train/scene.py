"""Posed photographs: the embedded Motorcycle pair, or any scene in transforms.json form."""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from rayfuse.train import InputError, InputWarning
from rayfuse.train.space import Contraction, Frustum, Space

HOLD_OUT_EVERY = 8  # of the views of a transforms.json scene
HOLD_OUT_SHARE = 0.1  # of the pixels of the Motorcycle pair
CAMERA_MODELS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE")
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")


@dataclass
class Rays:
    """A batch of rays in the scene's own frame.

    origins, directions: [R, 3], directions of unit length; near, far: [R, 1] distances.
    """

    origins: Tensor
    directions: Tensor
    near: Tensor
    far: Tensor

    def __getitem__(self, index: slice) -> Rays:
        return Rays(self.origins[index], self.directions[index], self.near[index], self.far[index])


@dataclass
class Scene:
    """Photographs with their cameras and what is held out of training.

    Held-out views or pixels give no colour, feature or depth supervision, and nothing is fitted
    to them. Only the scene's frame (centre and scale) is computed from all camera poses.

    Args:
        rgb: [N, H, W, 3] in [0, 1], multiplied by alpha.
        alpha: [N, H, W] opacity of the photographs, or None where they are opaque.
        poses: [N, 3, 4] camera to scene; cameras look down -z with y up.
        plane: [K, H, W, 2] (x, y) of every pixel's ray at depth 1, lens distortion undone.
        camera: [N] which of the K cameras took a photograph.
        near, far: bounds along the optical axis (Frustum) or along the ray (Contraction).
        held_out: [N, H, W] bool for held-out pixels, [N] bool for held-out views.
        depth: [N, H, W] distance along the ray, NaN where unknown or held out; or None.
    """

    name: str
    names: list[str]
    rgb: Tensor
    alpha: Tensor | None
    poses: Tensor
    plane: Tensor
    camera: Tensor
    space: Space
    near: float
    far: float
    held_out: Tensor
    depth: Tensor | None = None

    def __post_init__(self) -> None:
        self.pixels = self.rgb.shape[1] * self.rgb.shape[2]
        self._pool = (~self.held_out.flatten()).nonzero().flatten()

    @property
    def split(self) -> Literal["pixels", "views"]:
        return "pixels" if self.held_out.dim() == 3 else "views"

    @property
    def test_views(self) -> list[int]:
        """Indices of the photographs that evaluation renders."""
        return self.held_out.reshape(len(self.names), -1).any(dim=1).nonzero().flatten().tolist()

    @property
    def train_views(self) -> list[int]:
        """Indices of the photographs with at least one training pixel."""
        keep = ~self.held_out.reshape(len(self.names), -1)
        return keep.any(dim=1).nonzero().flatten().tolist()

    @property
    def fingerprint(self) -> list[str | int]:
        """What a checkpoint remembers of the scene that it was trained on."""
        return [self.name, *self.rgb.shape[:3]]

    def check_fingerprint(self, remembered: list[str | int]) -> None:
        """Raises InputError unless a checkpoint remembers this scene."""
        if remembered != self.fingerprint:
            raise InputError(
                f"checkpoint must be of the scene {self.fingerprint}, got one of {remembered}"
            )

    @property
    def about(self) -> str:
        """One line for the terminal, in rich's markup."""
        n, h, w = self.rgb.shape[:3]
        share = (
            f"{self.held_out.float().mean().item():.0%} of the pixels held out"
            if self.split == "pixels"
            else f"{len(self.test_views)} held out"
        )
        return f"[bold]{self.name}[/bold]: {n} photographs of {w} x {h}, {share}"

    def to(self, device: torch.device) -> Scene:
        for name in ("rgb", "alpha", "poses", "plane", "camera", "held_out", "depth", "_pool"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.to(device))
        return self

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """count training pixels, as flat indices [count] into [N, H, W]."""
        device = self._pool.device
        pick = torch.randint(
            len(self._pool), (count,), generator=generator, device=generator.device
        ).to(device)
        if self.split == "pixels":
            return self._pool[pick]
        offset = torch.randint(
            self.pixels, (count,), generator=generator, device=generator.device
        ).to(device)
        return self._pool[pick] * self.pixels + offset

    def rays(self, index: Tensor) -> Rays:
        """The rays through the centres of pixels index[R], flat into [N, H, W]."""
        view, pixel = index.div(self.pixels, rounding_mode="floor"), index % self.pixels
        plane = self.plane.view(-1, 2)[self.camera[view] * self.pixels + pixel]
        x, y = plane.unbind(-1)
        local = torch.stack([x, -y, -torch.ones_like(x)], dim=-1)
        pose = self.poses[view]
        directions = (pose[:, :, :3] @ local[:, :, None])[..., 0]
        norm = directions.norm(dim=-1, keepdim=True)
        reach = norm if isinstance(self.space, Frustum) else torch.ones_like(norm)
        return Rays(pose[:, :, 3], directions / norm, self.near * reach, self.far * reach)

    def photographs(self) -> Tensor:
        """[N, H, W, 3] the photographs with held-out pixels filled from their neighbours."""
        if self.split == "views":
            return self.rgb
        return fill_from_neighbours(self.rgb, self.held_out)


def fill_from_neighbours(rgb: Tensor, missing: Tensor) -> Tensor:
    """rgb[N, H, W, 3] with pixels missing[N, H, W] replaced by a mean of known neighbours.

    The mean of the four side neighbours; a pixel without a known one waits for the next sweep.
    """
    kernel = rgb.new_tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    known = (~missing).to(rgb.dtype)[:, None]
    image = rgb.permute(0, 3, 1, 2) * known
    while not bool(known.all()):
        total = F.conv2d(image, kernel.expand(3, 1, 3, 3), padding=1, groups=3)
        weight = F.conv2d(known, kernel.expand(1, 1, 3, 3), padding=1)
        fill = (known == 0) & (weight > 0)
        image = torch.where(fill, total / weight.clamp_min(1.0), image)
        known = known + fill.to(known.dtype)
    return image.permute(0, 2, 3, 1)


def box_filter(image: Tensor, n: int) -> Tensor:
    """image[..., H, W, C] averaged over n x n blocks, the remainder cropped."""
    if n == 1:
        return image
    h, w = image.shape[-3] // n, image.shape[-2] // n
    blocks = image[..., : h * n, : w * n, :].unflatten(-3, (h, n)).unflatten(-2, (w, n))
    return blocks.mean(dim=(-4, -2))


def load_scene(source: Path | None, downscale: int = 0) -> Scene:
    """The embedded pair for None, else the transforms.json scene at source (folder or file).

    Args:
        downscale: side of the averaged pixel blocks; 0 takes the scene's own default (2 for the
            embedded pair, 1 for others).
    """
    if downscale < 0:
        raise InputError(f"downscale must be at least 1, got {downscale}")
    return load_motorcycle(downscale or 2) if source is None else _load(source, downscale or 1)


def load_motorcycle(downscale: int = 2, crop: int | None = None) -> Scene:
    """The Motorcycle stereo pair of Middlebury 2014 that scikit-image installs.

    Both photographs are used; a fixed random tenth of all pixels is held out. Ground-truth
    disparity of the left photograph gives depth where it is known and not held out.

    Args:
        crop: keeps a central square of this side after downscaling (for quick tests).
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise InputError("scikit-image must be installed for the embedded scene, got no package")
    folder = Path(spec.origin).parent / "data"
    rgb = torch.stack(
        [_read_image(folder / f"motorcycle_{side}.png")[..., :3] for side in ("left", "right")]
    )
    rgb = box_filter(rgb, downscale)
    with np.load(folder / "motorcycle_disp.npz") as data:
        disparity = torch.from_numpy(data["arr_0"].astype(np.float32))
    h, w = rgb.shape[1:3]

    # calibration of the photographs as installed: scikit-image, data.stereo_motorcycle
    focal, cx, cy, shift, baseline = 994.978, 311.193, 254.877, 31.086, 0.193001
    depth = focal * baseline / (_block_disparity(disparity, downscale) + shift)
    focal, cx, cy, shift = (value / downscale for value in (focal, cx, cy, shift))
    x = torch.arange(w) + 0.5
    y = torch.arange(h) + 0.5
    plane = torch.stack(
        [
            torch.stack(torch.meshgrid((x - c) / focal, (y - cy) / focal, indexing="xy"), dim=-1)
            for c in (cx, cx + shift)
        ]
    )
    poses = torch.eye(4)[:3].repeat(2, 1, 1)
    poses[1, 0, 3] = baseline
    if crop is not None:
        top, left = (h - crop) // 2, (w - crop) // 2
        rows, columns = slice(top, top + crop), slice(left, left + crop)
        rgb, plane = rgb[:, rows, columns], plane[:, rows, columns]
        depth = depth[rows, columns]

    held_out = torch.rand(rgb.shape[:3], generator=torch.Generator().manual_seed(0))
    held_out = held_out < HOLD_OUT_SHARE
    depth = torch.where(held_out[0], torch.nan, depth)
    known = depth[depth.isfinite()]
    near, far = 0.9 * known.min().item(), 1.1 * known.max().item()
    # the right camera's rays shift by baseline / depth in the left camera's plane
    lower = torch.minimum(
        plane[0].amin((0, 1)), plane[1].amin((0, 1)) + plane.new_tensor([baseline / far, 0])
    )
    upper = torch.maximum(
        plane[0].amax((0, 1)), plane[1].amax((0, 1)) + plane.new_tensor([baseline / near, 0])
    )
    space = Frustum(
        [lower[0].item(), -upper[1].item(), 1 / far], [upper[0].item(), -lower[1].item(), 1 / near]
    )
    along_ray = (plane[0].square().sum(-1) + 1).sqrt()
    return Scene(
        name="motorcycle",
        names=["left", "right"],
        rgb=rgb.contiguous(),
        alpha=None,
        poses=poses,
        plane=plane.contiguous(),
        camera=torch.arange(2),
        space=space,
        near=near,
        far=far,
        held_out=held_out,
        depth=torch.stack([depth * along_ray, torch.full_like(depth, torch.nan)]),
    )


def _block_disparity(disparity: Tensor, n: int) -> Tensor:
    """Mean disparity of n x n blocks; NaN where the block has a hole or an edge (over 1 px)."""
    h, w = disparity.shape[0] // n, disparity.shape[1] // n
    blocks = disparity[: h * n, : w * n].reshape(h, n, w, n)
    spread = blocks.amax((1, 3)) - blocks.amin((1, 3))
    return torch.where(spread < 1.0, blocks.mean((1, 3)), torch.nan)


def _load(source: Path, downscale: int) -> Scene:
    frames, held_out = _read_frames(source)
    sizes: dict[tuple[int, int], Path] = {}
    photos, cameras, poses = [], [], []
    for path, frame in frames:
        photo = _read_image(path)
        h, w = photo.shape[:2]
        declared = (frame.get("w", w), frame.get("h", h))
        if (w, h) != declared:
            raise InputError(
                f"image {path} must be {declared[0]:g} x {declared[1]:g} as its transforms.json "
                f"says, got {w} x {h}"
            )
        sizes.setdefault((w, h), path)
        if len(sizes) > 1:
            (one, two) = sizes
            raise InputError(
                f"image {path} must be {one[0]} x {one[1]} as {sizes[one].name} is, "
                f"got {two[0]} x {two[1]}"
            )
        if downscale > min(w, h):
            raise InputError(f"downscale must be at most {min(w, h)}, got {downscale}")
        photos.append(box_filter(photo, downscale))
        cameras.append(_intrinsics(path, frame, w, h))
        poses.append(_pose(path, frame))

    images = torch.stack(photos)
    alpha = images[..., 3].contiguous()
    unique, camera = torch.tensor(cameras, dtype=torch.float64).unique(dim=0, return_inverse=True)
    h, w = images.shape[1:3]
    return Scene(
        name=(source if source.is_dir() else source.parent).resolve().name,
        names=_unique_names([path for path, _ in frames]),
        rgb=images[..., :3].contiguous(),
        alpha=None if bool((alpha == 1).all()) else alpha,
        poses=_centre(torch.stack(poses)),
        plane=torch.stack([_pixel_plane(row, w, h, downscale) for row in unique]),
        camera=camera,
        space=Contraction(),
        near=0.2,
        far=100.0,
        held_out=torch.tensor(held_out),
    )


def _read_frames(source: Path) -> tuple[list[tuple[Path, dict[str, Any]]], list[bool]]:
    """Image path and merged settings of each frame, and which frames are held out."""
    if not source.exists():
        raise InputError(f"scene must be an existing folder or transforms.json, got {source}")
    splits = [source] if source.is_file() else [source / "transforms.json"]
    if not splits[0].is_file():
        splits = [source / f"transforms_{split}.json" for split in ("train", "test")]
        if not splits[0].is_file():
            raise InputError(
                f"scene must hold transforms.json or transforms_train.json, got {source}"
            )
    frames: list[tuple[Path, dict[str, Any]]] = []
    held_out: list[bool] = []
    apart = len(splits) == 2 and splits[1].is_file()
    for number, path in enumerate(splits[: 1 + apart]):
        listed = _existing(path, _parse(path))
        if number == 1:
            listed = listed[::HOLD_OUT_EVERY]
        frames += listed
        held_out += [number == 1 if apart else i % HOLD_OUT_EVERY == 0 for i in range(len(listed))]
    if all(held_out):
        raise InputError(f"{splits[0]} must list at least 2 frames, got {len(frames)}")
    return frames, held_out


def _parse(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} must be a readable JSON file, got {error}") from error
    frames = text.get("frames") if isinstance(text, dict) else None
    if not isinstance(frames, list) or not frames:
        raise InputError(f"{path} must list its photographs under 'frames', got none")
    shared = {key: value for key, value in text.items() if key != "frames"}
    result = []
    for number, frame in enumerate(frames):
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise InputError(f"{path} must give frame {number} a 'file_path', got none")
        result.append((path.parent / frame["file_path"], {**shared, **frame}))
    return result


def _existing(
    path: Path, frames: list[tuple[Path, dict[str, Any]]]
) -> list[tuple[Path, dict[str, Any]]]:
    """The frames whose photograph exists, extension completed.

    Published scenes list photographs that are not shipped (instant-ngp's fox: 17 of 67), so a
    minority is left out with a warning.
    """
    found = []
    missing = []
    for image, frame in frames:
        ends = ("", ".png", ".jpg", ".jpeg")
        candidates = [image.with_name(image.name + end) for end in ends]
        match = next((candidate for candidate in candidates if candidate.is_file()), None)
        if match is None:
            missing.append(image)
        else:
            found.append((match, frame))
    if 2 * len(missing) > len(frames):
        raise InputError(
            f"images of {path} must exist, got {len(missing)} of {len(frames)} missing, "
            f"the first {missing[0]}"
        )
    if missing:
        warnings.warn(
            f"{len(missing)} of the {len(frames)} images of {path} do not exist and are left out, "
            f"the first is {missing[0]}",
            InputWarning,
            stacklevel=2,
        )
    return found


def _read_image(path: Path) -> Tensor:
    """[H, W, 4] colour multiplied by alpha, and alpha."""
    try:
        with Image.open(path) as image:
            rgba = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255.0
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise InputError(f"image {path} must be readable, got {error}") from error
    rgba[..., :3] *= rgba[..., 3:]
    return torch.from_numpy(rgba)


def _number(path: Path, frame: dict[str, Any], key: str, default: float) -> float:
    value = frame.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{key} of {path.name} must be a finite number, got {value!r}")
    return float(value)


def _intrinsics(path: Path, frame: dict[str, Any], w: int, h: int) -> list[float]:
    """fx, fy, cx, cy, then the distortion terms, in pixels of the photograph as stored."""
    model = frame.get("camera_model", "OPENCV")
    if frame.get("is_fisheye"):
        model = "OPENCV_FISHEYE"
    if model not in CAMERA_MODELS:
        raise InputError(f"camera_model must be one of {', '.join(CAMERA_MODELS)}, got {model!r}")

    def focal(key: str, angle: str, size: int) -> float | None:
        if key in frame:
            return _number(path, frame, key, 0.0)
        if angle in frame:
            return 0.5 * size / math.tan(0.5 * _number(path, frame, angle, 0.0))
        return None

    fx = focal("fl_x", "camera_angle_x", w)
    fy = focal("fl_y", "camera_angle_y", h)
    fx, fy = fx or fy, fy or fx
    if fx is None or fy is None or fx <= 0 or fy <= 0:
        raise InputError(f"camera of {path.name} must give fl_x or camera_angle_x, got {fx!r}")
    centre = [_number(path, frame, "cx", w / 2), _number(path, frame, "cy", h / 2)]
    return [fx, fy, *centre, *(_number(path, frame, key, 0.0) for key in DISTORTION)]


def _pose(path: Path, frame: dict[str, Any]) -> Tensor:
    if "transform_matrix" not in frame:
        raise InputError(f"frame {path.name} must have a 'transform_matrix', got none")
    try:
        pose = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
    except (TypeError, ValueError):
        pose = torch.empty(0)
    if pose.shape not in ((4, 4), (3, 4)):
        raise InputError(f"pose of {path.name} must be 4 x 4 numbers, got {list(pose.shape)}")
    if not bool(pose.isfinite().all()):
        raise InputError(f"pose of {path.name} must be finite, got {pose.tolist()}")
    determinant = torch.linalg.det(pose[:3, :3]).item()
    if abs(determinant) < 1e-6:
        raise InputError(f"pose of {path.name} must be invertible, got determinant {determinant:g}")
    return pose[:3]


def _centre(poses: Tensor) -> Tensor:
    """Poses[N, 3, 4] recentred where the cameras look and scaled to a typical distance of 1.5."""
    origin = poses[:, :, 3]
    axis = -poses[:, :, 2] / poses[:, :, 2].norm(dim=-1, keepdim=True)
    across = torch.eye(3, dtype=poses.dtype) - axis[:, :, None] * axis[:, None, :]
    extent = (origin - origin.mean(0)).norm(dim=-1).mean()
    # parallel cameras meet nowhere: a weak pull towards the point ahead of their middle
    ahead = origin.mean(0) + axis.mean(0) * torch.where(extent > 0, 4 * extent, 1.0)
    pull = 1e-3 * len(poses) * torch.eye(3, dtype=poses.dtype)
    target = (across @ origin[:, :, None]).sum(0)[:, 0] + pull @ ahead
    centre = torch.linalg.solve(across.sum(0) + pull, target)
    distance = (origin - centre).norm(dim=-1).median().clamp_min(1e-9)
    centred = poses.clone()
    centred[:, :, 3] = (origin - centre) * (1.5 / distance)
    return centred.float()


def _pixel_plane(camera: Tensor, w: int, h: int, downscale: int) -> Tensor:
    """[H, W, 2] the point at depth 1 that each pixel centre sees; y points down."""
    fx, fy, cx, cy, k1, k2, k3, k4, p1, p2 = camera.tolist()
    x = (torch.arange(w, dtype=torch.float64) + 0.5) * downscale
    y = (torch.arange(h, dtype=torch.float64) + 0.5) * downscale
    seen = torch.stack(torch.meshgrid((x - cx) / fx, (y - cy) / fy, indexing="xy"), dim=-1)
    if not any((k1, k2, k3, k4, p1, p2)):
        return seen.float()
    point = seen.clone()
    for _ in range(20):
        x, y = point.unbind(-1)
        r2 = x * x + y * y
        radial = 1 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
        tangential = torch.stack(
            [2 * p1 * x * y + p2 * (r2 + 2 * x * x), p1 * (r2 + 2 * y * y) + 2 * p2 * x * y], dim=-1
        )
        point = (seen - tangential) / radial[..., None]
    return point.float()


def _unique_names(paths: list[Path]) -> list[str]:
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    return [f"{number:04d}_{stem}" for number, stem in enumerate(stems)]
