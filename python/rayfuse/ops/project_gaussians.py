from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..domain import nonnegative, unit
from ..op import Op, op
from .composite_tiles import LEAST_ALPHA

__all__ = ["ProjectedGaussians", "project_gaussians"]

# standard deviations after which a splat ends
_EXTENT = 3.33
# what the reference sees in place of a culled Gaussian and of its camera
_HARMLESS: dict[str, Any] = dict(
    means=[0.0, 0.0, 1.0],
    quats=[1.0, 0.0, 0.0, 0.0],
    scales=[1.0] * 3,
    covars=[1.0, 0.0, 0.0, 1.0, 0.0, 1.0],
    viewmats=torch.eye(4).tolist(),
    Ks=torch.eye(3).tolist(),
)


class ProjectedGaussians(NamedTuple):
    """What `project_gaussians` returns."""

    means2d: Tensor  # [..., C, N, 2]
    depths: Tensor  # [..., C, N]
    conics: Tensor  # [..., C, N, 3]
    radii: Tensor  # [..., C, N, 2]
    compensations: Tensor  # [..., C, N]


class ProjectionOp(Op):
    """An op on Gaussians whose shapes are given in one of two ways."""

    def check(self, args: Sequence[Any]) -> None:
        super().check(args)
        named = dict(zip(self.domain, args, strict=True))
        for name in ("image_width", "image_height"):
            if named[name] < 1:
                self._fail(ValueError, name, "be >= 1", named[name])
        given = [name for name in ("quats", "scales", "covars") if named[name] is not None]
        if given not in (["quats", "scales"], ["covars"]):
            rule = "be given, or quats and scales"
            self._fail(ValueError, "covars", rule, " and ".join(given) or "neither")

    def public(self) -> Callable:
        call = super().public()

        @functools.wraps(call)
        def project_gaussians(*args: Tensor, **named: Any) -> ProjectedGaussians:
            return ProjectedGaussians(*call(*args, **named))

        return project_gaussians

    def sample(
        self,
        leading: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **sizes: int,
    ) -> list[Tensor]:
        """Random inputs before cameras whose images are about 40 x 30 pixels: some Gaussians lie
        behind them, some outside of the images, some where the Jacobian is clamped."""
        values = super().sample(leading, torch.float64, seed, **sizes)
        named = dict(zip(self.inputs, values, strict=True))
        x, y, z = named["means"].unbind(-1)
        z = torch.where(z < -0.8, z, 2.8 + 0.8 * z)
        named["means"] = torch.stack([2.2 * x, 1.7 * y, z], -1)
        named["viewmats"] = 0.1 * named["viewmats"] + torch.eye(4, dtype=torch.float64)
        K = torch.tensor([[40, 0, 20], [0, 42, 15], [0, 0, 1]], dtype=torch.float64)
        named["Ks"] = K * (1 + 0.1 * named["Ks"])
        named["quats"] += named["quats"].sign()
        named["scales"] = 0.15 * torch.exp(1.5 * named["scales"][..., :1] + 0.3 * named["scales"])
        m = named["covars"].new_zeros(*named["covars"].shape[:-1], 3, 3)
        m[..., [0, 1, 2], [0, 1, 2]] = 1 + 0.3 * named["covars"][..., :3]
        m[..., [1, 2, 2], [0, 0, 1]] = 0.3 * named["covars"][..., 3:]
        m *= 0.15 * torch.exp(1.5 * named["covars"][..., :1, None])
        named["covars"] = (m @ m.mT).flatten(-2)[..., [0, 1, 2, 4, 5, 8]]
        return [x.to(dtype) for x in named.values()]


@op(
    "means[..., N, 3] viewmats[..., C, 4, 4] Ks[..., C, 3, 3] quats?[..., N, 4] scales?[..., N, 3]"
    " covars?[..., N, 6] opacities?[..., N] -> means2d[..., C, N, 2] depths[..., C, N]"
    " conics[..., C, N, 3] radii[..., C, N, 2] compensations[..., C, N]",
    domain=dict(opacities=unit, eps2d=nonnegative, radius_clip=nonnegative),
    constant=("Ks", "opacities"),
    base=ProjectionOp,
)
def project_gaussians(
    means: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    *,
    quats: Tensor | None = None,
    scales: Tensor | None = None,
    covars: Tensor | None = None,
    opacities: Tensor | None = None,
    image_width: int,
    image_height: int,
    eps2d: float = 0.3,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    compensate: bool = False,
    camera_model: Literal["pinhole", "ortho"] = "pinhole",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gaussians in space as splats in images: where cameras see them, how far away, how wide.

    With p = R m + t a mean in the camera's frame and J the Jacobian of its projection, the image of
    a Gaussian has the covariance V = J R Sigma R^T J^T + eps2d I; its inverse is the conic. J of a
    pinhole camera is taken where p.x / p.z is at most 15 % of the image outside of it, as far off
    the linearisation is of no use. Gaussians that are not seen are culled: all their outputs are 0,
    and nothing has a gradient from them (docs/splats.md).

    Args:
        means: [..., N, 3] centres of the Gaussians.
        viewmats: [..., C, 4, 4] from the world to the frame of each camera, which looks along z.
        Ks: [..., C, 3, 3] intrinsics in pixels: fx, fy, cx and cy are read.

    Keyword Args:
        quats: [..., N, 4] rotations (w, x, y, z), of any length but 0.
        scales: [..., N, 3] standard deviations along the axes of the rotation.
        covars: [..., N, 6] in place of both the upper triangle of the covariances.
        opacities: [..., N] from 0 to 1; None for radii of opaque Gaussians. Faint ones end where
            alpha is 1/255; those that have no such place are culled.
        image_width, image_height: in pixels.
        eps2d: what is added to both variances of V, in pixels^2.
        near_plane, far_plane: the depths between which Gaussians are seen.
        radius_clip: Gaussians with no larger radius are culled.
        compensate: whether `opacities` will be multiplied by the compensations.
        camera_model: `"pinhole"` or `"ortho"`.

    Returns:
        ProjectedGaussians(means2d [..., C, N, 2] in pixels, depths [..., C, N] along z, conics
        [..., C, N, 3] = (a, b, c) of [[a, b], [b, c]], radii [..., C, N, 2] along x and y, whole
        numbers, 0 of what is culled, compensations [..., C, N] = sqrt(det(V - eps2d I) / det V),
        which keeps the sum of a small splat's alphas); float32 for half precision inputs.
        Differentiable in means, quats, scales, covars and viewmats, twice through the reference;
        radii have no gradient.

    Raises:
        ValueError: for shapes or devices that do not match, or unless either covars or both quats
            and scales are given.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ.

    Source:
        Zwicker et al., EWA Splatting (2002); Kerbl et al., 3D Gaussian Splatting (2023), eq. 5;
        gsplat 1.5.3, `fully_fused_projection`.

    Example:
        >>> import torch, rayfuse
        >>> K = torch.tensor([[[10.0, 0.0, 8.0], [0.0, 10.0, 8.0], [0.0, 0.0, 1.0]]])
        >>> splats = rayfuse.project_gaussians(
        ...     torch.tensor([[0.0, 0.0, 2.0]]), torch.eye(4)[None], K,
        ...     quats=torch.tensor([[1.0, 0.0, 0.0, 0.0]]), scales=torch.full((1, 3), 0.4),
        ...     image_width=16, image_height=16,
        ... )
        >>> splats.means2d, splats.radii
        (tensor([[[8., 8.]]]), tensor([[[7., 7.]]]))
    """
    ortho = camera_model == "ortho"

    def project(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        sigma = _covariance(given)
        R, t = given["viewmats"][..., :3, :3], given["viewmats"][..., :3, 3]
        p = _product(R, given["means"][..., None])[..., 0] + t
        K = given["Ks"]
        f, center = K[..., [0, 1], [0, 1]], K[..., [0, 1], [2, 2]]
        x, z = p[..., :2], p[..., 2:]
        if ortho:
            scale, slope = f.expand_as(x), torch.zeros_like(x)
            means2d = f * x + center
        else:
            size = f.new_tensor([image_width, image_height])
            margin = 0.15 * size / f
            least, most = -center / f - margin, (size - center) / f + margin
            scale = f / z
            slope = -scale * torch.minimum(torch.maximum(x / z, least), most)
            means2d = scale * x + center
        J = torch.cat([torch.diag_embed(scale), slope[..., None]], -1)
        JR = _product(J, R)
        V = _product(_product(JR, sigma), JR.mT)
        a, b, c = V[..., 0, 0], V[..., 0, 1], V[..., 1, 1]
        before = a * c - b * b
        a, c = a + eps2d, c + eps2d
        det = a * c - b * b
        conics = torch.stack([c, -b, a], -1) / det[..., None]
        ratio = before / det
        compensations = torch.where(ratio > 0, torch.where(ratio > 0, ratio, 1).sqrt(), 0)
        return means2d, p[..., 2], conics, compensations, torch.stack([a, c], -1), det

    # of each pair of a camera and a Gaussian
    pairs = {"viewmats": viewmats.unsqueeze(-3), "Ks": Ks.unsqueeze(-3)}
    of_gaussians = dict(means=means, quats=quats, scales=scales, covars=covars)
    pairs |= {name: x.unsqueeze(-3) for name, x in of_gaussians.items() if x is not None}
    with torch.no_grad():
        means2d, depths, conics, compensations, variances, det = project(pairs)
        extent = torch.full_like(depths, _EXTENT)
        visible = (depths >= near_plane) & (depths <= far_plane) & (det > 0)
        if opacities is not None:
            opacity = opacities.unsqueeze(-2) * (compensations if compensate else 1)
            extent = (2 * (opacity / LEAST_ALPHA).log()).sqrt().clamp(max=_EXTENT)
            visible = visible & (opacity >= LEAST_ALPHA) & opacity.isfinite()
        radii = (extent[..., None] * variances.sqrt()).ceil()
        size = radii.new_tensor([image_width, image_height])
        visible = visible & (radii > radius_clip).any(-1)
        visible = visible & (means2d + radii > 0).all(-1) & (means2d - radii < size).all(-1)
        for x in (means2d, conics, radii):
            visible = visible & x.isfinite().all(-1)
        if quats is not None:
            # an infinite norm would pass for no rotation
            visible = visible & quats.square().sum(-1).isfinite().unsqueeze(-2)
        radii = torch.where(visible[..., None], radii, 0)

    def of_visible(name: str, x: Tensor) -> Tensor:
        """What is culled must leave no NaN behind, in gradients neither."""
        instead = x.new_tensor(_HARMLESS[name])
        return torch.where(visible.view(*visible.shape, *[1] * instead.dim()), x, instead)

    pairs = {name: of_visible(name, x) for name, x in pairs.items()}
    means2d, depths, conics, compensations, _, _ = project(pairs)
    seen = visible[..., None]
    return (
        torch.where(seen, means2d, 0),
        torch.where(visible, depths, 0),
        torch.where(seen, conics, 0),
        radii,
        torch.where(visible, compensations, 0),
    )


def _covariance(given: dict[str, Tensor]) -> Tensor:
    """[..., 3, 3]"""
    if "covars" in given:
        return given["covars"][..., [0, 1, 2, 1, 3, 4, 2, 4, 5]].unflatten(-1, (3, 3))
    quats = given["quats"]
    w, x, y, z = (quats / quats.square().sum(-1, keepdim=True).sqrt()).unbind(-1)
    rotation = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    m = torch.stack(rotation, -1).unflatten(-1, (3, 3)) * given["scales"][..., None, :]
    return _product(m, m.mT)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y, which autocast leaves as precise as it is."""
    return (x[..., None] * y[..., None, :, :]).sum(-2)
