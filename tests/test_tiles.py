"""Lists of tiles against a loop over all splats and pixels."""

import itertools
import math

import pytest
import torch

import rayfuse

SIZE, X, Y = 8, 5, 4
LIMIT = 255


def splats(images=2, N=40, seed=0, dtype=torch.float32):
    """Random splats of some pixels' width, a few of them beyond the image or culled."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(images, N, 8, generator=generator, dtype=torch.float64)
    means2d = (1.4 * u[..., :2] - 0.2) * SIZE * torch.tensor([X, Y])
    width = 0.3 + 6 * u[..., 2:4] ** 3
    angle = math.pi * u[..., 4]
    cos, sin, (p, q) = angle.cos(), angle.sin(), (1 / width**2).unbind(-1)
    conics = torch.stack(
        [cos**2 * p + sin**2 * q, cos * sin * (p - q), sin**2 * p + cos**2 * q], -1
    )
    a, b, c = conics.unbind(-1)
    opacities = u[..., 5]
    extent = (2 * (LIMIT * opacities).log().clamp(min=0)).sqrt()[..., None]
    radii = (extent * (torch.stack([c, a], -1) / (a * c - b * b)[..., None]).sqrt()).ceil().int()
    radii[:, ::7] = 0
    # depths of which some are equal
    depths = (10 * u[..., 6]).round() + 1
    values = (means2d, depths, conics, opacities)
    means2d, depths, conics, opacities = (x.to(dtype) for x in values)
    return means2d, radii, depths, conics, opacities


def boxes(means2d, radii, depths):
    """The lists of all tiles of one image, by a loop."""
    lists = [[] for _ in range(X * Y)]
    for i in sorted(range(len(depths)), key=lambda i: depths[i].item()):
        if (radii[i] <= 0).any():
            continue
        low = [math.floor(v) for v in (means2d[i] / SIZE - radii[i] / SIZE).tolist()]
        high = [math.ceil(v) for v in (means2d[i] / SIZE + radii[i] / SIZE).tolist()]
        for y in range(max(low[1], 0), min(high[1], Y)):
            for x in range(max(low[0], 0), min(high[0], X)):
                lists[y * X + x].append(i)
    return lists


def as_lists(found):
    offsets = [*found.tile_offsets.flatten().tolist(), len(found.flatten_ids)]
    return [found.flatten_ids[b:e].tolist() for b, e in itertools.pairwise(offsets)]


def test_boxes_are_those_of_a_loop_and_front_to_back():
    means2d, radii, depths, *_ = splats()
    found = rayfuse.intersect_tiles(means2d, radii, depths, SIZE, X, Y)
    want = []
    for image, values in enumerate(zip(means2d, radii, depths, strict=True)):
        want += [[i + image * len(depths[0]) for i in tile] for tile in boxes(*values)]
    assert as_lists(found) == want
    counts = torch.bincount(found.flatten_ids, minlength=depths.numel())
    assert found.tiles_per_splat.flatten().tolist() == counts.tolist()
    dtypes = found.tiles_per_splat.dtype, found.flatten_ids.dtype, found.tile_offsets.dtype
    assert dtypes == (torch.int32, torch.int64, torch.int64)
    assert found.tile_offsets.shape == (2, Y, X)


def test_packed_splats_have_the_lists_of_dense_ones():
    means2d, radii, depths, conics, opacities = splats()
    dense = rayfuse.intersect_tiles(
        means2d, radii, depths, SIZE, X, Y, conics=conics, opacities=opacities
    )
    kept = (radii > 0).all(-1)
    image, index = kept.nonzero().unbind(-1)
    packed = rayfuse.intersect_tiles(
        *(x[kept] for x in (means2d, radii, depths)),
        *(SIZE, X, Y),
        conics=conics[kept],
        opacities=opacities[kept],
        image_ids=image,
        images=2,
    )
    assert torch.equal((image * len(depths[0]) + index)[packed.flatten_ids], dense.flatten_ids)
    assert torch.equal(packed.tile_offsets, dense.tile_offsets)
    assert torch.equal(packed.tiles_per_splat, dense.tiles_per_splat[kept])


@pytest.mark.parametrize("seed", range(3))
def test_ellipses_are_listed_where_a_pixel_meets_them(seed):
    means2d, radii, depths, conics, opacities = splats(1, 150, seed, torch.float64)
    args = means2d, radii, depths, SIZE, X, Y
    box = rayfuse.intersect_tiles(*args)
    exact = rayfuse.intersect_tiles(*args, conics=conics, opacities=opacities)
    line = torch.arange(SIZE) + 0.5
    pixels = torch.cartesian_prod(line, line)
    ends, along = line[[0, -1]], torch.linspace(0.5, SIZE - 0.5, 400)
    sides = torch.cat([torch.cartesian_prod(ends, along), torch.cartesian_prod(along, ends)])

    def met(points, tile, ids):
        """Which splats reach any of the points, or the place nearest to them in their square."""
        mean = means2d[0, ids] - SIZE * torch.tensor([tile % X, tile // X])
        nearest = mean.clamp(0.5, SIZE - 0.5)[None]
        dx, dy = (torch.cat([points[:, None].expand(-1, len(ids), 2), nearest]) - mean).unbind(-1)
        a, b, c = conics[0, ids].unbind(-1)
        sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
        hit = (sigma <= (LIMIT * opacities[0, ids]).log()).any(0)
        return torch.tensor(ids)[hit].tolist()

    for tile, (of_box, of_ellipse) in enumerate(zip(as_lists(box), as_lists(exact), strict=True)):
        # none that a pixel needs is missing, and none is there that misses the square of pixels
        assert {*met(pixels, tile, of_box)} <= {*of_ellipse}
        assert of_ellipse == met(sides, tile, of_ellipse)
    assert len(exact.flatten_ids) < 0.95 * len(box.flatten_ids)


def test_images_are_the_same_to_the_bit():
    means2d, radii, depths, conics, opacities = splats(2, 200)
    colors = torch.rand(2, 200, 3)
    args = means2d, radii, depths, SIZE, X, Y
    images = []
    for ellipse in ({}, dict(conics=conics, opacities=opacities)):
        _, ids, offsets = rayfuse.intersect_tiles(*args, **ellipse)
        image = rayfuse.composite_tiles(
            *(means2d, conics, colors, opacities, offsets, ids),
            image_width=SIZE * X,
            image_height=SIZE * Y,
            tile_size=SIZE,
        )
        images.append(image.colors)
    assert torch.equal(*images)


def test_what_is_culled_or_not_finite_is_in_no_list():
    means2d, radii, depths, conics, opacities = splats(1, 9)
    radii[:] = 3
    args = (means2d, radii, depths, conics, opacities)
    want = as_lists(
        rayfuse.intersect_tiles(*args[:3], SIZE, X, Y, conics=conics, opacities=opacities)
    )
    want = [[i for i in tile if i > 2] for tile in want]
    radii[:, 0] = 0
    for x in (means2d, depths, conics, opacities):
        x[:, 0] = torch.nan
    means2d[:, 1] = torch.inf
    means2d[:, 2] = torch.nan
    found = rayfuse.intersect_tiles(*args[:3], SIZE, X, Y, conics=conics, opacities=opacities)
    assert as_lists(found) == want


def test_depths_may_be_negative_or_of_half_precision():
    depths = torch.tensor([1.0, -2.0, 0.0, -3.0, 2.0])
    means2d, radii = torch.full((5, 2), 4.0), torch.ones(5, 2, dtype=torch.int32)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = rayfuse.intersect_tiles(means2d, radii, depths.to(dtype), SIZE, 1, 1)
        assert found.flatten_ids.tolist() == [3, 1, 2, 0, 4]
        assert found.tile_offsets.shape == (1, 1)


def test_no_splats_no_lists():
    none = rayfuse.intersect_tiles(
        torch.zeros(2, 0, 2), torch.zeros(2, 0, 2), torch.zeros(2, 0), SIZE, X, Y
    )
    assert none.tiles_per_splat.shape == (2, 0)
    assert none.tile_offsets.tolist() == torch.zeros(2, Y, X).tolist()
    assert none.flatten_ids.shape == (0,)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(radii=torch.ones(2, 1)), ValueError, r"radii must have shape \[2, 2\], got \[2, 1\]"),
        (
            dict(means2d=torch.ones(2, 2).int()),
            TypeError,
            "means2d must be floating point, got int32",
        ),
        (dict(conics=torch.ones(2, 3)), ValueError, "conics and opacities must be given together"),
        (dict(image_ids=torch.zeros(2).long()), ValueError, "images must be given with image_ids"),
        (
            dict(image_ids=torch.zeros(2), images=1),
            TypeError,
            r"image_ids must be integers, got float32",
        ),
        (
            dict(image_ids=torch.zeros(3).long(), images=1),
            ValueError,
            r"image_ids must have shape \[2\], got \[3\]",
        ),
    ],
)
def test_errors_say_what_to_change(changed, error, message):
    args = dict(means2d=torch.ones(2, 2), radii=torch.ones(2, 2), depths=torch.ones(2))
    with pytest.raises(error, match=f"intersect_tiles: {message}"):
        rayfuse.intersect_tiles(**{**args, **changed}, tile_size=8, tile_width=1, tile_height=1)
