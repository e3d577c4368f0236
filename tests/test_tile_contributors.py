"""Contributors against the definition pixel by pixel, and against what is composited of them."""

import itertools

import pytest
import torch

import rayfuse
import test_composite_tiles
from conftest import EMULATED

WIDE = test_composite_tiles.TestCompositeTiles.wide
VARIANTS = test_composite_tiles.TestCompositeTiles.wide_variants
SPLATS = ("means2d", "conics", "opacities", "tile_offsets", "flatten_ids")


def inputs(images=2, dtype=torch.float32, device="cpu", seed=0, **sizes):
    """Those of composite_tiles, by name."""
    args = test_composite_tiles.TestCompositeTiles().inputs(
        (images,), dtype, device, seed, **{**WIDE, **sizes}
    )
    return dict(zip(rayfuse.composite_tiles.op.inputs, args, strict=True))


def contributors(given, variant, **named):
    options = {name: x for name, x in variant.items() if name not in ("absgrad", "background")}
    named = {"masks": variant.get("masks", given["masks"]), **options, **named}
    return rayfuse.tile_contributors(*(given[name] for name in SPLATS), **named)


def pixels_of(found):
    """Of each contributor."""
    counts = found.counts.flatten().long()
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)


def assert_same(found, want):
    assert torch.equal(found.counts, want.counts)
    assert torch.equal(found.ids, want.ids)
    assert torch.equal(found.weights, want.weights)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.get("preset", "gsplat15"))
def test_contributors_are_those_of_the_definition(forced_backend, device, variant):
    N = 20 if forced_backend in EMULATED else 40
    given = inputs(dtype=torch.float64, device=device, seed=4, N=N)
    # so that some pixels end, and some alphas are cut off
    given["opacities"] = given["opacities"].sqrt()
    given["opacities"][:4] = 1
    found = contributors(given, variant)
    assert rayfuse.last_backend() == ("ref" if forced_backend == "triton" else forced_backend)
    args = [x.cpu() for x in given.values()]
    *_, pixels = test_composite_tiles.pixel_by_pixel(args, variant)
    assert found.counts.dtype == torch.int32 and found.ids.dtype == torch.int64
    assert found.counts.shape == (2, variant["image_height"], variant["image_width"])
    assert found.counts.flatten().tolist() == [len(pixel) for pixel in pixels]
    ids, weights = zip(*itertools.chain(*pixels), strict=True)
    assert found.ids.tolist() == [*ids]
    torch.testing.assert_close(found.weights.cpu(), torch.tensor(weights, dtype=torch.float64))


def test_contributors_make_the_image_of_composite_tiles(forced_backend, device):
    given = inputs(device=device, N=12)
    found = contributors(given, VARIANTS[0])
    with rayfuse.use_backend("ref"):
        image = rayfuse.composite_tiles(
            *(given[name] for name in rayfuse.composite_tiles.op.inputs[:6]),
            masks=given["masks"], **VARIANTS[0],
        )  # fmt: skip
    shares = found.weights[:, None] * given["colors"][found.ids]
    colors = torch.zeros_like(image.colors).flatten(0, 2).index_add_(0, pixels_of(found), shares)
    torch.testing.assert_close(colors.view_as(image.colors), image.colors)


def test_lists_in_two_parts_are_the_whole(forced_backend, device):
    """With the transmittance behind the first part before the second."""
    given = inputs(1, device=device, N=12)
    given["opacities"] *= 0.5
    variant = dict(VARIANTS[0], masks=None)
    whole = contributors(given, variant)
    begins, M = given["tile_offsets"].flatten(), len(given["flatten_ids"])
    lengths = begins.diff(append=begins.new_tensor([M]))
    place = torch.arange(M, device=device) - begins.repeat_interleave(lengths)
    found, pixels, transmittance = [], [], None
    for part, counts in ((place < 4, lengths.clamp(max=4)), (place >= 4, (lengths - 4).clamp(0))):
        offsets = (counts.cumsum(0) - counts).view_as(given["tile_offsets"])
        lists = dict(given, tile_offsets=offsets, flatten_ids=given["flatten_ids"][part])
        found.append(contributors(lists, variant, transmittance=transmittance))
        pixels.append(pixels_of(found[-1]))
        alpha = torch.zeros(whole.counts.numel(), device=device)
        alpha.index_add_(0, pixels[-1], found[-1].weights)
        transmittance = 1 - alpha.view(whole.counts.shape)
    first, second = found
    assert second.counts.any() and torch.equal(first.counts + second.counts, whole.counts)
    order = torch.cat(pixels).sort(stable=True).indices
    assert torch.equal(torch.cat([first.ids, second.ids])[order], whole.ids)
    weights = torch.cat([first.weights, second.weights])[order]
    torch.testing.assert_close(weights, whole.weights)


def test_nothing_comes_of_nothing(forced_backend, device):
    for sizes in (dict(N=0), dict(N=4)):
        given = inputs(device=device, **sizes)
        masks = torch.zeros_like(given["masks"], dtype=torch.bool)
        found = contributors(dict(given, masks=masks), VARIANTS[0])
        assert not found.counts.any() and found.ids.shape == found.weights.shape == (0,)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_splat_that_is_not_finite_is_passed_over(forced_backend, device, bad):
    clean = inputs(device=device)
    without = contributors(dict(clean, opacities=clean["opacities"].clone().index_fill_(
        0, torch.tensor([3], device=device), 0)), VARIANTS[0])  # fmt: skip
    for name in SPLATS[:3]:
        given = dict(clean, **{name: clean[name].clone()})
        given[name][3].view(-1)[-1] = bad
        assert_same(contributors(given, VARIANTS[0]), without)


def test_result_is_the_same_for_any_number_of_threads(forced_backend, device):
    given = inputs(2 if forced_backend in EMULATED else 60, device=device)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(contributors(given, VARIANTS[0]))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same(result, results[0])


def test_leading_dimensions_and_integers_are_those_of_composite_tiles(forced_backend, device):
    given = inputs(2, device=device)
    want = contributors(given, VARIANTS[0])
    given["flatten_ids"] = given["flatten_ids"].int()
    for name in ("tile_offsets", "masks"):
        given[name] = given[name].int().view(2, 1, *given[name].shape[1:])
    for name in SPLATS[:3]:
        given[name] = given[name].view(2, 1, -1, *given[name].shape[1:]).requires_grad_()
    found = contributors(dict(given, masks=given["masks"].bool()), VARIANTS[0])
    assert found.counts.shape == (2, 1, *want.counts.shape[1:])
    assert not found.weights.requires_grad
    assert_same(found._replace(counts=found.counts.squeeze(1)), want)


def test_compiler_sees_how_many_there_are(forced_backend, device):
    given = inputs(1, device=device)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        call = torch.compile(contributors, backend="eager", fullgraph=True)
        assert_same(call(given, VARIANTS[0]), contributors(given, VARIANTS[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image_width=17), "tile_offsets must have shape"),
        (dict(tile_size=17), "tile_size must be from 1 to 16, got 17"),
        (dict(preset="3dgs"), "preset must be one of"),
        (dict(max_alpha=1.5), "max_alpha must be > 0 and <= 1, got 1.5"),
        (dict(transmittance=torch.ones(2, 7, 9)), "transmittance must have shape [2, 7, 11], got"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError) as raised:
        contributors(inputs(), {**VARIANTS[0], **change})
    assert str(raised.value).startswith(f"tile_contributors: {message}")


def test_lists_that_lead_out_of_bounds_are_named():
    for backend in ("ref", "cpu"):
        given = inputs()
        given["flatten_ids"][0] = len(given["means2d"])
        with rayfuse.use_backend(backend), pytest.raises(ValueError) as raised:
            contributors(given, VARIANTS[0])
        assert str(raised.value).startswith("tile_contributors: flatten_ids must be indices of")
