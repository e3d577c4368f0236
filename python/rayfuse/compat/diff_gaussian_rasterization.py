"""The call of diff-gaussian-rasterization, the rasteriser of 3D Gaussian Splatting, on rayfuse.

Written from what it is called with and from the paper (Kerbl et al., 2023; docs/compat.md).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..lookups.intersect_tiles import intersect_tiles
from ..ops.composite_tiles import composite_tiles
from ..ops.project_gaussians import project_gaussians
from ..ops.spherical_harmonics import spherical_harmonics

__all__ = ["GaussianRasterizationSettings", "GaussianRasterizer", "install", "uninstall"]

_TILE = 16
_NEAR = 0.2
# standard deviations after which a splat ends
_EXTENT = 3.0
# the least discriminant of eigenvalues, and the least compensation
_LEAST_DISCRIMINANT = 0.1
_LEAST_COMPENSATION = 0.005


class GaussianRasterizationSettings(NamedTuple):
    """A camera. Matrices multiply rows from the right: they are the transposes of the usual ones.

    With `antialiasing`, False or True, the call returns inverse depths as well, as it does from
    that setting's release on.
    """

    image_height: int
    image_width: int
    tanfovx: float
    tanfovy: float
    bg: Tensor  # [D]
    scale_modifier: float
    viewmatrix: Tensor  # [4, 4], from the world to the camera
    projmatrix: Tensor  # [4, 4], from the world to clip space
    sh_degree: int
    campos: Tensor  # [3]
    prefiltered: bool = False
    debug: bool = False
    antialiasing: bool | None = None


class GaussianRasterizer(torch.nn.Module):
    """An image of Gaussians, from one camera.

    Example:
        >>> import torch
        >>> from rayfuse.compat import diff_gaussian_rasterization as dgr
        >>> none, view = torch.zeros(3), torch.eye(4)
        >>> clip = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, -0.01, 0]])
        >>> settings = dgr.GaussianRasterizationSettings(
        ...     16, 16, 1.0, 1.0, none, 1.0, view, clip, 0, none
        ... )
        >>> image, radii = dgr.GaussianRasterizer(settings)(
        ...     torch.tensor([[0.0, 0, 2]]), torch.zeros(1, 3), torch.ones(1, 1),
        ...     colors_precomp=torch.ones(1, 3), scales=torch.full((1, 3), 0.5),
        ...     rotations=torch.tensor([[1.0, 0, 0, 0]]),
        ... )
        >>> image.shape, radii
        (torch.Size([3, 16, 16]), tensor([7], dtype=torch.int32))
    """

    def __init__(self, raster_settings: GaussianRasterizationSettings) -> None:
        super().__init__()
        self.raster_settings = raster_settings

    @torch.no_grad()
    def markVisible(self, positions: Tensor) -> Tensor:
        """Which of the positions [N, 3] are far enough before the camera: bool [N]."""
        view = self.raster_settings.viewmatrix
        return positions @ view[:3, 2] + view[3, 2] > _NEAR

    def forward(
        self,
        means3D: Tensor,
        means2D: Tensor,
        opacities: Tensor,
        shs: Tensor | None = None,
        colors_precomp: Tensor | None = None,
        scales: Tensor | None = None,
        rotations: Tensor | None = None,
        cov3D_precomp: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Colours [D, H, W], radii [N] int32 in pixels, 0 of what is not seen; see the settings.

        Args:
            means3D: [N, 3] centres.
            means2D: [N, 2] or [N, 3] of any values: its gradient is that of the centres in the
                image, where the image is 2 wide and 2 high.
            opacities: [N, 1].
            shs: [N, K, 3] coefficients of harmonics; or
            colors_precomp: [N, D] colours.
            scales, rotations: [N, 3] standard deviations and [N, 4] quaternions (w, x, y, z); or
            cov3D_precomp: [N, 6] upper triangles of covariances.
        """
        s = self.raster_settings
        if (shs is None) == (colors_precomp is None):
            raise ValueError("GaussianRasterizer: give either shs or colors_precomp")
        if (scales is None or rotations is None) == (cov3D_precomp is None):
            raise ValueError("GaussianRasterizer: give scales and rotations, or cov3D_precomp")
        size = means3D.new_tensor([s.image_width, s.image_height])
        splats = project_gaussians(
            means3D,
            s.viewmatrix.mT[None],
            self._intrinsics(size)[None],
            quats=rotations,
            scales=None if scales is None else scales * s.scale_modifier,
            covars=cov3D_precomp,
            image_width=s.image_width,
            image_height=s.image_height,
            near_plane=_NEAR,
            compensate=bool(s.antialiasing),
        )
        conics, depths, opacities = splats.conics[0], splats.depths[0], opacities[:, 0]
        seen = (splats.radii[0] > 0).all(-1)
        if s.antialiasing:
            opacities = opacities * splats.compensations[0].clamp(min=_LEAST_COMPENSATION)
        if colors_precomp is None:
            harmonics = spherical_harmonics(means3D - s.campos, shs, masks=seen, degree=s.sh_degree)
            colors_precomp = (harmonics + 0.5).clamp(min=0)
        colors, background = colors_precomp, s.bg
        if s.antialiasing is not None:
            inverse = 1 / torch.where(seen, depths, 1)
            colors = torch.cat([colors, inverse[:, None]], -1)
            background = torch.cat([background, background.new_zeros(1)])

        radii = _radii(conics, seen)
        # pixels are points at whole numbers
        means2d = splats.means2d[0] - 0.5
        lists = intersect_tiles(
            # tiles are found in whole pixels
            means2d.detach().floor()[None],
            radii[None, :, None].expand(1, -1, 2),
            depths[None],
            *(_TILE, -(-s.image_width // _TILE), -(-s.image_height // _TILE)),
        )
        moved = (means2D - means2D.detach())[:, :2] * (size / 2)
        image = composite_tiles(
            *((means2d + moved)[None], conics[None], colors[None], opacities[None]),
            *(lists.tile_offsets, lists.flatten_ids),
            background=background,
            image_width=s.image_width,
            image_height=s.image_height,
            tile_size=_TILE,
            preset="inria",
        )
        image = image.colors[0].permute(2, 0, 1)
        if s.antialiasing is None:
            return image, radii
        return image[:-1], radii, image[-1:]

    def _intrinsics(self, size: Tensor) -> Tensor:
        """[3, 3] in pixels; the centre may be anywhere, as the projection has it."""
        s = self.raster_settings
        projection = torch.linalg.solve(s.viewmatrix, s.projmatrix).to(size)
        K = torch.diag(size.new_tensor([0.5 / s.tanfovx, 0.5 / s.tanfovy, 1.0]))
        K[:2, :2] *= size[:, None]
        K[:2, 2] = size / 2 * (1 + projection[2, :2])
        return K


@torch.no_grad()
def _radii(conics: Tensor, seen: Tensor) -> Tensor:
    """[N] int32: of circles around three standard deviations along the longer axis."""
    a, b, c = conics.unbind(-1)
    determinant = a * c - b * b  # of the inverse
    middle = 0.5 * (a + c) / determinant
    root = (middle * middle - 1 / determinant).clamp(min=_LEAST_DISCRIMINANT).sqrt()
    radii = (_EXTENT * (middle + root).sqrt()).ceil()
    return torch.where(seen, radii, 0).int()


_NAME = "diff_gaussian_rasterization"
# what was imported before install()
_hidden: dict[str, ModuleType] = {}


def install() -> None:
    """Let `import diff_gaussian_rasterization` mean this module, be it installed or not.

    What has imported it before keeps what it has.
    """
    ours = sys.modules[__name__]
    if sys.modules.get(_NAME) is not ours:
        _hidden.update({_NAME: sys.modules[_NAME]} if _NAME in sys.modules else {})
        sys.modules[_NAME] = ours


def uninstall() -> None:
    """Put back what `install` replaced."""
    if sys.modules.get(_NAME) is sys.modules[__name__]:
        del sys.modules[_NAME]
        sys.modules.update(_hidden)
        _hidden.clear()
