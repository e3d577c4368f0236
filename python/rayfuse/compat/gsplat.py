"""gsplat 1.5.3 on rayfuse: `install()` once, and it renders and trains on a CPU (docs/compat.md).

The functions below take gsplat's arguments, and need no gsplat.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..lookups.intersect_tiles import intersect_tiles
from ..lookups.tile_contributors import tile_contributors
from ..ops.composite_tiles import composite_tiles
from ..ops.project_gaussians import project_gaussians
from ..ops.spherical_harmonics import spherical_harmonics as harmonics
from ..ops.splat_covariances import splat_covariances
from . import swap_everywhere

__all__ = [
    "adam",
    "compute_relocation",
    "fully_fused_projection",
    "install",
    "isect_offset_encode",
    "isect_tiles",
    "quat_scale_to_covar_preci",
    "rasterize_to_indices_in_range",
    "rasterize_to_pixels",
    "spherical_harmonics",
    "uninstall",
]

# Functions are replaced where they live, and the kernel module `_C` that they look up is not: it
# holds halves of autograd Functions, to which gsplat gives padded channels and from which it wants
# what its kernels save; and where there is an nvcc, to import it is to start it.
_REPLACED = {
    "cuda._wrapper": (
        "adam",
        "fully_fused_projection",
        "isect_offset_encode",
        "isect_tiles",
        "quat_scale_to_covar_preci",
        "rasterize_to_indices_in_range",
        "rasterize_to_pixels",
        "spherical_harmonics",
    ),
    "relocation": ("compute_relocation",),
}
_CUDA_ONLY = (
    "fully_fused_projection_2dgs",
    "fully_fused_projection_with_ut",
    "rasterize_to_indices_in_range_2dgs",
    "rasterize_to_pixels_2dgs",
    "rasterize_to_pixels_eval3d",
)
# what stands in the place of what
_installed: dict[Callable, Callable] = {}


def install() -> list[str]:
    """Let the functions of the installed gsplat take tensors that are not on a CUDA device.

    Modules that imported a function by its name are served too. CUDA tensors still go to gsplat's
    kernels. A second call changes nothing.

    Returns:
        The names of what is replaced.

    Raises:
        ImportError: if gsplat cannot be imported.
    """
    if not _installed:
        try:
            modules = {name: importlib.import_module(f"gsplat.{name}") for name in _REPLACED}
            torch_impl = importlib.import_module("gsplat.cuda._torch_impl")
        except ImportError as error:
            raise ImportError(f"install: gsplat must be importable, got: {error}") from error
        wrapper = modules["cuda._wrapper"]
        pairs = [
            (getattr(modules[module], name), globals()[name])
            for module, names in _REPLACED.items()
            for name in names
        ]
        pairs += [(getattr(wrapper, name), functools.partial(_refuse, name)) for name in _CUDA_ONLY]
        pairs.append((wrapper.proj, _projection(torch_impl)))
        _installed.update({_unless_on_cuda(ours, theirs): theirs for theirs, ours in pairs})
        swap_everywhere({theirs: ours for ours, theirs in _installed.items()})
    return [function.__name__ for function in _installed]


def uninstall() -> None:
    """Put back all that `install` replaced."""
    swap_everywhere(_installed)
    _installed.clear()


def _unless_on_cuda(ours: Callable, theirs: Callable) -> Callable:
    @functools.wraps(theirs)
    def call(*args: Any, **named: Any) -> Any:
        given = (*args, *named.values())
        on_cuda = any(isinstance(x, Tensor) and x.is_cuda for x in given)
        return (theirs if on_cuda else ours)(*args, **named)

    return call


def _refuse(name: str, *args: Any, **named: Any) -> None:
    devices = [x.device.type for x in (*args, *named.values()) if isinstance(x, Tensor)]
    got = devices[0] if devices else "none"
    raise NotImplementedError(f"{name}: tensors must be on a CUDA device, got {got}")


def _projection(torch_impl: Any) -> Callable:
    """gsplat's `proj`, which it has in PyTorch as well."""
    models = {name: getattr(torch_impl, f"_{name}_proj") for name in ("persp", "ortho", "fisheye")}
    models["pinhole"] = models.pop("persp")

    def proj(
        means: Tensor,
        covars: Tensor,
        Ks: Tensor,
        width: int,
        height: int,
        camera_model: str = "pinhole",
    ) -> tuple[Tensor, Tensor]:
        return models[camera_model](means, covars, Ks, width, height)

    return proj


def spherical_harmonics(
    degrees_to_use: int, dirs: Tensor, coeffs: Tensor, masks: Tensor | None = None
) -> Tensor:
    """`spherical_harmonics`: colours [..., 3] of coefficients [..., K, 3] in directions [..., 3]; 0
    where masks [...] are False."""
    return harmonics(dirs, coeffs, masks=masks, degree=degrees_to_use)


def quat_scale_to_covar_preci(
    quats: Tensor,
    scales: Tensor,
    compute_covar: bool = True,
    compute_preci: bool = True,
    triu: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """`splat_covariances`, and their inverses, [..., 3, 3], or [..., 6] with `triu`."""
    covars, precis = (
        splat_covariances(quats, scales, inverse=inverse, triu=triu) if wanted else None
        for inverse, wanted in ((False, compute_covar), (True, compute_preci))
    )
    return covars, precis


def fully_fused_projection(
    means: Tensor,
    covars: Tensor | None,
    quats: Tensor | None,
    scales: Tensor | None,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    eps2d: float = 0.3,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    packed: bool = False,
    sparse_grad: bool = False,
    calc_compensations: bool = False,
    camera_model: str = "pinhole",
    opacities: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """`project_gaussians`, of all pairs of a camera and a Gaussian, or packed: of those seen.

    Returns:
        radii [..., C, N, 2] int32, means2d, depths, conics, and compensations or None: 0 of what is
        culled; or packed, with the indices [P] of the batch, the camera and the Gaussian before.
    """
    if camera_model not in ("pinhole", "ortho"):
        rule = "be pinhole or ortho where tensors are not on a CUDA device"
        raise NotImplementedError(
            f"fully_fused_projection: camera_model must {rule}, got {camera_model!r}"
        )
    if sparse_grad and (not packed or means.dim() > 2):
        got = f"packed={packed} and means of shape {[*means.shape]}"
        raise ValueError(f"fully_fused_projection: sparse_grad must be with packed, got {got}")
    shape: dict[str, Any] = dict(quats=quats, scales=scales)
    if covars is not None:
        shape = dict(covars=covars)
    project = functools.partial(
        project_gaussians,
        image_width=width,
        image_height=height,
        eps2d=eps2d,
        near_plane=near_plane,
        far_plane=far_plane,
        radius_clip=radius_clip,
        compensate=calc_compensations,
        camera_model=camera_model,
    )
    with torch.set_grad_enabled(torch.is_grad_enabled() and not sparse_grad):
        splats = project(means, viewmats, Ks, **shape, opacities=opacities)
    radii = splats.radii.int()
    values = [splats.means2d, splats.depths, splats.conics, splats.compensations]
    if not packed:
        return radii, *values[:3], values[3] if calc_compensations else None

    seen = (radii > 0).all(-1)
    pair = seen.flatten().nonzero()[:, 0]
    N, C = means.shape[-2], viewmats.shape[-3]
    camera, gaussian = pair // N % C, pair % N
    if sparse_grad:
        one_by_one = []
        for c in range(C):
            ids = gaussian[camera == c]
            rows = {name: F.embedding(ids, x, sparse=True) for name, x in shape.items()}
            splats = project(
                F.embedding(ids, means, sparse=True),
                *(viewmats[c : c + 1], Ks[c : c + 1]),
                **rows,
                opacities=None if opacities is None else opacities[ids],
            )
            one_by_one.append([splats.means2d, splats.depths, splats.conics, splats.compensations])
        values = [torch.cat([*x], 1)[0] for x in zip(*one_by_one, strict=True)]
    else:
        values = [x.flatten(0, seen.dim() - 1).index_select(0, pair) for x in values]
    return (
        *(pair // (N * C), camera, gaussian),
        radii.view(-1, 2)[pair],
        *values[:3],
        values[3] if calc_compensations else None,
    )


@torch.no_grad()
def isect_tiles(
    means2d: Tensor,
    radii: Tensor,
    depths: Tensor,
    tile_size: int,
    tile_width: int,
    tile_height: int,
    sort: bool = True,
    segmented: bool = False,
    packed: bool = False,
    n_images: int | None = None,
    image_ids: Tensor | None = None,
    gaussian_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`intersect_tiles`, with a key for each place in a list.

    Returns:
        tiles_per_gauss [..., N] or [P] int32, isect_ids [M] int64, flatten_ids [M] int32: lists one
        after the other, or splats one after the other without `sort`. A key has the image in the
        high bits, then the tile, then the 32 bits of the depth.
    """
    lists = intersect_tiles(
        *(means2d, radii, depths, tile_size, tile_width, tile_height),
        image_ids=image_ids if packed else None,
        images=n_images if packed else None,
    )
    ids = lists.flatten_ids
    most = torch.iinfo(torch.int32).max
    if max(len(ids), depths.numel()) > most:
        got = f"{len(ids)} of {depths.numel()}"
        raise ValueError(f"isect_tiles: intersections and splats must be {most} at most, got {got}")
    lengths = lists.tile_offsets.flatten().diff(append=ids.new_tensor([len(ids)]))
    keys = _tile_keys(len(lengths), tile_width * tile_height, ids.device)
    depth_bits = depths.flatten().float().view(torch.int32).long() & 0xFFFFFFFF
    isect_ids = keys.repeat_interleave(lengths, output_size=len(ids))
    isect_ids |= depth_bits.index_select(0, ids)
    ids = ids.int()
    if not sort:
        ids, by_splat = ids.sort(stable=True)
        isect_ids = isect_ids[by_splat]
    return lists.tiles_per_splat, isect_ids, ids


@torch.no_grad()
def isect_offset_encode(
    isect_ids: Tensor, n_images: int, tile_width: int, tile_height: int
) -> Tensor:
    """Where the list of each tile begins, [n_images, tile_height, tile_width] int32, in the sorted
    keys of `isect_tiles`."""
    tiles = tile_width * tile_height
    keys = _tile_keys(n_images * tiles, tiles, isect_ids.device)
    return torch.searchsorted(isect_ids, keys).int().view(n_images, tile_height, tile_width)


def _tile_keys(count: int, tiles: int, device: torch.device) -> Tensor:
    """The least key of each tile of images of so many tiles."""
    tile = torch.arange(count, device=device)
    return (tile // tiles << tiles.bit_length() | tile % tiles) << 32


def rasterize_to_pixels(
    means2d: Tensor,
    conics: Tensor,
    colors: Tensor,
    opacities: Tensor,
    image_width: int,
    image_height: int,
    tile_size: int,
    isect_offsets: Tensor,
    flatten_ids: Tensor,
    backgrounds: Tensor | None = None,
    masks: Tensor | None = None,
    packed: bool = False,
    absgrad: bool = False,
) -> tuple[Tensor, Tensor]:
    """`composite_tiles` of any number of channels.

    Returns:
        colours [..., H, W, D] and alphas [..., H, W, 1]. With `absgrad` the backward leaves the sum
        over pixels of |gradient of means2d| in `means2d.absgrad`.
    """
    absolute = torch.zeros_like(means2d, requires_grad=True) if absgrad else None
    if absolute is not None:
        absolute.register_hook(functools.partial(setattr, means2d, "absgrad"))
    image = composite_tiles(
        *(means2d, conics, colors, opacities, isect_offsets, flatten_ids),
        background=backgrounds,
        masks=masks,
        absgrad=absolute,
        image_width=image_width,
        image_height=image_height,
        tile_size=tile_size,
    )
    return image.colors, image.alpha[..., None]


@torch.no_grad()
def rasterize_to_indices_in_range(
    range_start: int,
    range_end: int,
    transmittances: Tensor,
    means2d: Tensor,
    conics: Tensor,
    opacities: Tensor,
    image_width: int,
    image_height: int,
    tile_size: int,
    isect_offsets: Tensor,
    flatten_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`tile_contributors` of a part of each list: from the tile_size^2 * range_start-th splat up to
    the tile_size^2 * range_end-th, with the transmittances [..., H, W] before them.

    Returns:
        of each pair of a pixel and a splat the Gaussian, the pixel row by row, and the image, [K].
    """
    begins = isect_offsets.flatten().long()
    lengths = begins.diff(append=begins.new_tensor([len(flatten_ids)]))
    place = torch.arange(len(flatten_ids), device=begins.device)
    place -= begins.repeat_interleave(lengths, output_size=len(flatten_ids))
    first, last = (tile_size**2 * i for i in (range_start, range_end))
    lengths = lengths.clamp(max=last) - lengths.clamp(max=first)
    found = tile_contributors(
        *(means2d, conics, opacities),
        (lengths.cumsum(0) - lengths).view_as(isect_offsets),
        flatten_ids[(place >= first) & (place < last)],
        transmittance=transmittances,
        image_width=image_width,
        image_height=image_height,
        tile_size=tile_size,
    )
    pixels, counts = image_width * image_height, found.counts.flatten().long()
    pixel = torch.arange(len(counts), device=counts.device)
    pixel = pixel.repeat_interleave(counts, output_size=len(found.ids))
    return found.ids % means2d.shape[-2], pixel % pixels, pixel // pixels


@torch.no_grad()
def compute_relocation(
    opacities: Tensor, scales: Tensor, ratios: Tensor, binoms: Tensor
) -> tuple[Tensor, Tensor]:
    """Opacities [N] and scales [N, 3] of Gaussians of which `ratios` [N] share a place, such that
    all together look like the one before (Kheradmand et al., 2024, eq. 9).

    binoms[n, k] = n over k, up to the greatest ratio.
    """
    n = ratios.clamp(1, len(binoms)).long()
    # the terms alternate, and reach 1 / (1 - opacity)
    o, k = opacities.double(), torch.arange(len(binoms), device=binoms.device)
    each = -torch.expm1(torch.log1p(-o) / n)
    over_ratio = binoms.double().cumsum(0)[n - 1]
    terms = over_ratio * (-1.0) ** k / (k + 1).sqrt() * each[:, None] ** (k + 1)
    shrink = o / terms.sum(-1)
    return each.to(opacities.dtype), (shrink[:, None] * scales).to(scales.dtype)


@torch.no_grad()
def adam(
    param: Tensor,
    param_grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    valid: Tensor | None,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
) -> None:
    """A step of Adam without bias correction, in place, of the rows that are valid [N]."""
    rows = slice(None) if valid is None else valid.bool()
    exp_avg[rows] = exp_avg[rows].lerp(param_grad[rows], 1 - b1)
    exp_avg_sq[rows] = exp_avg_sq[rows].lerp(param_grad[rows].square(), 1 - b2)
    param[rows] -= lr * exp_avg[rows] / (exp_avg_sq[rows].sqrt() + eps)
