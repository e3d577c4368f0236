"""Lists of tiles against a loop over all splats and pixels, on every backend."""

import itertools
import math

import pytest
import torch

import rayfuse
from rayfuse.backend import isas

SIZE, X, Y = 8, 5, 4
LIMIT = 255


@pytest.fixture(autouse=True)
def ran(request):
    """The backend that was forced is the one that ran."""
    if "forced_backend" not in request.fixturenames:
        yield
        return
    name = request.getfixturevalue("forced_backend")
    if name == "triton":
        pytest.skip("PyTorch stands for triton in lookups")
    yield
    assert rayfuse.last_backend() == name


def splats(device="cpu", images=2, N=40, seed=0, dtype=torch.float32):
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
    means2d, depths, conics, opacities = (x.to(device, dtype) for x in values)
    return means2d, radii.to(device), depths, conics, opacities


def intersect(means2d, radii, depths, conics=None, opacities=None, grid=(SIZE, X, Y), **named):
    return rayfuse.intersect_tiles(
        *(means2d, radii, depths, *grid), conics=conics, opacities=opacities, **named
    )


def same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_are_those_of_a_loop_and_front_to_back(device, dtype):
    means2d, radii, depths, *_ = splats(device, dtype=dtype)
    found = intersect(means2d, radii, depths)
    want = []
    for image, values in enumerate(zip(means2d, radii, depths, strict=True)):
        want += [[i + image * len(depths[0]) for i in tile] for tile in boxes(*values)]
    assert as_lists(found) == want
    counts = torch.bincount(found.flatten_ids, minlength=depths.numel())
    assert found.tiles_per_splat.flatten().tolist() == counts.tolist()
    dtypes = found.tiles_per_splat.dtype, found.flatten_ids.dtype, found.tile_offsets.dtype
    assert dtypes == (torch.int32, torch.int64, torch.int64)
    assert found.tile_offsets.shape == (2, Y, X)


def test_packed_splats_have_the_lists_of_dense_ones(device):
    given = splats(device)
    dense = intersect(*given)
    kept = (given[1] > 0).all(-1)
    image, index = kept.nonzero().unbind(-1)
    packed = intersect(*(x[kept] for x in given), image_ids=image, images=2)
    assert torch.equal((image * kept.shape[1] + index)[packed.flatten_ids], dense.flatten_ids)
    assert torch.equal(packed.tile_offsets, dense.tile_offsets)
    assert torch.equal(packed.tiles_per_splat, dense.tiles_per_splat[kept])


def test_a_splat_of_no_image_is_in_no_list(device):
    given = [x[0] for x in splats(device, 1, 8)]
    given[1][:] = 3
    image = torch.tensor([0, 1, 0, -1, 2, 1, 0, 2**40], device=device)
    found = intersect(*given, image_ids=image, images=2)
    kept = (image >= 0) & (image < 2)
    wanted = intersect(*(x[kept] for x in given), image_ids=image[kept], images=2)
    assert torch.equal(kept.nonzero()[:, 0][wanted.flatten_ids], found.flatten_ids)
    assert torch.equal(found.tile_offsets, wanted.tile_offsets)
    assert not found.tiles_per_splat[~kept].any()


@pytest.mark.parametrize("seed", range(3))
def test_ellipses_are_listed_where_a_pixel_meets_them(device, seed):
    given = splats(device, 1, 100, seed, torch.float64)
    box, exact = intersect(*given[:3]), intersect(*given)
    means2d, _, _, conics, opacities = (x.cpu() for x in given)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ellipses_are_listed_as_in_pytorch(device, dtype):
    given = splats(device, 2, 150, 4, dtype)
    with rayfuse.use_backend("ref"):
        wanted = intersect(*given)
    found = intersect(*given)
    found_pairs, wanted_pairs = (
        {(tile, i) for tile, ids in enumerate(as_lists(lists)) for i in ids}
        for lists in (found, wanted)
    )
    means2d, _, _, conics, opacities = (x.flatten(0, 1).double().cpu() for x in given)
    # where products are fused with sums, sigma may be rounded to the other side of the slack
    for tile, i in found_pairs ^ wanted_pairs:
        corner = SIZE * torch.tensor([tile % X, tile // X % Y])
        along = torch.linspace(0.5, SIZE - 0.5, 2000, dtype=torch.float64)
        sides = [torch.stack([along, torch.full_like(along, end)], -1) for end in (0.5, SIZE - 0.5)]
        dx, dy = (torch.cat([*sides, *(x.flip(-1) for x in sides)]) + corner - means2d[i]).unbind(1)
        a, b, c = conics[i]
        sigma = (0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy).min()
        assert 0.9e-4 < sigma - (LIMIT * opacities[i]).log() < 1.1e-4
    if found_pairs == wanted_pairs:
        same(found, wanted)


def test_images_are_the_same_to_the_bit(device):
    means2d, radii, depths, conics, opacities = splats(device, 1, 60)
    colors = torch.rand(1, 60, 3, device=device)
    images = []
    for ellipse in ((), (conics, opacities)):
        _, ids, offsets = intersect(means2d, radii, depths, *ellipse)
        image = rayfuse.composite_tiles(
            *(means2d, conics, colors, opacities, offsets, ids),
            image_width=SIZE * X,
            image_height=SIZE * Y,
            tile_size=SIZE,
        )
        images.append(image.colors)
    assert torch.equal(*images)


@pytest.mark.parametrize("broken", ["radii", "means2d", "depths", "conics", "opacities"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_in_no_list(device, broken, value):
    if (broken, value) == ("opacities", math.inf):
        pytest.skip("it is above every threshold")
    given = dict(
        zip(
            ("means2d", "radii", "depths", "conics", "opacities"), splats(device, 1, 9), strict=True
        )
    )
    given["radii"] = torch.full_like(given["means2d"], 3)
    wanted = [[i for i in tile if i != 2] for tile in as_lists(intersect(**given))]
    given[broken][0, 2] = value
    assert as_lists(intersect(**given)) == wanted


def test_what_is_culled_is_not_read(device):
    given = splats(device, 1, 9)
    given[1][:] = 3
    wanted = [[i for i in tile if i != 1] for tile in as_lists(intersect(*given))]
    for radius in ([0, 0], [0, 3], [3, -1]):
        given[1][0, 1] = torch.tensor(radius)
        for x in (given[0], *given[2:]):
            x[0, 1] = math.nan
        assert as_lists(intersect(*given)) == wanted


def test_depths_may_be_negative_equal_or_of_half_precision(device):
    depths = torch.tensor([1.0, -2.0, 0.0, -0.0, -3.0, 1.0, 2.0, 0.0], device=device)
    means2d = torch.full((8, 2), 4.0, device=device)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = intersect(means2d, torch.ones_like(means2d), depths.to(dtype), grid=(SIZE, 1, 1))
        # both zeros are one
        assert found.flatten_ids.tolist() == [4, 1, 2, 3, 7, 0, 5, 6]
        assert found.tile_offsets.shape == (1, 1)
        assert found.tiles_per_splat.tolist() == [1] * 8


def test_depths_are_sorted_whatever_bits_differ(device):
    # each digit of the sort, and many at once
    depths = torch.cat([2.0 ** torch.arange(-20, 20), 1 + 2.0 ** -torch.arange(1, 24)])
    depths = depths[torch.randperm(len(depths), generator=torch.Generator().manual_seed(0))]
    for dtype in (torch.float32, torch.float64):
        means2d = torch.full((len(depths), 2), 4.0, device=device, dtype=dtype)
        given = means2d, torch.ones_like(means2d), depths.to(device, dtype)
        found = intersect(*given, grid=(SIZE, 1, 1))
        assert found.flatten_ids.tolist() == depths.sort(stable=True).indices.tolist()


@pytest.mark.parametrize("radius", [1e3, 1e30])
@pytest.mark.parametrize("grid", [(SIZE, 9, 5), (SIZE, 70, 1), (SIZE, 1, 40), (1, 3, 3)])
def test_one_splat_over_all_tiles(device, radius, grid):
    _, columns, rows = grid
    tiles = columns * rows
    means2d = torch.tensor([[[4.0, 4.0], [4.0, 4.0]]] * 2, device=device)
    radii = torch.tensor([[[1.0, 1.0], [radius, radius]]] * 2, device=device)
    depths = torch.tensor([[1.0, 2.0]] * 2, device=device)
    wide = torch.tensor([1e-8, 0.0, 1e-8], device=device).expand(2, 2, 3)
    for ellipse in ((), (wide, torch.ones(2, 2, device=device))):
        found = intersect(means2d, radii, depths, *ellipse, grid=grid)
        assert found.tiles_per_splat[:, 1].tolist() == [tiles, tiles]
        lists = as_lists(found)
        assert [tile[-1] for tile in lists] == [1] * tiles + [3] * tiles


def test_no_splats_or_no_tiles_no_lists(device):
    none = intersect(*(torch.zeros(2, 0, *inner, device=device) for inner in ((2,), (2,), ())))
    assert none.tiles_per_splat.shape == (2, 0)
    assert none.tile_offsets.tolist() == torch.zeros(2, Y, X).tolist()
    assert none.flatten_ids.shape == (0,)
    for grid in ((SIZE, 0, 3), (SIZE, 3, 0)):
        none = intersect(*splats(device), grid=grid)
        assert none.tile_offsets.shape == (2, grid[2], grid[1])
        assert none.flatten_ids.shape == (0,)
        assert not none.tiles_per_splat.any()
    none = intersect(*(x[:0] for x in splats(device)))
    assert none.tile_offsets.shape == (0, Y, X)


def test_layouts_do_not_matter_and_nothing_changes(device):
    given = splats(device)
    wanted = intersect(*given)
    strided = [torch.stack([x, x], 1)[:, 1] for x in given]
    assert not any(x.is_contiguous() for x in strided)
    before = [x.clone() for x in strided]
    same(intersect(*strided), wanted)
    # radii of a circle, as diff-gaussian-rasterization has them
    circles = given[1][..., :1].expand(-1, -1, 2)
    same(intersect(given[0], circles, *given[2:]), intersect(given[0], circles + 0, *given[2:]))
    same(strided, before)


def test_lists_have_no_gradient(device):
    given = splats(device)
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in given]
    assert not any(x.requires_grad for x in intersect(*leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("isa", isas())
def test_many_blocks_and_threads_make_the_lists_of_one(isa, dtype):
    means2d, radii, depths, conics, opacities = splats("cpu", 3, 6000, dtype=dtype)
    depths = depths + 0.1 * torch.rand(3, 6000)
    threads = torch.get_num_threads()
    for ellipse in ((), (conics, opacities)):
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with rayfuse.use_backend(f"cpu.{isa}"):
                found.append(intersect(means2d, radii, depths, *ellipse))
        torch.set_num_threads(threads)
        same(found[1], found[0])
        same(found[2], found[0])
        if not ellipse:
            with rayfuse.use_backend("ref"):
                same(found[0], intersect(means2d, radii, depths))


@pytest.mark.parametrize("packed", [False, True])
def test_it_is_an_op_that_compilers_trace(device, packed):
    given = splats(device)
    named = {}
    if packed:
        given = [x.flatten(0, 1) for x in given]
        image = torch.arange(2, device=device).repeat_interleave(40)
        named = dict(image_ids=image, images=2)

    def twice_the_ids(*given):
        lists = intersect(*given, **named)
        return lists.flatten_ids * 2, lists.tiles_per_splat, lists.tile_offsets

    compiled = torch.compile(twice_the_ids, fullgraph=True, backend="aot_eager")
    same(compiled(*given), twice_the_ids(*given))


def test_opcheck(device):
    means2d, radii, depths, conics, opacities = (x.flatten(0, 1) for x in splats(device))
    args = means2d, radii.to(means2d.dtype), depths, conics, opacities, None
    torch.library.opcheck(torch.ops.rayfuse.intersect_tiles, (*args, 2, SIZE, X, Y, 0.5))


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
        (dict(tile_size=0), ValueError, "tile_size must be > 0, got 0"),
        (dict(tile_width=-1), ValueError, "tile_width must be between 0 and 16777216, got -1"),
        (dict(tile_height=2**24 + 1), ValueError, "tile_height must be between 0 and 16777216"),
        (
            dict(tile_width=2**16, tile_height=2**15),
            ValueError,
            "tiles of all images must be 2147483647 at most, got 2147483648",
        ),
    ],
)
def test_errors_say_what_to_change(changed, error, message):
    args = dict(means2d=torch.ones(2, 2), radii=torch.ones(2, 2), depths=torch.ones(2))
    args |= dict(tile_size=8, tile_width=1, tile_height=1)
    with pytest.raises(error, match=f"intersect_tiles: {message}"):
        rayfuse.intersect_tiles(**{**args, **changed})
