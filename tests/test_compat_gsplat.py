"""gsplat 1.5.3 on CPU tensors: the values and gradients of its own references in PyTorch."""

import functools
import importlib
import inspect
import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from rayfuse.compat import gsplat as compat
from rayfuse.compat import nerfacc

ROOT = Path(__file__).parent.parent
W, H, TILE = 40, 24, 16
X, Y = -(-W // TILE), -(-H // TILE)


@pytest.fixture
def gsplat():
    """The published package, after install()."""
    package = pytest.importorskip("gsplat", reason="gsplat is not installed (make test does)")
    compat.install()
    yield package
    compat.uninstall()


@pytest.fixture
def with_nerfacc():
    nerfacc.install()
    yield
    nerfacc.uninstall()


@pytest.fixture
def torch_impl(gsplat, with_nerfacc, monkeypatch):
    """Its references, of which the compositing wants nerfacc, and a kernel that picks pairs."""
    wrapper = importlib.import_module("gsplat.cuda._wrapper")
    monkeypatch.setattr(wrapper, "rasterize_to_indices_in_range", pairs_of_a_pixel_and_a_splat)
    return importlib.import_module("gsplat.cuda._torch_impl")


def pairs_of_a_pixel_and_a_splat(
    start, end, transmittances, means2d, conics, opacities, width, height, tile_size, offsets, ids
):
    """What composites, of all batches at once: splats, pixels, images."""
    assert start == 0 and end * tile_size**2 >= len(ids)
    found = []
    N, bounds = means2d.shape[-2], [*offsets.flatten().tolist(), len(ids)]
    means2d, conics, opacities = means2d.view(-1, 2), conics.view(-1, 3), opacities.flatten()
    for tile in range(offsets.numel()):
        image, place = divmod(tile, offsets.shape[-1] * offsets.shape[-2])
        top, left = (tile_size * i for i in divmod(place, offsets.shape[-1]))
        listed = ids[bounds[tile] : bounds[tile + 1]].long()
        y, x = torch.meshgrid(
            torch.arange(top, min(top + tile_size, height)),
            torch.arange(left, min(left + tile_size, width)),
            indexing="ij",
        )
        pixel = torch.stack([x, y], -1).view(-1, 1, 2)
        dx, dy = (pixel + 0.5 - means2d[listed]).unbind(-1)
        a, b, c = conics[listed].unbind(-1)
        sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
        alpha = (opacities[listed] * (-sigma).exp()).clamp(max=0.999)
        alpha = torch.where((sigma >= 0) & (alpha >= 1 / 255), alpha, 0)
        taken = (alpha > 0) & ((1 - alpha).cumprod(-1) > 1e-4)
        row, column = taken.nonzero().unbind(-1)
        index = (pixel[:, 0, 1] * width + pixel[:, 0, 0])[row]
        found.append(torch.stack([listed[column] % N, index, torch.full_like(index, image)]))
    found = torch.cat(found, 1)
    order = (found[2] * height * width + found[1]).sort(stable=True).indices
    return found[:, order].unbind(0)


def scene(N=60, C=2, batch=(), dtype=torch.float64, seed=0):
    """Gaussians before cameras, some behind or beside them; all want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*batch, *shape, generator=generator, dtype=torch.float64)

    viewmats = torch.eye(4, dtype=torch.float64) + 0.1 * (uniform(C, 4, 4) - 0.5)
    viewmats[..., 3, :] = torch.tensor([0.0, 0, 0, 1])
    Ks = torch.tensor([[30.0, 0, W / 2], [0, 32, H / 2], [0, 0, 1]]).expand(*batch, C, 3, 3)
    values = dict(
        means=uniform(N, 3) * torch.tensor([4, 3, 5]) - torch.tensor([2, 1.5, 0.5]),
        quats=uniform(N, 4) - 0.5,
        scales=0.02 + 0.3 * uniform(N, 3),
        opacities=uniform(N),
        viewmats=viewmats,
    )
    values = {name: x.to(dtype).requires_grad_() for name, x in values.items()}
    return types.SimpleNamespace(
        **values, Ks=Ks.to(dtype), leaves=values, colors=uniform(N, 3).to(dtype)
    )


def gradients(outputs, inputs, weights=None):
    """Of a weighted sum of outputs."""
    d = [torch.linspace(0.5, 1, y.numel(), dtype=y.dtype).view_as(y) for y in outputs]
    if weights is not None:
        d = [x * w for x, w in zip(d, weights, strict=True)]
    return torch.autograd.grad(outputs, inputs, d, allow_unused=True, materialize_grads=True)


def close(found, wanted, **tolerance):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


# ---- names


def test_arguments_are_gsplats(gsplat):
    compat.uninstall()
    for module, names in compat._REPLACED.items():
        for name in names:
            theirs = getattr(importlib.import_module(f"gsplat.{module}"), name)
            want, got = (inspect.signature(f).parameters for f in (theirs, getattr(compat, name)))
            assert [*got] == [*want]
            assert [p.default for p in got.values()] == [p.default for p in want.values()]


def test_install_is_undone(gsplat):
    wrapper = importlib.import_module("gsplat.cuda._wrapper")
    importer = types.ModuleType("importer")
    sys.modules["importer"] = importer
    importer.spherical_harmonics = installed = gsplat.spherical_harmonics
    names = compat.install()
    assert gsplat.spherical_harmonics is installed
    assert {"rasterize_to_pixels", "isect_tiles", "rasterize_to_pixels_2dgs"} <= {*names}
    compat.uninstall()
    try:
        assert gsplat.spherical_harmonics is importer.spherical_harmonics is not installed
        assert gsplat.rendering.spherical_harmonics is wrapper.spherical_harmonics
        assert gsplat.spherical_harmonics.__module__ == "gsplat.cuda._wrapper"
    finally:
        del sys.modules["importer"]


def test_cuda_tensors_go_to_gsplat(gsplat, monkeypatch):
    compat.uninstall()
    wrapper = importlib.import_module("gsplat.cuda._wrapper")
    monkeypatch.setattr(wrapper, "isect_offset_encode", lambda *args: "theirs")
    compat.install()

    class OnCuda(torch.Tensor):
        is_cuda = True

    keys = torch.zeros(3).long()
    assert wrapper.isect_offset_encode(keys.as_subclass(OnCuda), 1, 1, 1) == "theirs"
    assert wrapper.isect_offset_encode(keys, 1, 1, 1).tolist() == [[[0]]]
    compat.uninstall()


def test_what_is_not_here_says_so(gsplat):
    with pytest.raises(
        NotImplementedError,
        match="fully_fused_projection_2dgs: tensors must be on a CUDA device, got cpu",
    ):
        s = scene()
        gsplat.rasterization_2dgs(
            s.means, s.quats, s.scales, s.opacities, s.colors, s.viewmats, s.Ks, W, H
        )
    with pytest.raises(
        NotImplementedError, match=r"camera_model must be pinhole or ortho where .*, got 'fisheye'"
    ):
        render(gsplat, s, camera_model="fisheye")


# ---- the functions


@pytest.mark.parametrize("camera_model", ["pinhole", "ortho"])
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_projection(gsplat, torch_impl, camera_model, batch):
    s = scene(batch=batch)
    named = dict(calc_compensations=True, camera_model=camera_model)
    rest = s.viewmats, s.Ks, W, H
    found = gsplat.fully_fused_projection(s.means, None, s.quats, s.scales, *rest, **named)
    covars, _ = torch_impl._quat_scale_to_covar_preci(s.quats, s.scales, compute_preci=False)
    wanted = torch_impl._fully_fused_projection(s.means, covars, *rest, **named)
    assert torch.equal(found[0], wanted[0]) and found[0].dtype == torch.int32
    seen = (found[0] > 0).all(-1)
    assert 0.2 < seen.double().mean() < 0.9
    close([x[seen] for x in found[1:]], [x[seen] for x in wanted[1:]])
    weights = [seen[..., None], seen, seen[..., None], seen]
    leaves = s.means, s.quats, s.scales, s.viewmats
    close(gradients(found[1:], leaves, weights), gradients(wanted[1:], leaves, weights))

    triangle = covars.detach()[..., [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]
    of_covars = gsplat.fully_fused_projection(s.means, triangle, None, None, *rest, **named)
    close(of_covars, found)


def test_radii_are_those_of_compensated_opacities(gsplat):
    s = scene(C=1)
    args = s.means, None, s.quats, s.scales, s.viewmats, s.Ks, W, H
    *_, compensations = gsplat.fully_fused_projection(*args, calc_compensations=True)
    found, wanted = (
        gsplat.fully_fused_projection(*args, **named)[0]
        for named in (
            dict(opacities=s.opacities, calc_compensations=True),
            dict(opacities=s.opacities * compensations[0]),
        )
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("sparse_grad", "batch"), [(False, ()), (False, (2,)), (True, ())], ids=str
)
def test_packed_projection_is_the_dense_one_where_it_is_seen(gsplat, sparse_grad, batch):
    s = scene(batch=batch)
    args = s.means, None, s.quats, s.scales, s.viewmats, s.Ks, W, H
    named = dict(calc_compensations=True, opacities=s.opacities, radius_clip=2)
    dense = gsplat.fully_fused_projection(*args, **named)
    packed = gsplat.fully_fused_projection(*args, **named, packed=True, sparse_grad=sparse_grad)
    batches, cameras, gaussians, radii, *values = packed
    seen = (dense[0] > 0).all(-1).nonzero()
    ids = ((batches,) if batch else ()) + (cameras, gaussians)
    assert torch.equal(seen, torch.stack(ids, -1))
    assert (batch or not batches.any()) and torch.equal(radii, dense[0][ids])
    at_seen = [x[ids] for x in dense[1:]]
    close(values, at_seen)
    leaves = s.means, s.quats, s.scales
    found = gradients(values, leaves)
    assert all(x.is_sparse is sparse_grad for x in found)
    close([x.to_dense() for x in found], gradients(at_seen, leaves))


def projected(gsplat, s, **named):
    """[C, N, ...] and lists."""
    radii, means2d, depths, conics, _ = gsplat.fully_fused_projection(
        *(s.means, None, s.quats, s.scales, s.viewmats, s.Ks, W, H), opacities=s.opacities, **named
    )
    _, isect_ids, ids = gsplat.isect_tiles(means2d, radii, depths, TILE, X, Y)
    offsets = gsplat.isect_offset_encode(isect_ids, len(radii), X, Y)
    return radii, means2d, depths, conics, offsets, ids


@pytest.mark.parametrize("sort", [True, False])
def test_lists_of_tiles(gsplat, torch_impl, sort):
    s = scene(dtype=torch.float32)
    radii, means2d, depths, *_ = projected(gsplat, s)
    # a power of two, for which another bit of the key is the tile's
    tiles = 12, 4, 2
    args = means2d, radii, depths, *tiles
    found = gsplat.isect_tiles(*args, sort=sort)
    wanted = torch_impl._isect_tiles(*args, sort=sort)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype
    if sort:
        one, other = (
            f(found[1], 2, *tiles[1:])
            for f in (gsplat.isect_offset_encode, torch_impl._isect_offset_encode)
        )
        assert torch.equal(one, other) and one.dtype == other.dtype
    camera, gaussian = (radii > 0).all(-1).nonzero().unbind(-1)
    packed = gsplat.isect_tiles(
        *(x[camera, gaussian] for x in (means2d, radii, depths)),
        *(*tiles, sort),
        packed=True,
        n_images=2,
        image_ids=camera,
        gaussian_ids=gaussian,
    )
    assert torch.equal(packed[1], found[1])
    assert torch.equal((camera * len(s.means) + gaussian)[packed[2].long()], found[2].long())


@pytest.mark.parametrize("D", [1, 3, 7])
def test_pixels(gsplat, torch_impl, D):
    s = scene()
    _, means2d, _, conics, offsets, ids = (x.detach() for x in projected(gsplat, s))
    C, N = means2d.shape[:2]
    generator = torch.Generator().manual_seed(1)
    leaves = dict(
        means2d=means2d,
        conics=conics,
        colors=torch.rand(C, N, D, generator=generator, dtype=torch.float64),
        opacities=s.opacities.detach().expand(C, N).contiguous(),
        backgrounds=torch.rand(C, D, generator=generator, dtype=torch.float64),
    )
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    *splats, background = leaves.values()
    rest = W, H, TILE, offsets, ids, background
    found = gsplat.rasterize_to_pixels(*splats, *rest)
    wanted = torch_impl._rasterize_to_pixels(*splats, *rest)
    tolerance = dict(atol=1e-6, rtol=1e-6)  # it begins with a transmittance in float32
    close(found, wanted, **tolerance, check_dtype=False)
    d_found, d_wanted = (gradients(x, [*leaves.values()]) for x in (found, wanted))
    close(d_found, d_wanted, **tolerance)

    # packed splats, which are those of all images end to end; gsplat refuses their backgrounds
    flat = [x.flatten(0, 1) for x in splats]
    packed = gsplat.rasterize_to_pixels(*flat, *rest, packed=True)
    close(packed, found)

    masks = torch.ones(C, Y, X, dtype=torch.bool)
    masks[1, 0, 1] = False
    colors, alphas = gsplat.rasterize_to_pixels(*splats, *rest, masks)
    hidden = torch.zeros(C, H, W, dtype=torch.bool)
    hidden[1, :TILE, TILE : 2 * TILE] = True
    close((colors[~hidden], alphas[~hidden]), [x[~hidden] for x in found])
    assert not alphas[hidden].any()
    assert torch.equal(colors[hidden], background[1].expand_as(colors[hidden]))


def test_pairs_of_a_pixel_and_a_splat(gsplat, with_nerfacc):
    """Of whole lists, and of a tile's number of pixels at a time, as gsplat's reference has it."""
    s, tile = scene(), 4
    radii, means2d, depths, conics, *_ = (x.detach() for x in projected(gsplat, s))
    opacities = s.opacities.detach().expand(2, -1)
    tiles = -(-W // tile), -(-H // tile)
    _, keys, ids = gsplat.isect_tiles(means2d, 2 * radii, depths, tile, *tiles)
    rest = W, H, tile, gsplat.isect_offset_encode(keys, 2, *tiles), ids
    splats = means2d, conics, opacities
    light = torch.ones(2, H, W, dtype=torch.float64)
    wrapper = importlib.import_module("gsplat.cuda._wrapper")
    found = wrapper.rasterize_to_indices_in_range(0, 10**6, light, *splats, *rest)
    wanted = pairs_of_a_pixel_and_a_splat(0, 10**6, light, *splats, *rest)
    assert all(map(torch.equal, found, wanted))

    composite = importlib.import_module("gsplat.cuda._torch_impl")._rasterize_to_pixels
    parts, whole = (
        composite(means2d, conics, s.colors.expand(2, -1, -1), opacities, *rest, batch_per_iter=n)
        for n in (1, 100)
    )
    lengths = rest[3].flatten().diff()
    assert lengths.max() > tile**2
    close(parts, whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_absolute_gradients_are_summed_over_pixels(gsplat, packed):
    s, width, height, tile = scene(N=12), 9, 6, 4
    generator = torch.Generator().manual_seed(0)
    means2d = 8 * torch.rand(2, 12, 2, generator=generator, dtype=torch.float64)
    tiles = -(-width // tile), -(-height // tile)
    radii, depths = torch.full((2, 12, 2), 4), torch.rand(2, 12)
    _, keys, ids = gsplat.isect_tiles(means2d, radii, depths, tile, *tiles)
    offsets = gsplat.isect_offset_encode(keys, 2, *tiles)
    conics = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64).expand(2, 12, 3)
    splats = [means2d, conics, s.colors.expand(2, -1, -1), s.opacities.detach().expand(2, -1)]
    splats = [x.flatten(0, 1) if packed else x for x in splats]
    masks = torch.ones_like(offsets, dtype=torch.bool)
    masks[1, 1, 0] = False
    backgrounds = torch.rand(2, 3, dtype=torch.float64)
    rest = width, height, tile, offsets, ids, backgrounds, masks, packed
    # what is given is no leaf, as in training
    leaf = splats.pop(0).requires_grad_()
    means2d = leaf * 1
    found = gsplat.rasterize_to_pixels(means2d, *splats, *rest, absgrad=True)
    weights = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) for y in found]
    torch.autograd.backward(found, weights)
    colors, alphas = gsplat.rasterize_to_pixels(leaf, *splats, *rest)
    of_pixels = (colors * weights[0]).sum(-1) + (alphas * weights[1])[..., 0]
    gradients = [
        torch.autograd.grad(pixel, leaf, retain_graph=True)[0] for pixel in of_pixels.flatten()
    ]
    torch.testing.assert_close(leaf.grad, sum(gradients))
    torch.testing.assert_close(means2d.absgrad, sum(x.abs() for x in gradients))


@pytest.mark.parametrize("degree", range(5))
def test_harmonics(gsplat, torch_impl, degree):
    generator = torch.Generator().manual_seed(0)
    dirs, coeffs = (
        (torch.rand(2, 9, *shape, generator=generator, dtype=torch.float64) - 0.5).requires_grad_()
        for shape in ((3,), (25, 3))
    )
    masks = torch.arange(18).view(2, 9) % 4 > 0
    found = gsplat.spherical_harmonics(degree, dirs, coeffs, masks)
    wanted = torch_impl._spherical_harmonics(degree, dirs, coeffs) * masks[..., None]
    close([found], [wanted], atol=1e-7, rtol=1e-7)  # its constants have so many digits
    close(
        gradients([found], [dirs, coeffs]),
        gradients([wanted], [dirs, coeffs]),
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize("triu", [False, True])
def test_covariances(gsplat, torch_impl, triu):
    s = scene()
    found = gsplat.quat_scale_to_covar_preci(s.quats, s.scales, triu=triu)
    wanted = torch_impl._quat_scale_to_covar_preci(s.quats, s.scales, triu=triu)
    close(found, wanted)
    close(gradients(found, [s.quats, s.scales]), gradients(wanted, [s.quats, s.scales]))
    only = gsplat.quat_scale_to_covar_preci(s.quats, s.scales, True, False)
    assert only[0].shape == (60, 3, 3) and only[1] is None


def test_proj_is_gsplats_own(gsplat, torch_impl):
    s = scene()
    covars = torch.eye(3, dtype=torch.float64).expand(2, 60, 3, 3)
    means = s.means.expand(2, -1, -1)
    close(
        gsplat.proj(means, covars, s.Ks, W, H, "ortho"),
        torch_impl._ortho_proj(means, covars, s.Ks, W, H),
    )


def test_relocation_is_equation_9(gsplat):
    relocation = importlib.import_module("gsplat.relocation")
    opacities, scales = torch.tensor([0.3, 0.9, 0.999]), torch.rand(3, 3)
    ratios, n_max = torch.tensor([1, 4, 51]), 51
    binoms = torch.tensor([[float(math.comb(n, k)) for k in range(n_max)] for n in range(n_max)])
    found = relocation.compute_relocation(opacities, scales, ratios, binoms)
    for i, (o, n) in enumerate(zip(opacities.double().tolist(), ratios.tolist(), strict=True)):
        each = 1 - (1 - o) ** (1 / n)
        total = sum(
            math.comb(j - 1, k) * (-1) ** k / math.sqrt(k + 1) * each ** (k + 1)
            for j in range(1, n + 1)
            for k in range(j)
        )
        torch.testing.assert_close(found[0][i].item(), each, rtol=1e-5, atol=0)
        torch.testing.assert_close(found[1][i], o / total * scales[i], rtol=1e-5, atol=0)


def test_adam_moves_what_is_visible(gsplat):
    start = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    x = start.clone().requires_grad_()
    optimizer = gsplat.SelectiveAdam([x], eps=1e-8, betas=(0.9, 0.999))
    optimizer.param_groups[0]["lr"] = 0.1
    for _ in range(2):
        optimizer.zero_grad()
        (x**2).sum().backward()
        optimizer.step(torch.tensor([True, False]))
    assert torch.equal(x[1], start[1])
    m, v, want = torch.zeros(2), torch.zeros(2), start[0].clone()
    for _ in range(2):
        m, v = 0.9 * m + 0.1 * 2 * want, 0.999 * v + 0.001 * (2 * want) ** 2
        want = want - 0.1 * m / (v.sqrt() + 1e-8)
    torch.testing.assert_close(x[0].detach(), want)


# ---- the whole


def render(gsplat, s, colors=None, **named):
    colors = s.colors if colors is None else colors
    return gsplat.rasterization(
        *(s.means, s.quats, s.scales, s.opacities, colors, s.viewmats, s.Ks, W, H), **named
    )


MODES = [
    dict(render_mode="RGB"),
    dict(render_mode="D", rasterize_mode="antialiased"),
    dict(render_mode="ED"),
    dict(render_mode="RGB+D", sh_degree=2),
    dict(render_mode="RGB+ED", sh_degree=1, rasterize_mode="antialiased"),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values())))
def test_rasterization(gsplat, torch_impl, mode, packed):
    s = scene()
    colors = torch.rand(60, 9, 3, dtype=torch.float64) if "sh_degree" in mode else s.colors
    colors.requires_grad_()
    found = render(gsplat, s, colors, packed=packed, **mode)
    wanted = gsplat.rendering._rasterization(
        *(s.means, s.quats, s.scales, s.opacities, colors, s.viewmats, s.Ks, W, H), **mode
    )
    assert (found[1] > 0).double().mean() > 0.2
    # which would look for a compiler
    assert "gsplat.cuda._backend" not in sys.modules
    tolerance = dict(atol=1e-6, rtol=1e-5)
    close(found[:2], wanted[:2], **tolerance, check_dtype=False)
    leaves = [*s.leaves.values(), colors]
    close(gradients(found[:2], leaves), gradients(wanted[:2], leaves), atol=1e-5, rtol=1e-4)


def test_dense_and_packed_are_the_same(gsplat):
    """In float32, on kernels where there are any; of an orthographic camera, and many channels."""
    s = scene(dtype=torch.float32)
    colors = torch.rand(2, 60, 40)
    for named in (dict(), dict(camera_model="ortho")):
        backgrounds = torch.rand(2, 40)
        dense, packed = (
            render(
                gsplat,
                s,
                colors,
                packed=packed,
                backgrounds=None if packed else backgrounds,
                channel_chunk=64,
                **named,
            )
            for packed in (False, True)
        )
        with_background = packed[0] + (1 - packed[1]) * backgrounds[:, None, None]
        close([with_background, packed[1]], dense[:2], atol=1e-5, rtol=1e-5)
        assert torch.equal(dense[2]["isect_ids"], packed[2]["isect_ids"])


@functools.cache
def target():
    """Images of three views of a few large splats, and where these are."""
    gsplat = importlib.import_module("gsplat")
    generator = torch.Generator().manual_seed(0)
    N, C = 24, 3
    means = 2 * torch.rand(N, 3, generator=generator) - 1
    colors = torch.rand(N, 3, generator=generator)
    quats = torch.randn(N, 4, generator=generator)
    viewmats = torch.eye(4).repeat(C, 1, 1)
    viewmats[:, 2, 3] = 3.5
    viewmats[:, 0, 3] = torch.linspace(-0.3, 0.3, C)
    Ks = torch.tensor([[40.0, 0, W / 2], [0, 40, H / 2], [0, 0, 1]]).expand(C, 3, 3)
    images, *_ = gsplat.rasterization(
        means, quats, torch.full((N, 3), 0.2), torch.full((N,), 0.9), colors, viewmats, Ks, W, H
    )
    return images, viewmats, Ks


def train(strategy, steps, **named):
    """With the script in the docs."""
    text = (ROOT / "docs" / "compat.md").read_text()
    (example,) = re.findall(r"```python\n(import torch\n[^`]*?import gsplat\n.*?)```", text, re.S)
    names = {}
    exec(compile(example, "docs/compat.md", "exec"), names)
    torch.manual_seed(0)
    images, viewmats, Ks = target()
    points = 2 * torch.rand(200, 3) - 1

    def error(splats):
        gsplat = names["gsplat"]
        colors, *_ = gsplat.rasterization(
            *(splats["means"], splats["quats"], splats["scales"].exp()),
            *(splats["opacities"].sigmoid(), splats["colors"].sigmoid()),
            *(viewmats, Ks, W, H),
        )
        return (colors - images).abs().mean().item()

    before = error(names["train"](images, viewmats, Ks, points.clone(), strategy, 0, **named))
    splats = names["train"](images, viewmats, Ks, points.clone(), strategy, steps, **named)
    return len(splats["means"]), before, error(splats)


@pytest.mark.parametrize(("absgrad", "steps"), [(False, 90), (True, 30)])
def test_default_strategy_densifies_and_learns(gsplat, absgrad, steps):
    strategy = gsplat.DefaultStrategy(
        refine_start_iter=9, refine_every=10, reset_every=1000, grow_grad2d=2e-3, absgrad=absgrad
    )
    count, before, after = train(strategy, steps)
    assert count > 220
    assert after < before / (3 if steps == 90 else 1.5)


def test_mcmc_strategy_grows_and_learns(gsplat):
    strategy = gsplat.MCMCStrategy(
        cap_max=230, refine_start_iter=20, refine_every=20, noise_lr=1e3, min_opacity=0.02
    )
    count, before, after = train(strategy, 90, lr=0.005)
    assert count == 230
    assert after < before / 3
