"""Histograms along rays against a loop over what nerfacc's CUDA kernels do, thread by thread."""

import itertools
import math

import pytest
import torch

import rayfuse
from rayfuse import pdf
from rayfuse.domain import csr, csr_env


def upper_bound(values, begin, end, x):
    while begin < end:
        middle = begin + (end - begin) // 2
        if not values[middle] > x:
            begin = middle + 1
        else:
            end = middle
    return begin


def sides(values, base, last, x):
    p = upper_bound(values, base, last, x)
    return max(min(p - 1, last), base), max(min(p, last), base)


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


def histograms(R, Q, seed=0):
    """Edges and a cdf of ragged rays, with coincident edges and flat bins; offsets."""
    u = torch.rand(3, Q + R + 1, generator=torch.Generator().manual_seed(seed))
    offsets = csr_env.from_uniform(u[0, : R + 1], Q)
    edges, cdf = torch.empty(Q), torch.empty(Q)
    for begin, end in offsets.unfold(0, 2, 1).tolist():
        for values, steps in ((edges, u[1]), (cdf, u[2])):
            values[begin:end] = ((steps[begin:end] - 0.4).clamp(min=0)).cumsum(0) + steps[begin]
    return edges, cdf, offsets


R, Q = 23, 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_search_finds_the_indices_of_nerfacc(dtype):
    edges, _, edge_offsets = histograms(R, Q)
    generator = torch.Generator().manual_seed(1)
    query_offsets = csr.from_uniform(torch.rand(R + 1, generator=generator), 300)
    queries = 6 * torch.rand(300, generator=generator) - 1
    # where edges are as well
    queries[::2] = edges[torch.randint(Q, (150,), generator=generator)]
    edges, queries = edges.to(dtype), queries.to(dtype)
    got = pdf.packed_searchsorted(edges, edge_offsets, queries, query_offsets)
    for r in range(R):
        base, end = edge_offsets[r].item(), edge_offsets[r + 1].item()
        for q in range(query_offsets[r], query_offsets[r + 1]):
            want = sides(edges, base, end - 1, queries[q]) if end > base else (-1, -1)
            assert (got[0][q].item(), got[1][q].item()) == want, (r, q)


def test_search_outside_of_the_edges_gives_the_first_twice_or_the_last_two():
    edges, queries = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 3.0, 4.0, math.nan]])
    left, right = pdf.searchsorted(edges, queries)
    assert left.tolist() == [[0, 1, 1, 1]] and right.tolist() == [[0, 2, 2, 2]]


def test_dense_search_is_the_packed_one():
    generator = torch.Generator().manual_seed(0)
    edges = torch.rand(2, 3, 5, generator=generator).sort(-1).values
    queries = 2 * torch.rand(2, 3, 7, generator=generator) - 0.5
    places = torch.arange(7)
    want = pdf.packed_searchsorted(edges.flatten(), 5 * places, queries.flatten(), 7 * places)
    for ours, flat in zip(pdf.searchsorted(edges, queries), want, strict=True):
        assert torch.equal(ours.flatten() + 5 * torch.arange(6).repeat_interleave(7), flat)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_and_their_intervals_are_those_of_nerfacc(dtype, stratified):
    edges, cdf, offsets = histograms(R, Q)
    edges, cdf = edges.to(dtype), cdf.to(dtype)
    counts = torch.arange(R) % 6
    options = dict(stratified=stratified, generator=torch.Generator().manual_seed(2))
    t, t_offsets = pdf.packed_importance_samples(edges, cdf, offsets, counts, **options)
    generator = torch.Generator().manual_seed(2)
    options["generator"] = torch.Generator().manual_seed(2)
    new_edges, new_offsets = pdf.packed_importance_sampling(edges, cdf, offsets, counts, **options)
    bias = torch.full((R,), 0.5, dtype=dtype)
    if stratified:
        bias = torch.rand(R, generator=generator, dtype=dtype)
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


def test_a_jitter_is_the_same_for_all_samples_of_a_ray():
    edges = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(50)
    t, _ = pdf.packed_importance_samples(edges, edges, torch.arange(51) * 2, 4, stratified=True)
    t = t.view(50, 4)
    torch.testing.assert_close(t.diff(), torch.full((50, 3), 0.25, dtype=t.dtype))
    assert t[:, 0].std() > 0.01


def test_a_single_interval_is_all_of_the_histogram():
    edges, cdf = torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([[0.0, 0.9, 1.0]])
    assert pdf.importance_sampling(edges, cdf, 1).tolist() == [[1.0, 5.0]]


def test_a_cdf_without_a_rise_gives_the_middle_of_a_bin():
    edges, cdf = torch.tensor([1.0, 2.0, 5.0]), torch.full((3,), 0.3)
    t, _ = pdf.packed_importance_samples(edges, cdf, torch.tensor([0, 3]), 3)
    assert t.tolist() == [3.5, 3.5, 3.5]


def test_dense_sampling_is_the_packed_one_and_has_no_gradient():
    generator = torch.Generator().manual_seed(0)
    edges, cdf = torch.rand(2, 2, 3, 9, generator=generator).sort(-1).values.requires_grad_()
    got = pdf.importance_sampling(edges, cdf, 4)
    assert got.shape == (2, 3, 5) and not got.requires_grad
    want, _ = pdf.packed_importance_sampling(edges.flatten(), cdf.flatten(), 9 * torch.arange(7), 4)
    assert torch.equal(got.flatten(), want)


def test_nothing_comes_of_nothing():
    none, offsets = torch.empty(0), torch.zeros(4, dtype=torch.int64)
    new_edges, new_offsets = pdf.packed_importance_sampling(none, none, offsets, 5)
    assert len(new_edges) == 0 and new_offsets.tolist() == [0, 0, 0, 0]
    left, right = pdf.packed_searchsorted(none, offsets, torch.ones(1), torch.tensor([0, 0, 1, 1]))
    assert left.tolist() == right.tolist() == [-1]
    assert pdf.importance_sampling(torch.empty(0, 3), torch.empty(0, 3), 2).shape == (0, 3)


def test_errors_name_the_argument_the_rule_and_the_value():
    edges, cdf, offsets = histograms(3, 10)
    calls = (
        ("edges must be floating point, got int64", TypeError, (edges.long(), cdf, offsets, 2)),
        ("cdf must have length 10 like edges, got 9", ValueError, (edges, cdf[1:], offsets, 2)),
        (
            "edge_offsets must be an int64 tensor, got int32",
            TypeError,
            (edges, cdf, offsets.int(), 2),
        ),
        (
            "edge_offsets must rise from 0 to the number of samples, got 9 at",
            ValueError,
            (edges, cdf, offsets.clamp(max=9), 2),
        ),
        ("counts must be >= 0, got -1", ValueError, (edges, cdf, offsets, -1)),
        ("counts must be an integer, or an int64 tensor", TypeError, (edges, cdf, offsets, 2.0)),
    )
    for message, error, args in calls:
        with pytest.raises(error) as raised:
            pdf.packed_importance_sampling(*args)
        assert message in str(raised.value)
    with pytest.raises(ValueError, match="searchsorted: queries must have the leading dimensions"):
        pdf.searchsorted(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="importance_sampling: count must be > 0, got 0"):
        pdf.importance_sampling(torch.ones(2, 3), torch.ones(2, 3), 0)


def test_search_and_interlevel_bound_agree():
    """w_outer of the dense op with the rule of nerfacc's kernels, from ids and a cdf."""
    t, t_env, w_env = rayfuse.outer_bound.op.sample((4,), torch.float64, S=9, E=6)
    cdf = torch.cat([torch.zeros(4, 1, dtype=w_env.dtype), w_env.cumsum(-1)], -1)
    left, right = pdf.searchsorted(t_env, t)
    got = cdf.gather(1, right[:, 1:]) - cdf.gather(1, left[:, :-1])
    want = rayfuse.outer_bound(t, t_env, w_env, outside="below_zero")
    torch.testing.assert_close(got, want)
