"""Samples of histograms along rays, and intervals around them, against a loop over what nerfacc's
CUDA kernels do."""

import itertools
import math

import pytest
import torch

import rayfuse
from conftest import DTYPES, EMULATED
from histograms import assert_runs_on, by_reference, histograms, on_threads, sides, spoiled


def sample(edges, cdf, base, last, n, bias):
    """Samples of one ray, in the arithmetic of its dtype."""
    samples = []
    step = (cdf[last] - cdf[base]) / n
    for i in range(n):
        u = cdf[base] + (i + bias) * step
        left, right = sides(cdf, base, last, u)
        if cdf[right] - cdf[left] < 1e-10:
            samples.append((edges[left] + edges[right]) * 0.5)
        else:
            scaling = (edges[right] - edges[left]) / (cdf[right] - cdf[left])
            samples.append((u - cdf[left]) * scaling + edges[left])
    return samples


def intervals(samples, t_min, t_max):
    """Their edges, of one ray."""
    if len(samples) == 1:
        return [t_min, t_max]
    middles = [(a + b) * 0.5 for a, b in itertools.pairwise(samples)]
    first = samples[0] - (samples[1] - samples[0]) * 0.5
    last = samples[-1] + (samples[-1] - samples[-2]) * 0.5
    return [first.maximum(t_min), *middles, last.minimum(t_max)]


R, Q = 23, 200


def cases(R, Q, most, dtype=torch.float32, device="cpu", seed=0):
    """A histogram, and how many samples each ray gets."""
    args = *histograms(R, Q, dtype, seed), (7 * torch.arange(R)) % (most + 1)
    return [x.to(device) for x in args]


def both(args, stratified=True):
    """t, new_edges and their offsets."""
    draws = rayfuse.packed_importance_samples, rayfuse.packed_importance_sampling
    # random numbers are drawn where the histogram is
    device = args[0].device
    return [
        x
        for draw in draws
        for x in draw(
            *args, stratified=stratified, generator=torch.Generator(device).manual_seed(2)
        )
    ]


def assert_equal(got, want):
    """To the bit."""
    for ours, right in zip(got, want, strict=True):
        assert ours.dtype == right.dtype
        assert torch.equal(ours.nan_to_num(nan=-1e30), right.nan_to_num(nan=-1e30))


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_and_their_intervals_are_those_of_nerfacc(
    forced_backend, device, dtype, stratified
):
    args = edges, cdf, offsets, counts = cases(R, Q, 5, dtype, device)
    t, t_offsets, new_edges, new_offsets = both(args, stratified)
    assert_runs_on(forced_backend)
    bias = torch.full((R,), 0.5, dtype=dtype)
    if stratified:
        generator = torch.Generator(device).manual_seed(2)
        bias = torch.rand(R, generator=generator, dtype=dtype, device=device).cpu()
    edges, cdf, offsets, t, new_edges = (x.cpu() for x in (edges, cdf, offsets, t, new_edges))
    for r in range(R):
        base, end = offsets[r].item(), offsets[r + 1].item()
        n = counts[r].item() if end > base else 0
        assert t_offsets[r + 1] - t_offsets[r] == n
        assert new_offsets[r + 1] - new_offsets[r] == (n + 1 if n else 0)
        if n:
            want = sample(edges, cdf, base, end - 1, n, bias[r])
            # the quotient may come before or after the product
            torch.testing.assert_close(t[t_offsets[r] : t_offsets[r + 1]], torch.stack(want))
            want = intervals(want, edges[base], edges[end - 1])
            own = new_edges[new_offsets[r] : new_offsets[r + 1]]
            torch.testing.assert_close(own, torch.stack(want))
            assert (own.diff() >= 0).all()
            assert own[0] >= edges[base] and own[-1] <= edges[end - 1]


# nodes of 16 edges, registers of samples, more of both than a warp, or one comparison each, serves
@pytest.mark.parametrize("sizes", [(R, Q, 40), (3, 50, 17), (7, 1500, 1400)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_are_the_references_to_the_bit(forced_backend, device, dtype, sizes):
    """So that none lies in another bin, and all backends train alike."""
    if forced_backend in EMULATED and dtype != torch.float32 and sizes[1] > Q:
        return
    args = cases(*sizes, dtype, device)
    got = both(args)
    assert_equal(got, by_reference(lambda: both(args)))
    assert got[0].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.5], ids=str)
def test_bad_values_are_the_references_and_stay_in_their_own_ray(forced_backend, device, bad):
    clean = cases(R, Q, 9, device=device)
    want = both(clean)
    for i in range(2):
        args = [*clean]
        args[i], rays = spoiled(args[i], args[2], bad)
        got = both(args)
        assert_equal(got, by_reference(lambda: both(args)))  # noqa: B023
        for k in (0, 2):
            others = torch.ones(len(got[k]), dtype=torch.bool)
            for r in rays:
                others[got[k + 1][r] : got[k + 1][r + 1]] = False
            assert torch.equal(got[k][others], want[k][others])


def test_a_jitter_is_the_same_for_all_samples_of_a_ray():
    edges = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(50)
    t, _ = rayfuse.packed_importance_samples(edges, edges, torch.arange(51) * 2, 4, stratified=True)
    t = t.view(50, 4)
    torch.testing.assert_close(t.diff(), torch.full((50, 3), 0.25, dtype=t.dtype))
    assert t[:, 0].std() > 0.01


def test_a_single_interval_is_all_of_the_histogram(forced_backend, device):
    edges, cdf = torch.tensor([[[1.0, 2.0, 5.0]], [[0.0, 0.9, 1.0]]], device=device)
    assert rayfuse.importance_sampling(edges, cdf, 1).tolist() == [[1.0, 5.0]]


def test_samples_are_in_order_within_the_edges(forced_backend, device):
    """Just below an edge of the cdf a rounding would lead beyond that of the bin."""
    u = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0)).to(device)
    edges = torch.stack([-u[0], 1e-3 * u[1], 1e-3 * u[1]], -1)
    # where the cdf is to be, exactly, and the next number above it
    wanted = torch.arange(1000, device=device) * 2.0**-23
    above, one = torch.nextafter(wanted, wanted + 1), torch.ones_like(wanted)
    cdf, bias = torch.stack([-one, above, one], -1), (1 + wanted) / 2
    offsets = torch.arange(1001, device=device)
    draw = torch.ops.rayfuse.packed_importance_samples
    t = draw(edges.flatten(), cdf.flatten(), 3 * offsets, bias, offsets, 1000, False)
    assert (t >= edges[:, 0]).all() and (t <= edges[:, 1]).all()


def test_a_cdf_without_a_rise_gives_the_middle_of_a_bin(forced_backend, device):
    edges, cdf = torch.tensor([[1.0, 2.0, 5.0], [0.3, 0.3, 0.3]], device=device)
    offsets = torch.tensor([0, 3], device=device)
    t, _ = rayfuse.packed_importance_samples(edges, cdf, offsets, 3)
    assert t.tolist() == [3.5, 3.5, 3.5]
    # a rise of less than 1e-10 is none
    for rise, want in ((0.9e-10, [3.5, 3.5]), (1.1e-10, [2.75, 4.25])):
        cdf = torch.tensor([0.0, rise], device=device)
        t, _ = rayfuse.packed_importance_samples(edges[1:], cdf, offsets.clamp(max=2), 2)
        torch.testing.assert_close(t.tolist(), want)


def test_dense_sampling_is_the_packed_one_and_has_no_gradient(forced_backend, device):
    generator = torch.Generator().manual_seed(0)
    edges, cdf = torch.rand(2, 2, 9, 3, generator=generator).sort(-2).values.to(device)
    edges, cdf = (x.transpose(-1, -2).requires_grad_() for x in (edges, cdf))
    got = rayfuse.importance_sampling(edges, cdf, 4)
    assert got.shape == (2, 3, 5) and not got.requires_grad
    packed = edges.flatten(), cdf.flatten(), 9 * torch.arange(7, device=device)
    want, _ = rayfuse.packed_importance_sampling(*packed, 4)
    assert torch.equal(got.flatten(), want)
    got = rayfuse.importance_samples(edges, cdf, 4)
    assert got.shape == (2, 3, 4)
    assert torch.equal(got.flatten(), rayfuse.packed_importance_samples(*packed, 4)[0])


def test_intervals_are_those_around_the_samples(forced_backend, device):
    args = cases(R, Q, 9, device=device)
    t, offsets, new_edges, new_offsets = both(args)
    ends = (args[0][i.clamp(0, Q - 1)] for i in (args[2][:-1], args[2][1:] - 1))
    assert_equal(rayfuse.packed_intervals_around(t, offsets, *ends), (new_edges, new_offsets))


def test_types_may_differ(forced_backend, device):
    edges, cdf, offsets, counts = cases(R, Q, 5, device=device)
    mixed = both([edges.double(), cdf, offsets, counts])
    assert_equal(mixed, both([edges.double(), cdf.double(), offsets, counts]))


def test_one_ray_of_very_many_edges_beside_very_many_of_one(forced_backend, device):
    n, rays = (3000, 40) if forced_backend in EMULATED else (1_000_000, 300_000)
    edges = torch.cat([torch.arange(n), torch.arange(rays)]).to(device, torch.float64)
    offsets = torch.cat([torch.zeros(1), n + torch.arange(rays + 1)]).long().to(device)
    counts = torch.ones(rays + 1, dtype=torch.int64, device=device)
    counts[0] = n - 1
    t, _ = rayfuse.packed_importance_samples(edges, edges, offsets, counts)
    steps = torch.arange(n - 1, device=device) + 0.5
    torch.testing.assert_close(t[: n - 1], steps.double(), rtol=0, atol=1e-6)
    assert torch.equal(t[n - 1 :], edges[n:])


def test_threads_share_rays_without_a_trace(forced_backend, device):
    if not forced_backend.startswith("cpu"):
        return
    args = cases(3000, 90_000, 60)
    one, *more = on_threads(lambda: both(args))
    for results in more:
        assert_equal(results, one)
    assert_equal(one, by_reference(lambda: both(args)))


def test_nothing_comes_of_nothing(forced_backend, device):
    none, offsets = torch.empty(0, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    new_edges, new_offsets = rayfuse.packed_importance_sampling(none, none, offsets, 5)
    assert len(new_edges) == 0 and new_offsets.tolist() == [0, 0, 0, 0]
    rows = none.view(0, 3)
    assert rayfuse.importance_sampling(rows, rows, 2).shape == (0, 3)


def test_raw_op_passes_opcheck_and_compiles(forced_backend, device):
    edges, cdf, edge_offsets, _ = cases(5, 40, 3, device=device)
    bias, offsets = torch.rand(5, device=device), 3 * torch.arange(6, device=device)
    full = edge_offsets.new_tensor([0, 8, 16, 24, 32, 40])
    for intervals in (False, True):
        args = edges, cdf, full, bias, offsets, 15, intervals
        torch.library.opcheck(torch.ops.rayfuse.packed_importance_samples.default, args)
    rows = edges.view(5, 8), cdf.view(5, 8)
    compiled = torch.compile(rayfuse.importance_sampling, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*rows, 4), rayfuse.importance_sampling(*rows, 4))


def test_raw_op_without_edges_or_samples_gives_nan(forced_backend, device):
    """What no function asks of the kernels must not lead them out of bounds."""
    if forced_backend in ("ref", "triton"):
        return
    raw = torch.ops.rayfuse.packed_importance_samples
    x, bias = torch.ones(2, device=device), torch.ones(1, device=device)
    empty, two, one = (torch.tensor([0, n], device=device) for n in (0, 2, 1))
    assert raw(x[:0], x[:0], empty, bias, two, 2, False).isnan().all()
    assert raw(x, x, two, bias, one, 1, True).isnan().all()


def test_errors_name_the_argument_the_rule_and_the_value(forced_backend, device):
    edges, cdf, offsets, _ = cases(3, 10, 3, device=device)
    calls = (
        ("edges must be floating point, got int64", TypeError, (edges.long(), cdf, offsets, 2)),
        ("cdf must have length 10 like edges, got 9", ValueError, (edges, cdf[1:], offsets, 2)),
        (
            "edge_offsets must be an int64 tensor, got int32",
            TypeError,
            (edges, cdf, offsets.int(), 2),
        ),
        (
            "edge_offsets must rise from 0 to the number of samples, got 9 at [3]",
            ValueError,
            (edges, cdf, offsets.clamp(max=9), 2),
        ),
        ("counts must be >= 0, got -1", ValueError, (edges, cdf, offsets, -1)),
        (
            "counts must be an integer, or an int64 tensor, got float",
            TypeError,
            (edges, cdf, offsets, 2.0),
        ),
    )
    # a GPU's values are looked at when asked for
    debug = device != "cpu" or forced_backend in EMULATED
    for message, error, args in calls:
        with rayfuse.debug(debug), pytest.raises(error) as raised:
            rayfuse.packed_importance_samples(*args)
        assert str(raised.value) == f"packed_importance_samples: {message}"
    with pytest.raises(ValueError, match="importance_sampling: count must be > 0, got 0"):
        rayfuse.importance_sampling(torch.ones(2, 3), torch.ones(2, 3), 0)


@pytest.mark.parametrize("compiled", [False, True])
def test_samples_carry_no_gradient(compiled):
    edges, cdf = (torch.tensor(x, requires_grad=True) for x in ([0.0, 1.0, 2.0], [0.0, 0.5, 1.0]))
    draw = rayfuse.importance_samples
    call = torch.compile(draw, backend="aot_eager") if compiled else draw
    t = call(edges, cdf, 4)
    assert not t.requires_grad
    assert t.tolist() == [0.25, 0.75, 1.25, 1.75]
