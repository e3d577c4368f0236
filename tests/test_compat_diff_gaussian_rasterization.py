"""GaussianRasterizer against the published formulas, each pixel and each splat, in float64."""

import sys

import pytest
import torch

import rayfuse
from rayfuse.compat import diff_gaussian_rasterization as dgr

W, H, TILE = 40, 28, 16
TAN = 0.7, 0.5
NEAR, FAR = 0.01, 100.0


def settings(center=(0.0, 0.0), **changed):
    """A camera that looks along z from -3, turned a bit, the image's centre off by so much."""
    turn = torch.linalg.matrix_exp(
        torch.tensor([[0, -0.1, 0.2], [0.1, 0, -0.05], [-0.2, 0.05, 0]], dtype=torch.float64)
    )
    view = torch.eye(4, dtype=torch.float64)
    view[:3, :3], view[:3, 3] = turn, torch.tensor([0.1, 0.0, 3.0])
    clip = torch.zeros(4, 4, dtype=torch.float64)
    clip[0, 0], clip[1, 1] = 1 / TAN[0], 1 / TAN[1]
    clip[0, 2], clip[1, 2] = center
    clip[2, 2], clip[2, 3], clip[3, 2] = FAR / (FAR - NEAR), -FAR * NEAR / (FAR - NEAR), 1
    values = dict(
        image_height=H,
        image_width=W,
        tanfovx=TAN[0],
        tanfovy=TAN[1],
        bg=torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64),
        scale_modifier=1.0,
        viewmatrix=view.T,
        projmatrix=(clip @ view).T,
        sh_degree=2,
        campos=view.inverse()[:3, 3],
    )
    return dgr.GaussianRasterizationSettings(**{**values, **changed})


def gaussians(N=50, width=5, depth=7):
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    rotations = torch.nn.functional.normalize(uniform(N, 4) - 0.5, dim=-1)
    values = dict(
        means3D=(uniform(N, 3) - 0.5) * torch.tensor([width, 0.8 * width, depth]),
        means2D=torch.zeros(N, 3, dtype=torch.float64),
        opacities=uniform(N, 1),
        shs=uniform(N, 9, 3) - 0.5,
        scales=0.02 + 0.3 * uniform(N, 3),
        rotations=rotations,
    )
    # one that is next to nothing but for the blur, in front of all others
    values["means3D"][0] = torch.tensor([0.0, 0, -2])
    values["scales"][0], values["opacities"][0] = 1e-4, 0.95
    return {name: x.requires_grad_() for name, x in values.items()}


def published(s, means3D, means2D, opacities, shs, scales, rotations):
    """Image, radii, inverse depths; a loop over splats, front to back."""
    view, clip = s.viewmatrix.T, s.projmatrix.T
    h = torch.cat([means3D, torch.ones_like(means3D[:, :1])], 1)
    t = (h @ view.T)[:, :3]
    p = h @ clip.T
    ndc = p[:, :2] / p[:, 3:] + means2D[:, :2]
    xy = ((ndc + 1) * torch.tensor([W, H]) - 1) / 2
    # callers normalise, so that the gradient along a quaternion is of no consequence
    w, x, y, z = torch.nn.functional.normalize(rotations, dim=-1).unbind(-1)
    R = torch.stack(
        [
            *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
            *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
            *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
        ],
        -1,
    ).view(-1, 3, 3)
    M = R * (s.scale_modifier * scales)[:, None]
    fx, fy = W / (2 * s.tanfovx), H / (2 * s.tanfovy)
    tx = (t[:, 0] / t[:, 2]).clamp(-1.3 * s.tanfovx, 1.3 * s.tanfovx)
    ty = (t[:, 1] / t[:, 2]).clamp(-1.3 * s.tanfovy, 1.3 * s.tanfovy)
    zero = torch.zeros_like(tx)
    J = torch.stack([fx + zero, zero, -fx * tx, zero, fy + zero, -fy * ty], -1).view(-1, 2, 3)
    T = J / t[:, 2, None, None] @ view[:3, :3]
    V = T @ M @ M.mT @ T.mT
    unblurred = torch.linalg.det(V)
    V = V + 0.3 * torch.eye(2)
    det = torch.linalg.det(V)
    opacity = opacities[:, 0]
    if s.antialiasing:
        opacity = opacity * (unblurred / det).clamp(min=0.000025).sqrt()
    middle = (V[:, 0, 0] + V[:, 1, 1]) / 2
    radii = (3 * (middle + (middle**2 - det).clamp(min=0.1).sqrt()).sqrt()).ceil()
    colors = (rayfuse.spherical_harmonics(means3D - s.campos, shs, degree=s.sh_degree) + 0.5).clamp(
        min=0
    )
    tiles = torch.tensor([-(-W // TILE), -(-H // TILE)])
    low = ((xy - radii[:, None]) / TILE).trunc().clamp(min=0).minimum(tiles)
    high = ((xy + radii[:, None] + TILE - 1) / TILE).trunc().clamp(min=0).minimum(tiles)
    seen = (t[:, 2] > 0.2) & (high > low).all(-1)
    pixel = torch.stack(torch.meshgrid(torch.arange(W), torch.arange(H), indexing="xy"), -1)
    left = torch.ones(H, W, dtype=torch.float64)
    ended = torch.zeros(H, W, dtype=torch.bool)
    image, inverse = 0, 0
    for i in t[:, 2].argsort().tolist():
        if not seen[i]:
            continue
        tile = pixel // TILE
        inside = ((tile >= low[i]) & (tile < high[i])).all(-1)
        dx, dy = (xy[i] - pixel).unbind(-1)
        power = (
            -0.5 * (V[i, 1, 1] * dx**2 + V[i, 0, 0] * dy**2) / det[i]
            + V[i, 0, 1] / det[i] * dx * dy
        )
        alpha = (opacity[i] * power.exp()).clamp(max=0.99)
        alpha = torch.where(inside & ~ended & (power <= 0) & (alpha >= 1 / 255), alpha, 0)
        ended = ended | (left * (1 - alpha) < 0.0001)
        alpha = torch.where(ended, 0, alpha)
        image = image + (left * alpha)[..., None] * colors[i]
        inverse = inverse + left * alpha / t[i, 2]
        left = left * (1 - alpha)
    image = image + left[..., None] * s.bg
    return image.permute(2, 0, 1), torch.where(seen, radii, 0).int(), inverse[None]


def gradients(outputs, inputs):
    d = [torch.linspace(0.5, 1, y.numel(), dtype=y.dtype).view_as(y) for y in outputs]
    return torch.autograd.grad(outputs, inputs, d)


@pytest.mark.parametrize("antialiasing", [None, False, True])
@pytest.mark.parametrize("center", [(0.0, 0.0), (0.1, -0.2)], ids=str)
def test_values_and_gradients_are_the_published_ones(antialiasing, center):
    s = settings(center, scale_modifier=1.2, antialiasing=antialiasing)
    # beside an image off the axis the Jacobian is taken elsewhere (docs/compat.md)
    inputs = gaussians(width=2, depth=3) if any(center) else gaussians()
    found = dgr.GaussianRasterizer(raster_settings=s)(**inputs)
    image, radii, inverse = published(s, **inputs)
    assert (radii > 0).double().mean() > 0.3
    # what is outside of the image may have a tile in common with it, and no pixel
    seen = found[1] > 0
    assert torch.equal(found[1][seen], radii[seen]) and found[1].dtype == torch.int32
    assert (radii[~seen] > 0).sum() <= 2
    wanted = [image] if antialiasing is None else [image, inverse]
    images = [x for x in found if x is not found[1]]
    for one, other in zip(images, wanted, strict=True):
        torch.testing.assert_close(one, other)
    leaves = [*inputs.values()]
    for one, other in zip(gradients(images, leaves), gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(one, other)


def test_colours_and_covariances_may_be_given():
    s, inputs = settings(), gaussians()
    rasterizer = dgr.GaussianRasterizer(s)
    image, _ = rasterizer(**inputs)
    shs, scales, rotations = (inputs.pop(name) for name in ("shs", "scales", "rotations"))
    colors = rayfuse.spherical_harmonics(inputs["means3D"] - s.campos, shs, degree=2)
    again, _ = rasterizer(
        **inputs,
        colors_precomp=(colors + 0.5).clamp(min=0),
        cov3D_precomp=rayfuse.splat_covariances(rotations, scales, triu=True),
    )
    torch.testing.assert_close(again, image)
    with pytest.raises(ValueError, match="give either shs or colors_precomp"):
        rasterizer(**inputs, scales=scales, rotations=rotations)
    with pytest.raises(ValueError, match="give scales and rotations, or cov3D_precomp"):
        rasterizer(**inputs, shs=shs, scales=scales)


def test_what_is_behind_the_camera_is_marked():
    s, inputs = settings(), gaussians()
    visible = dgr.GaussianRasterizer(s).markVisible(inputs["means3D"])
    depth = inputs["means3D"] @ s.viewmatrix[:3, 2] + s.viewmatrix[3, 2]
    assert torch.equal(visible, depth > 0.2) and 0 < visible.sum() < len(visible)


def test_import_means_it_until_undone():
    name = "diff_gaussian_rasterization"
    before = sys.modules.get(name)
    dgr.install()
    dgr.install()
    try:
        from diff_gaussian_rasterization import GaussianRasterizer

        assert GaussianRasterizer is dgr.GaussianRasterizer
    finally:
        dgr.uninstall()
    assert sys.modules.get(name) is before
