"""Neighbours of queries along rays against a loop over what nerfacc's CUDA kernels do."""

import math

import pytest
import torch

import rayfuse
from conftest import DTYPES, EMULATED
from histograms import assert_runs_on, by_reference, histograms, on_threads, sides, spoiled
from rayfuse.domain import csr


def rays_and_queries(R, Q, P, dtype=torch.float32, device="cpu"):
    """Queries beside edges of theirs and where they are; both of some rays missing."""
    edges, _, edge_offsets = histograms(R, Q)
    generator = torch.Generator().manual_seed(1)
    query_offsets = csr.from_uniform(torch.rand(R + 1, generator=generator), P)
    queries = 1.2 * edges.max() * torch.rand(P, generator=generator) - 0.1
    queries[::2] = edges[torch.randint(Q, (len(queries[::2]),), generator=generator)]
    args = edges.to(dtype), edge_offsets, queries.to(dtype), query_offsets
    return [x.to(device) for x in args]


def assert_equal(got, want):
    for ours, right in zip(got, want, strict=True):
        assert torch.equal(ours, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_are_those_of_nerfacc(forced_backend, device, dtype):
    args = rays_and_queries(23, 200, 300, dtype, device)
    left, right = (x.tolist() for x in rayfuse.packed_searchsorted(*args))
    assert_runs_on(forced_backend)
    edges, edge_offsets, queries, query_offsets = (x.tolist() for x in args)
    for r in range(23):
        base, end = edge_offsets[r : r + 2]
        for q in range(*query_offsets[r : r + 2]):
            want = sides(edges, base, end - 1, queries[q]) if end > base else (-1, -1)
            assert (left[q], right[q]) == want, (r, q)


def test_neighbours_may_be_counted_from_the_ray(forced_backend, device):
    args = rays_and_queries(23, 200, 300, device=device)
    ids, of_ray = (rayfuse.packed_searchsorted(*args, from_ray=x) for x in (False, True))
    ray = torch.arange(23, device=device).repeat_interleave(args[3].diff())
    first = torch.where(ids[0] < 0, 0, args[1][ray])
    assert_equal([x + first for x in of_ray], ids)


# nodes of 16 values and their edges, and more of them than are compared one by one
@pytest.mark.parametrize("sizes", [(1, 17, 40), (3, 16, 9), (7, 1500, 1200), (9, 5, 0)], ids=str)
@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, 0.5], ids=str)
def test_any_values_have_the_neighbours_of_the_reference(forced_backend, device, sizes, bad):
    """Also where edges are not in order and the result depends on the way of a search."""
    args = rays_and_queries(*sizes, device=device)
    if bad is not None:
        args[0], _ = spoiled(args[0], args[1], bad)
        args[2][::3] = bad
    want = by_reference(lambda: rayfuse.packed_searchsorted(*args))
    assert_equal(rayfuse.packed_searchsorted(*args), want)


def test_bad_edge_stays_in_its_own_ray(forced_backend, device):
    args = rays_and_queries(23, 200, 300, device=device)
    want = rayfuse.packed_searchsorted(*args)
    args[0], rays = spoiled(args[0], args[1], math.nan)
    others = torch.ones(300, dtype=torch.bool)
    for r in rays:
        others[args[3][r] : args[3][r + 1]] = False
    got = rayfuse.packed_searchsorted(*args)
    assert_equal([x[others] for x in got], [x[others] for x in want])


def test_search_outside_of_the_edges_gives_the_first_twice_or_the_last_two(forced_backend, device):
    edges = torch.tensor([[1.0, 2.0, 3.0]], device=device)
    queries = torch.tensor([[0.0, 3.0, 4.0, math.nan]], device=device)
    left, right = rayfuse.searchsorted(edges, queries)
    assert left.tolist() == [[0, 1, 1, 1]] and right.tolist() == [[0, 2, 2, 2]]


def test_dense_search_is_the_packed_one(forced_backend, device):
    generator = torch.Generator().manual_seed(0)
    edges = torch.rand(2, 3, 5, generator=generator).sort(-1).values.to(device)
    queries = (2 * torch.rand(2, 7, 3, generator=generator) - 0.5).to(device).transpose(1, 2)
    places = torch.arange(7, device=device)
    args = edges.flatten(), 5 * places, queries.flatten(), 7 * places
    want = rayfuse.packed_searchsorted(*args, from_ray=True)
    assert_equal([x.flatten() for x in rayfuse.searchsorted(edges, queries)], want)


def test_types_may_differ(forced_backend, device):
    edges = torch.tensor([[0.0, 0.1, 0.2]], dtype=torch.float64, device=device)
    left, _ = rayfuse.searchsorted(edges, edges.float())
    # float32 rounds 0.1 and 0.2 up
    assert left.tolist() == [[0, 1, 1]]
    left, _ = rayfuse.searchsorted(edges.bfloat16(), edges)
    assert left.tolist() == [[0, 0, 1]]


def test_one_ray_of_very_many_edges_beside_very_many_of_one(forced_backend, device):
    n = 3000 if forced_backend in EMULATED else 1_000_000
    edges = torch.cat([torch.arange(n), torch.arange(100)]).to(device, torch.float64)
    edge_offsets = torch.cat([torch.zeros(1), n + torch.arange(101)]).long().to(device)
    queries = torch.cat([torch.arange(1000) * (n // 1000) + 0.5, torch.arange(100) - 0.5])
    query_offsets = torch.cat([torch.zeros(1), 1000 + torch.arange(101)]).long().to(device)
    left, _ = rayfuse.packed_searchsorted(
        edges, edge_offsets, queries.to(device, torch.float64), query_offsets
    )
    assert left[:1000].tolist() == [*range(0, n // 1000 * 1000, n // 1000)]
    assert left[1000:].tolist() == [n + r for r in range(100)]


def test_threads_share_rays_without_a_trace(forced_backend, device):
    if not forced_backend.startswith("cpu"):
        return
    args = rays_and_queries(3000, 90_000, 60_000)
    one, *more = on_threads(lambda: rayfuse.packed_searchsorted(*args))
    for ids in more:
        assert_equal(ids, one)
    assert_equal(one, by_reference(lambda: rayfuse.packed_searchsorted(*args)))


def test_nothing_is_found_in_nothing(forced_backend, device):
    none, offsets = torch.empty(0, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    some = torch.tensor([0, 0, 1, 1], device=device)
    ids = rayfuse.packed_searchsorted(none, offsets, torch.ones(1, device=device), some)
    assert [x.tolist() for x in ids] == [[-1], [-1]]
    assert rayfuse.packed_searchsorted(none, offsets[:1], none, offsets[:1])[0].shape == (0,)
    assert rayfuse.searchsorted(none.view(0, 2), none.view(0, 3))[0].shape == (0, 3)


def test_raw_op_passes_opcheck_and_compiles(forced_backend, device):
    args = rays_and_queries(5, 40, 30, device=device)
    torch.library.opcheck(torch.ops.rayfuse.packed_searchsorted.default, (*args, True))
    compiled = torch.compile(rayfuse.packed_searchsorted, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*args), rayfuse.packed_searchsorted(*args))


def test_errors_name_the_argument_the_rule_and_the_value(forced_backend, device):
    args = edges, edge_offsets, queries, query_offsets = rays_and_queries(3, 10, 8, device=device)
    calls = (
        ("edges must be floating point, got int64", TypeError, (edges.long(), *args[1:])),
        (
            "query_offsets must have length 4 like edge_offsets, got 2",
            ValueError,
            (*args[:3], query_offsets[::3]),
        ),
        (
            "edge_offsets must be an int64 tensor, got int32",
            TypeError,
            (edges, edge_offsets.int(), queries, query_offsets),
        ),
        (
            "edge_offsets must rise from 0 to the number of samples, got 9 at [3]",
            ValueError,
            (edges, edge_offsets.clamp(max=9), queries, query_offsets),
        ),
        (
            "query_offsets must rise from 0 to the number of samples, got 7 at [3]",
            ValueError,
            (*args[:3], query_offsets.clamp(max=7)),
        ),
    )
    # a GPU's values are looked at when asked for
    debug = device != "cpu" or forced_backend in EMULATED
    for message, error, wrong in calls:
        with rayfuse.debug(debug), pytest.raises(error) as raised:
            rayfuse.packed_searchsorted(*wrong)
        assert str(raised.value) == f"packed_searchsorted: {message}"
    with pytest.raises(ValueError, match="searchsorted: queries must have the leading dimensions"):
        rayfuse.searchsorted(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(
        ValueError, match="searchsorted: queries must be on cpu like edges, got meta"
    ):
        rayfuse.searchsorted(torch.ones(2, 3), torch.ones(2, 3, device="meta"))


def test_wrong_offsets_do_not_lead_out_of_bounds(forced_backend, device):
    """Where a look at them would synchronise, so that none is taken."""
    if forced_backend not in ("cuda", "simt"):
        return
    edges, edge_offsets, queries, query_offsets = rays_and_queries(3, 10, 8, device=device)
    wrong = torch.tensor([3, -5, 200, 6], device=device)
    for offsets in ((edge_offsets, wrong), (wrong, query_offsets)):
        ids = rayfuse.packed_searchsorted(edges, offsets[0], queries, offsets[1])
        assert all((x >= -1).all() and (x < 10).all() for x in ids)


def test_search_and_interlevel_bound_agree(forced_backend, device):
    """w_outer of the dense op with the rule of nerfacc's kernels, from ids and a cdf."""
    samples = rayfuse.outer_bound.op.sample((4,), torch.float64, S=9, E=6)
    t, t_env, w_env = (x.to(device) for x in samples)
    cdf = torch.cat([torch.zeros_like(w_env[:, :1]), w_env.cumsum(-1)], -1)
    left, right = rayfuse.searchsorted(t_env, t)
    got = cdf.gather(1, right[:, 1:]) - cdf.gather(1, left[:, :-1])
    want = rayfuse.outer_bound(t, t_env, w_env, outside="below_zero")
    torch.testing.assert_close(got, want)
