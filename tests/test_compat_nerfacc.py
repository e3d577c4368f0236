"""nerfacc by its own names: the same values and gradients, and those that it gets wrong."""

import functools
import inspect
import json
import re
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

from rayfuse.compat import nerfacc as ours
from rayfuse.compat.nerfacc import losses
from test_compat_nerfstudio import imported, needs_nerfstudio

ROOT = Path(__file__).parent.parent
# samples of each ray: empty ones in between and at the end
COUNTS = (3, 0, 5, 1, 0)
R, P = len(COUNTS), sum(COUNTS)
INFO = torch.tensor([[sum(COUNTS[:r]), n] for r, n in enumerate(COUNTS)])
RAY_INDICES = torch.arange(R).repeat_interleave(torch.tensor(COUNTS))
WAYS = {"packed_info": {"packed_info": INFO}, "ray_indices": {"ray_indices": RAY_INDICES}}
SCANS = ("inclusive_sum", "exclusive_sum", "inclusive_prod", "exclusive_prod")


@pytest.fixture
def theirs():
    """The published package, of which what is in PyTorch runs without a GPU."""
    return pytest.importorskip("nerfacc")


def leaves(*shape, count=1, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return [y.requires_grad_() for y in x.unbind(0)]


def with_gradients(outputs, inputs):
    """Outputs and the gradients of a weighted sum of them; a missing one is 0."""
    outputs = [*outputs] if isinstance(outputs, tuple) else [outputs]
    d = [torch.linspace(0.5, 1, y.numel(), dtype=y.dtype).view_as(y) for y in outputs]
    found = torch.autograd.grad(
        outputs, inputs, d, allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return [y.detach() for y in outputs], found


def each_ray(function, *packed, dim=0):
    """What a function of one ray [n] says of each, end to end."""
    results = [function(*(x[s : s + n] for x in packed)) for s, n in INFO.tolist()]
    if isinstance(results[0], tuple):
        return tuple(torch.cat(y, dim) for y in zip(*results, strict=True))
    return torch.cat(results, dim)


# ---- names


def test_names_and_parameters_are_nerfaccs(theirs):
    assert {*theirs.__all__} - {*ours.__all__} == {"__version__"}
    for name in theirs.__all__:
        mine, other = getattr(ours, name), getattr(theirs, name)
        if inspect.isclass(other):
            pairs = [
                (getattr(mine, method), function)
                for method, function in vars(other).items()
                if inspect.isfunction(function) and not method.startswith("_")
            ]
        else:
            pairs = [(mine, other)] if callable(other) else []
        for mine_, other_ in pairs:
            got, want = ([*inspect.signature(f).parameters.values()] for f in (mine_, other_))
            assert [p.name for p in got[: len(want)]] == [p.name for p in want], other_
            assert [p.default for p in got[: len(want)]] == [p.default for p in want], other_
            assert all(p.default is not p.empty for p in got[len(want) :]), other_


# ---- pack


def test_pack_info_counts_the_samples_of_each_ray():
    assert ours.pack_info(RAY_INDICES, R).tolist() == INFO.tolist()
    # the last rays, which have none, are not known without their number
    assert ours.pack_info(RAY_INDICES).tolist() == INFO[:4].tolist()
    assert ours.pack_info(RAY_INDICES[:0], 2).tolist() == [[0, 0], [0, 0]]
    assert ours.pack_info(RAY_INDICES[:0]).shape == (0, 2)


@pytest.mark.parametrize(
    ("info", "got"),
    [
        ([[3, 1], [0, 3]], r"\[3, 1\] for ray 0"),
        ([[0, 1], [2, 2]], r"\[2, 2\] for ray 1"),
        ([[0, 2], [1, 3]], r"\[1, 3\] for ray 1"),
        ([[0, 2], [2, 1]], r"\[2, 1\] for ray 1"),
    ],
)
def test_packed_info_must_lie_end_to_end(info, got):
    with pytest.raises(ValueError, match=f"the 4 samples of its rays end to end, got {got}"):
        ours.inclusive_sum(torch.ones(4), torch.tensor(info))


def test_where_an_empty_ray_begins_does_not_matter():
    info = torch.tensor([[7, 0], [0, 2], [0, 0], [2, 2]])
    assert ours.inclusive_sum(torch.ones(4), info).tolist() == [1, 2, 1, 2]


def test_shapes_that_are_not_packed_are_errors():
    with pytest.raises(ValueError, match=r"packed_info must have shape \[R, 2\], got \[4\]"):
        ours.inclusive_sum(torch.ones(4), torch.arange(4))
    with pytest.raises(ValueError, match=r"packed samples must have shape \[P\], got \[2, 4\]"):
        ours.inclusive_sum(torch.ones(2, 4), INFO)
    with pytest.raises(ValueError, match="ray_indices must not decrease"):
        ours.render_weight_from_alpha(torch.ones(2), ray_indices=torch.tensor([1, 0]), n_rays=2)


# ---- scan


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 5), (7,), (3, 0)], ids=str)
def test_batched_scan_and_its_gradient_are_nerfaccs(theirs, name, shape):
    (x,) = leaves(*shape)
    torch.testing.assert_close(*(with_gradients(getattr(m, name)(x), [x]) for m in (ours, theirs)))


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("way", ["packed_info", "indices"])
def test_packed_scan_is_that_of_each_ray(theirs, name, way):
    (x,) = leaves(P)
    places = {"packed_info": INFO} if way == "packed_info" else {"indices": RAY_INDICES}
    want = each_ray(getattr(theirs, name), x)
    torch.testing.assert_close(
        with_gradients(getattr(ours, name)(x, **places), [x]), with_gradients(want, [x])
    )


def test_rays_of_a_scan_by_indices_need_not_be_in_order():
    indices = torch.tensor([5, 5, 2, 2, 2, 5])
    assert ours.inclusive_sum(torch.ones(6), indices=indices).tolist() == [1, 2, 1, 2, 3, 1]
    assert ours.inclusive_sum(torch.ones(0), indices=indices[:0]).shape == (0,)
    with pytest.raises(ValueError, match="give packed_info or indices, got both"):
        ours.inclusive_sum(torch.ones(6), INFO, indices)


@pytest.mark.parametrize("name", ["inclusive_prod", "exclusive_prod"])
def test_gradient_of_a_product_is_exact_at_zeros(theirs, name):
    (x,) = leaves(P)
    with torch.no_grad():
        x[[0, 4, 6]] = 0
    # torch.cumprod, which nerfacc takes for batched rays, is exact
    want = with_gradients(each_ray(getattr(theirs, name), x), [x])
    torch.testing.assert_close(with_gradients(getattr(ours, name)(x, INFO), [x]), want)


# ---- volrend

# name -> how many inputs, and a call of a module's function with them
VOLREND = {
    "render_transmittance_from_alpha": lambda m, x, o: m.render_transmittance_from_alpha(x[2], **o),
    "render_weight_from_alpha": lambda m, x, o: m.render_weight_from_alpha(x[2], **o),
    "render_transmittance_from_density": lambda m, x, o: m.render_transmittance_from_density(
        x[0], x[0] + x[1], x[2], **o
    ),
    "render_weight_from_density": lambda m, x, o: m.render_weight_from_density(
        x[0], x[0] + x[1], x[2], **o
    ),
}


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 5), (7,)], ids=str)
@pytest.mark.parametrize("name", VOLREND)
def test_batched_weights_and_gradients_are_nerfaccs(theirs, name, shape):
    x = leaves(*shape, count=3)
    got, want = (with_gradients(VOLREND[name](m, x, {}), x) for m in (ours, theirs))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("n_rays", [None, R], ids=["", "n_rays"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", VOLREND)
def test_packed_weights_are_those_of_each_ray(theirs, name, way, n_rays):
    x = leaves(P, count=3)
    got = with_gradients(VOLREND[name](ours, x, WAYS[way] | {"n_rays": n_rays}), x)
    want = with_gradients(each_ray(lambda *ray: VOLREND[name](theirs, ray, {}), *x), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", VOLREND)
def test_light_before_the_samples_is_a_factor(theirs, name):
    *x, prefix = leaves(4, 6, count=4)
    options = {"prefix_trans": prefix}
    got = with_gradients(VOLREND[name](ours, x, options), [*x, prefix])
    # nerfacc multiplies in place what its own gradient needs
    with torch.no_grad():
        values = VOLREND[name](theirs, x, options)
    torch.testing.assert_close(tuple(got[0]), values if isinstance(values, tuple) else (values,))
    outputs = VOLREND[name](theirs, x, {})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # opacities come last, and from densities alone
    lit = len(outputs) - ("density" in name)
    want = *[prefix * y for y in outputs[:lit]], *outputs[lit:]
    torch.testing.assert_close(got, with_gradients(want, [*x, prefix]))


@pytest.mark.parametrize("way", WAYS)
def test_visibility_is_that_of_each_ray(theirs, way):
    t_starts, dt, x = leaves(P, count=3)
    calls = {
        "alpha": lambda m, t, dt, x, **o: m.render_visibility_from_alpha(x, **o),
        "density": lambda m, t, dt, x, **o: m.render_visibility_from_density(t, t + dt, x, **o),
    }
    for call in calls.values():
        for options in ({}, {"early_stop_eps": 0.4}, {"alpha_thre": 0.3}):
            want = each_ray(lambda *ray, c=call, o=options: c(theirs, *ray, **o), t_starts, dt, x)
            got = call(ours, t_starts, dt, x, **WAYS[way], **options)
            assert got.tolist() == want.tolist()
            assert not got.requires_grad
        batch = [y.view(3, 3) for y in (t_starts, dt, x)]
        assert torch.equal(call(ours, *batch, alpha_thre=0.3), call(theirs, *batch, alpha_thre=0.3))


@pytest.mark.parametrize("D", [None, 1, 5])
def test_accumulation_and_its_gradients_are_nerfaccs(theirs, D):
    (w,) = leaves(P)
    (v,) = leaves(P, D or 1, seed=1)
    values = None if D is None else v
    torch.testing.assert_close(
        *(
            with_gradients(m.accumulate_along_rays(w, values, RAY_INDICES, R), [w, v])
            for m in (ours, theirs)
        )
    )
    batch = w.view(3, 3), values if values is None else values.view(3, 3, D)
    torch.testing.assert_close(
        *(with_gradients(m.accumulate_along_rays(*batch), [w, v]) for m in (ours, theirs))
    )


def test_accumulation_in_place_adds():
    (w,), (v,) = leaves(P), leaves(P, 2, seed=1)
    want = 1 + ours.accumulate_along_rays(w, v, RAY_INDICES, R)
    total = torch.ones(R, 2, dtype=w.dtype)
    ours.accumulate_along_rays_(w.detach(), v.detach(), RAY_INDICES, total)
    torch.testing.assert_close(total, want.detach())
    total = torch.ones(3, 1, dtype=w.dtype)
    ours.accumulate_along_rays_(w.detach().view(3, 3), None, outputs=total)
    torch.testing.assert_close(total, 1 + w.detach().view(3, 3).sum(1, keepdim=True))
    with pytest.raises(ValueError, match="outputs must be a tensor"):
        ours.accumulate_along_rays_(w)
    with pytest.raises(ValueError, match=r"values must have shape \[9, 'D'\] like weights"):
        ours.accumulate_along_rays(w, v[1:], RAY_INDICES, R)


@pytest.mark.parametrize("background", [None, (3,), (R, 3)], ids=str)
@pytest.mark.parametrize("kind", ["rgb_sigma_fn", "rgb_alpha_fn"])
def test_rendering_is_that_of_each_ray(theirs, kind, background):
    t, dt, x = leaves(P, count=3)
    t = t + torch.arange(P)
    (rgb,) = leaves(P, 3, seed=1)
    (bkgd,) = leaves(*background, seed=2) if background else [None]
    inputs = [t, dt, x, rgb, *([] if bkgd is None else [bkgd])]
    field = {kind: lambda t_starts, t_ends, ray_indices: (rgb, x)}
    *got, extras = ours.rendering(t, t + dt, RAY_INDICES, R, **field, render_bkgd=bkgd)
    want = []
    for r, (s, n) in enumerate(INFO.tolist()):
        some = slice(s, s + n)
        field = {kind: lambda *_, some=some: (rgb[None, some], x[None, some])}
        behind = bkgd if bkgd is None or bkgd.dim() == 1 else bkgd[r]
        t_starts, t_ends = t[None, some], (t + dt)[None, some]
        want.append(theirs.rendering(t_starts, t_ends, **field, render_bkgd=behind))
    *want, extras_want = zip(*want, strict=True)
    torch.testing.assert_close(
        with_gradients(tuple(got), inputs),
        with_gradients(tuple(torch.cat(y) for y in want), inputs),
    )
    assert {*extras} == {*extras_want[0]}
    for name, value in extras.items():
        torch.testing.assert_close(value, torch.cat([e[name][0] for e in extras_want]))


def test_batched_rendering_is_nerfaccs(theirs):
    t, dt, x = leaves(4, 6, count=3, dtype=torch.float32)
    t = t + torch.arange(6)
    (rgb,) = leaves(4, 6, 3, seed=1, dtype=torch.float32)
    (bkgd,) = leaves(3, seed=2, dtype=torch.float32)
    got, want = (
        with_gradients(
            m.rendering(t, t + dt, rgb_sigma_fn=lambda *_: (rgb, x), render_bkgd=bkgd)[:3],
            [t, dt, x, rgb, bkgd],
        )
        for m in (ours, theirs)
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_depth_vanishes_with_opacity(theirs):
    t = torch.tensor([[1.0, 2.0]])
    for alpha in (0.0, 1e-8, 1e-6):
        x = torch.full_like(t, alpha)
        field = dict(rgb_alpha_fn=lambda *_, x=x: (torch.ones(1, 2, 3), x))
        got, want = (m.rendering(t, t + 1, **field)[2] for m in (ours, theirs))
        # composite_rays adds 1e-10 to the opacity
        torch.testing.assert_close(got, want, rtol=1e-10 / (2 * alpha + 1e-10) + 1e-6, atol=0)
    got = ours.rendering(t, t + 1, **field, expected_depths=False)[2]
    torch.testing.assert_close(got, torch.full_like(got, 4e-6), rtol=1e-4, atol=0)


def test_rendering_of_no_samples_asks_no_field():
    none = torch.zeros(0)
    bkgd = torch.tensor([0.1, 0.2, 0.3])
    rgb, opacity, depth, extras = ours.rendering(
        none, none, none.long(), 2, rgb_sigma_fn=lambda *_: 1 / 0, render_bkgd=bkgd
    )
    assert torch.equal(rgb, bkgd.expand(2, 3))
    assert opacity.flatten().tolist() == depth.flatten().tolist() == [0, 0]
    assert extras["rgbs"].shape == (0, 3)


def test_rendering_says_what_is_wrong():
    t, i = torch.zeros(2), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="give rgb_sigma_fn or rgb_alpha_fn, got neither"):
        ours.rendering(t, t, i, 1)
    with pytest.raises(ValueError, match="must have the same shape"):
        ours.rendering(t, t[:1], i, 1, lambda *_: None)
    with pytest.raises(ValueError, match=r"of shapes \[2, 'C'\] and \[2\], got \[\[2, 3\], \[2, 1"):
        ours.rendering(t, t, i, 1, lambda *_: (torch.zeros(2, 3), torch.zeros(2, 1)))


def test_opaque_samples_have_exact_gradients():
    alphas = torch.tensor([0.5, 1.0, 0.5]).requires_grad_()
    w, _ = ours.render_weight_from_alpha(alphas, ray_indices=torch.zeros(3, dtype=torch.long))
    assert w.tolist() == [0.5, 0.5, 0.0]
    (d_alphas,) = torch.autograd.grad(w[2], alphas)
    assert d_alphas.tolist() == [0.0, -0.25, 0.0]
    # a wall, and an infinite density in an interval without width
    sigmas = torch.tensor([torch.inf, 1.0, torch.inf, 1.0]).requires_grad_()
    t_starts, t_ends = torch.tensor([0.0, 0, 1, 2]), torch.tensor([0.0, 1, 2, 3])
    w, trans, alphas = ours.render_weight_from_density(t_starts, t_ends, sigmas)
    torch.testing.assert_close(alphas, torch.tensor([0, 1 - 1 / torch.e, 1, 1 - 1 / torch.e]))
    assert trans[3] == w[0] == w[3] == 0
    d = torch.autograd.grad((w.square() + alphas + trans).sum(), sigmas)[0]
    assert torch.isfinite(d).all()


def test_mixed_precision_is_read_as_it_is():
    t, dt, x = leaves(P, count=3, dtype=torch.float32)
    half = x.detach().half()
    want = ours.render_weight_from_density(t, t + dt, half.float(), INFO)
    torch.testing.assert_close(ours.render_weight_from_density(t, t + dt, half, INFO), want)
    rgb = torch.rand(P, 3).half()
    colours, *_ = ours.rendering(t, t + dt, RAY_INDICES, R, lambda *_: (rgb, half))
    assert colours.dtype == torch.float32
    want = ours.accumulate_along_rays(want[0], rgb.float(), RAY_INDICES, R)
    torch.testing.assert_close(colours, want)


# ---- losses


def test_distortion_is_its_definition():
    t, dt, w = leaves(P, count=3)
    t = t + torch.arange(P)

    def of_a_ray(t, dt, w):
        m = t + dt / 2
        pairs = w[:, None] * w[None] * (m[:, None] - m[None]).abs()
        return (pairs.sum() + (w * w * dt).sum() / 3)[None, None]

    got = losses.distortion(w, t, t + dt, RAY_INDICES, R)
    assert got.shape == (R, 1)
    inputs = [t, dt, w]
    torch.testing.assert_close(
        with_gradients(got, inputs), with_gradients(each_ray(of_a_ray, t, dt, w), inputs)
    )


# ---- pdf


def edges_and_cdf(R, S, dtype=torch.float64, coincident=False):
    """Edges, of which the first two may coincide, and a cdf that does not rise everywhere."""
    edges, rise = (x.detach() for x in leaves(R, S, count=2, dtype=dtype))
    edges = torch.cat([edges.sort(-1).values, torch.ones_like(edges[:, :1])], -1)
    if coincident:
        edges[:, 0] = edges[:, 1]
    rise = torch.where(rise < 0.3, 0, rise)
    cdf = torch.cat([torch.zeros_like(rise[:, :1]), rise], -1).cumsum(-1)
    return edges, cdf


def neighbours(sequence, value):
    """By one comparison after the other: the published kernel looks among all but the last."""
    above = next((i for i, x in enumerate(sequence[:-1]) if x > value), len(sequence) - 1)
    return max(above - 1, 0), above


@pytest.mark.parametrize("packed_keys", [False, True])
@pytest.mark.parametrize("packed_values", [False, True])
def test_searchsorted_is_its_definition(packed_keys, packed_values):
    keys, _ = edges_and_cdf(3, 6, coincident=True)
    values = torch.cat([keys[:, ::2], keys[:, 1:3] + 1e-3, keys[:, :1] - 1, keys[:, :1] + 1], -1)
    want = [[neighbours(k, v) for v in row] for k, row in zip(keys, values, strict=True)]
    left, right = torch.tensor(want).unbind(-1)

    def pack(x, packed):
        n = x.shape[1]
        info = torch.stack([torch.arange(3) * n, torch.full((3,), n)], -1)
        return ours.RaySamples(x.flatten(), info) if packed else ours.RaySamples(x)

    got = ours.searchsorted(pack(keys, packed_keys), pack(values, packed_values))
    if packed_values:
        first = torch.arange(3)[:, None] * keys.shape[1]
        left, right = ((i + first).flatten() for i in (left, right))
    assert torch.equal(got[0], left)
    assert torch.equal(got[1], right)


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("stratified", [False, True])
def test_samples_are_where_the_cdf_is(n, stratified):
    edges, cdf = edges_and_cdf(4, 5)
    torch.manual_seed(0)
    intervals, samples = ours.importance_sampling(
        ours.RayIntervals(edges), cdf, n, stratified=stratified
    )
    assert samples.vals.shape == (4, n)
    assert intervals.vals.shape == (4, n + 1)
    for e, c, t, bins in zip(edges, cdf, samples.vals, intervals.vals, strict=True):
        # the cdf at the samples, piecewise linear, rises by even steps
        k = torch.searchsorted(e, t, right=True).clamp(1, len(e) - 1)
        at = c[k - 1] + (t - e[k - 1]) / (e[k] - e[k - 1]) * (c[k] - c[k - 1])
        place = at / (c[-1] / n) - torch.arange(n)
        if stratified:
            assert 0 <= place[0] < 1
        torch.testing.assert_close(
            place, (place[:1] if stratified else place.new_tensor(0.5)) + 0 * t
        )
        if n == 1:
            assert bins.tolist() == [e[0], e[-1]]
            continue
        torch.testing.assert_close(bins[1:-1], (t[1:] + t[:-1]) / 2)
        assert bins[0] == torch.maximum(t[0] - (t[1] - t[0]) / 2, e[0])
        assert bins[-1] == torch.minimum(t[-1] + (t[-1] - t[-2]) / 2, e[-1])


def test_samples_are_those_of_nerfaccs_own_pytorch(theirs):
    edges, _ = edges_and_cdf(4, 5, dtype=torch.float32)
    weights = torch.rand(4, 5) + 0.1
    pdf = weights / weights.sum(-1, keepdim=True)
    cdf = torch.cat([torch.zeros(4, 1), pdf.cumsum(-1)], -1)
    want = theirs.pdf._sample_from_weighted(
        *(edges, weights, 7, False), *(edges[:, :1], edges[:, -1:])
    )
    got = ours.importance_sampling(ours.RayIntervals(edges), cdf, 7)
    torch.testing.assert_close([got[0].vals, got[1].vals], [*want], rtol=0, atol=1e-5)


def test_rays_may_get_their_own_numbers_of_samples():
    edges, cdf = edges_and_cdf(4, 5)
    counts = torch.tensor([3, 0, 1, 2])
    packed = ours.RayIntervals(edges.flatten(), torch.tensor([[0, 6], [6, 6], [12, 6], [18, 6]]))
    intervals, samples = ours.importance_sampling(packed, cdf.flatten(), counts)
    assert samples.packed_info.tolist() == [[0, 3], [3, 0], [3, 1], [4, 2]]
    assert intervals.packed_info.tolist() == [[0, 4], [4, 0], [4, 2], [6, 3]]
    assert samples.ray_indices.tolist() == [0, 0, 0, 2, 3, 3]
    assert intervals.ray_indices.tolist() == [0, 0, 0, 0, 2, 2, 3, 3, 3]
    for r, n in enumerate(counts.tolist()):
        if n:
            alone = ours.importance_sampling(ours.RayIntervals(edges[None, r]), cdf[None, r], n)
            (s, _), (e, _) = samples.packed_info[r], intervals.packed_info[r]
            assert torch.equal(samples.vals[s : s + n], alone[1].vals[0])
            assert torch.equal(intervals.vals[e : e + n + 1], alone[0].vals[0])
            assert intervals.is_left[e : e + n + 1].tolist() == [True] * n + [False]
            assert intervals.is_right[e : e + n + 1].tolist() == [False] + [True] * n
    # one number for packed rays, which makes batched ones
    batched, _ = ours.importance_sampling(packed, cdf.flatten(), 3)
    assert torch.equal(
        batched.vals, ours.importance_sampling(ours.RayIntervals(edges), cdf, 3)[0].vals
    )


def test_search_and_sampling_say_what_is_missing():
    x = torch.arange(3.0)
    with pytest.raises(ValueError, match=r"RaySamples of shape \[P\] must have packed_info"):
        ours.searchsorted(ours.RaySamples(x), ours.RaySamples(x))
    rays = ours.RayIntervals(x, torch.tensor([[0, 3], [3, 0]]))
    with pytest.raises(ValueError, match="intervals must have edges on every ray, got one without"):
        ours.importance_sampling(rays, x, 2)


# ---- grid

BOX = torch.tensor([-1.0, -1, -1, 1, 1, 1])


def some_rays(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    o = 2 * torch.randn(n, 3, generator=generator)
    d = torch.nn.functional.normalize(torch.randn(n, 3, generator=generator), dim=-1)
    # most look at the box
    d[10:] = torch.nn.functional.normalize(0.5 * d[10:] - o[10:], dim=-1)
    o[:4] *= 0.1
    return o, d


def test_boxes_are_met_where_nerfacc_says(theirs):
    o, d = some_rays()
    boxes = torch.stack([BOX, 2 * BOX, BOX.roll(3).abs() * BOX + 0.5])
    for options in ({}, {"near_plane": 0.5, "far_plane": 2.0, "miss_value": -1.0}):
        got = ours.ray_aabb_intersect(o, d, boxes, **options)
        torch.testing.assert_close(got, theirs.grid._ray_aabb_intersect(o, d, boxes, **options))
        assert got[2].any()
        assert not got[2].all()


def test_ray_along_a_face_is_in_the_box():
    for sign in (1.0, -1.0):
        o = torch.tensor([[-2.0, 1, 1], [-2, 1, 1.001], [-2, -1, 0]])
        d = torch.tensor([[1.0, sign * 0.0, 0]]).expand(3, 3)
        t_mins, t_maxs, hits = ours.ray_aabb_intersect(o, d, BOX[None])
        assert hits.flatten().tolist() == [True, False, True]
        assert t_mins.flatten().tolist() == [1, torch.inf, 1]
        assert t_maxs.flatten().tolist() == [3, torch.inf, 3]
    # and in the cells on its inside
    cells = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    _, samples, _ = ours.traverse_grids(o, d, cells, BOX[None], step_size=0.5)
    assert samples.packed_info[:, 1].tolist() == [4, 0, 4]


def marched(o, d, binaries, aabbs, near, far, step_size, cone_angle):
    """Step after step along one ray, in double: those whose midpoint is in an occupied cell."""
    steps, t = [], float(near)
    resolution = torch.tensor(binaries.shape[1:])
    while t < min(far, 20):
        dt = max(step_size, cone_angle * t)
        x = o.double() + (t + dt / 2) * d.double()
        for level, box in enumerate(aabbs.double()):
            unit = (x - box[:3]) / (box[3:] - box[:3])
            if ((unit >= 0) & (unit < 1)).all():
                if binaries[(level, *(unit * resolution).long())] and t + dt / 2 < far:
                    steps.append((t, t + dt))
                break
        t += dt
    return steps


@pytest.mark.parametrize("cone_angle", [0.0, 0.1])
@pytest.mark.parametrize("levels", [1, 3])
def test_steps_are_those_in_occupied_cells(levels, cone_angle):
    o, d = some_rays(20)
    generator = torch.Generator().manual_seed(1)
    binaries = torch.rand(levels, 3, 4, 5, generator=generator) < 0.5
    aabbs = torch.stack([BOX * 2**i for i in range(levels)])
    near = torch.rand(20, generator=generator)
    far = 3 + 3 * torch.rand(20, generator=generator)
    intervals, samples, stop = ours.traverse_grids(
        *(o, d, binaries, aabbs, near, far), step_size=0.13, cone_angle=cone_angle
    )
    starts, ends = intervals.vals[intervals.is_left], intervals.vals[intervals.is_right]
    torch.testing.assert_close(samples.vals, (starts + ends) / 2)
    found = 0
    for r in range(20):
        want = marched(*(o[r], d[r], binaries, aabbs), *(near[r], far[r], 0.13, cone_angle))
        first, n = samples.packed_info[r].tolist()
        some = slice(first, first + n)
        got = torch.stack([starts[some], ends[some]], -1)
        torch.testing.assert_close(
            got, torch.tensor(want).view(-1, 2), rtol=1e-5, atol=1e-5, check_dtype=False
        )
        assert (samples.ray_indices[some] == r).all()
        assert n == 0 or stop[r] >= ends[some][-1]
        first, edges = intervals.packed_info[r].tolist()
        assert (intervals.ray_indices[first : first + edges] == r).all()
        # steps that touch share an edge
        assert n == 0 or edges == n + 1 + (starts[some][1:] != ends[some][:-1]).sum()
        found += n
    assert found == len(samples.vals) > 50


def test_steps_that_begin_far_away_are_wide():
    o, d, near = torch.tensor([[-6.0, 0, 0]]), torch.tensor([[1.0, 0, 0]]), torch.tensor([4.85])
    cells = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    intervals, _, _ = ours.traverse_grids(
        *(o, d, cells, BOX[None], near), step_size=0.01, cone_angle=0.1
    )
    want = 4.85 * 1.1 ** torch.arange(5)
    torch.testing.assert_close(intervals.vals, want)


def test_occupied_cells_are_nerfaccs(theirs):
    o, d = some_rays()
    binaries = torch.rand(3, 8, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.4
    aabbs = torch.stack([BOX * 2**i for i in range(3)])
    everything = torch.ones_like(binaries)
    steps = {
        name: ours.traverse_grids(o, d, cells, aabbs, step_size=0.03)[1]
        for name, cells in (("all", everything), ("occupied", binaries))
    }
    ray, t = steps["all"].ray_indices, steps["all"].vals
    occupied, inside = theirs.grid._query(o[ray] + t[:, None] * d[ray], binaries.float(), BOX)
    assert inside.all()
    # those in cells that nerfacc's own lookup finds occupied, but for rounding at a cell's face
    want = {*zip(ray[occupied > 0].tolist(), t[occupied > 0].tolist(), strict=True)}
    got = {
        *zip(steps["occupied"].ray_indices.tolist(), steps["occupied"].vals.tolist(), strict=True)
    }
    assert len(want) > 500
    assert len(want ^ got) <= 0.001 * len(want)


def test_traversal_goes_on_where_it_stopped():
    o, d = some_rays(20)
    binaries = torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    args = o, d, binaries, BOX[None]
    whole = ours.traverse_grids(*args, step_size=0.1)
    near, found = None, []
    for _ in range(20):
        _, samples, near = ours.traverse_grids(
            *args, near, step_size=0.1, traverse_steps_limit=3, over_allocate=True
        )
        assert samples.packed_info[:, 1].max() <= 3
        assert samples.is_valid.all()
        found += zip(samples.ray_indices.tolist(), samples.vals.tolist(), strict=True)
    want = [*zip(whole[1].ray_indices.tolist(), whole[1].vals.tolist(), strict=True)]
    assert len(found) == len(want)
    for (ray, t), (ray_want, t_want) in zip(sorted(found), want, strict=True):
        assert ray == ray_want
        assert abs(t - t_want) < 1e-5


def test_rays_are_taken_a_few_at_a_time(monkeypatch):
    o, d = some_rays(20)
    binaries = torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    want = ours.traverse_grids(o, d, binaries, BOX[None], step_size=0.1)
    monkeypatch.setattr(ours.grid, "_RAYS_AT_ONCE", 7)
    got = ours.traverse_grids(o, d, binaries, BOX[None], step_size=0.1)
    assert torch.equal(got[0].vals, want[0].vals)
    assert torch.equal(got[1].ray_indices, want[1].ray_indices)


def test_traversal_takes_what_is_known_of_the_rays():
    o, d = some_rays(20)
    aabbs = torch.stack([BOX, 2 * BOX])
    binaries = torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    want, _, _ = ours.traverse_grids(o, d, binaries, aabbs, step_size=0.1)
    t_mins, t_maxs, hits = ours.ray_aabb_intersect(o, d, aabbs)
    t, order = torch.cat([t_mins, t_maxs], -1).sort(-1)
    known = dict(t_sorted=t, t_indices=order, hits=hits)
    got, _, _ = ours.traverse_grids(o, d, binaries, aabbs, step_size=0.1, **known)
    assert torch.equal(got.vals, want.vals)
    even = torch.arange(20) % 2 == 0
    got, _, _ = ours.traverse_grids(o, d, binaries, aabbs, step_size=0.1, rays_mask=even)
    assert torch.equal(got.vals, want.vals[even[want.ray_indices]])
    with pytest.raises(ValueError, match="step_size must be > 0 and cone_angle >= 0, got 0 and 0"):
        ours.traverse_grids(o, d, binaries, aabbs, step_size=0.0)
    with pytest.raises(ValueError, match=r"rays_d must have shape \[R, 3\], got \[60\]"):
        ours.traverse_grids(o, d.flatten(), binaries, aabbs)


def test_rays_that_meet_nothing_and_rays_that_are_not_numbers_give_no_samples():
    o, d = some_rays(4)
    o[1], d[2], o[3] = torch.nan, torch.nan, 1e6
    binaries = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    _, samples, stop = ours.traverse_grids(o, d, binaries, BOX[None], step_size=0.5)
    assert samples.packed_info[1:, 1].tolist() == [0, 0, 0]
    assert samples.packed_info[0, 1] > 0
    assert stop[1:].tolist() == [0, 0, 0]
    intervals, samples, _ = ours.traverse_grids(o[1:], d[1:], binaries, BOX[None])
    assert len(intervals.vals) == len(samples.vals) == 0


# ---- estimators


@pytest.fixture
def their_estimators(theirs, monkeypatch):
    """Of the package, on what of it needs a GPU from here."""
    from nerfacc.estimators import occ_grid, prop_net

    def traverse_grids(*args, **options):
        return ours.traverse_grids(*args, **options)[:2]

    monkeypatch.setattr(occ_grid, "traverse_grids", traverse_grids)
    for name in ("render_visibility_from_alpha", "render_visibility_from_density"):
        monkeypatch.setattr(occ_grid, name, getattr(ours, name))
    for name in ("importance_sampling", "searchsorted"):
        monkeypatch.setattr(prop_net, name, getattr(ours, name))
    return types.SimpleNamespace(occ_grid=occ_grid, prop_net=prop_net)


def ball(x):
    """Densities of a ball, denser within."""
    return 20 * (0.8 - x.norm(dim=-1, keepdim=True)).clamp(min=0)


def test_grid_learns_and_samples_as_nerfaccs_does(their_estimators):
    args = dict(roi_aabb=[-1, -1, -0.5, 1, 1, 0.5], resolution=[8, 6, 4], levels=2)
    pair = ours.OccGridEstimator(**args), their_estimators.occ_grid.OccGridEstimator(**args)
    assert {*pair[0].state_dict()} == {*pair[1].state_dict()}
    o, d = some_rays()
    results = []
    for grid in pair:
        torch.manual_seed(0)
        for step in (0, 1, 16, 32):
            grid.update_every_n_steps(step, ball, occ_thre=0.1, ema_decay=0.9)
        fields = {
            "sigma_fn": lambda t0, t1, i: ball(o[i] + (t0 + t1)[:, None] / 2 * d[i])[:, 0],
            "alpha_fn": lambda t0, t1, i: ball(o[i] + (t0 + t1)[:, None] / 2 * d[i])[:, 0] / 20,
        }
        sampled = [
            grid.sampling(o, d, render_step_size=0.1, **options)
            for options in (
                {},
                dict(near_plane=0.5, far_plane=3.0, cone_angle=0.05),
                dict(t_min=torch.full((40,), 0.5), t_max=torch.full((40,), 3.0)),
                dict(sigma_fn=fields["sigma_fn"], alpha_thre=0.01, early_stop_eps=0.01),
                dict(alpha_fn=fields["alpha_fn"], alpha_thre=0.01, early_stop_eps=0.01),
                dict(stratified=True),
            )
        ]
        results.append((grid.state_dict(), sampled))
    torch.testing.assert_close(results[0], results[1])
    counts = [len(ray_indices) for ray_indices, *_ in results[0][1]]
    assert 0 < counts[3] < counts[0]
    assert 0 < counts[1] < counts[0]
    # a state of theirs is one of ours
    restored = ours.OccGridEstimator(**args)
    restored.load_state_dict(results[1][0])
    assert torch.equal(restored.binaries, pair[0].binaries)


def test_grid_looks_at_a_part_of_its_cells_after_the_warmup():
    grid = ours.OccGridEstimator(BOX.tolist(), resolution=8)
    grid.update_every_n_steps(0, lambda x: (x[:, :1] > 0).float())
    assert grid.binaries[0, 4:].all()
    assert not grid.binaries[0, :4].any()
    seen = []
    grid.update_every_n_steps(16, lambda x: seen.append(x) or torch.ones(len(x), 1), warmup_steps=1)
    # a quarter of all, and as many of the occupied ones
    assert len(seen[0]) == 2 * 8**3 // 4
    # cells chosen more than once fade once, and the most that was seen there counts
    grid.occs.fill_(0.5)
    want, seen = grid.occs.clone(), []

    def falling(x):
        seen.append(x)
        return torch.linspace(1, 0, len(x))[:, None]

    grid.update_every_n_steps(32, falling, 0.01, 0.5, 1)
    i, j, k = ((seen[0] + 1) * 4).long().unbind(-1)
    cells = ((i * 8 + j) * 8 + k).tolist()
    assert len({*cells}) < len(cells)
    want[cells] = 0.25
    for cell, occ in zip(cells, falling(seen[0])[:, 0], strict=True):
        want[cell] = max(want[cell], occ)
    assert torch.equal(grid.occs, want)
    grid.eval()
    with pytest.raises(RuntimeError, match="must be in training mode, got eval"):
        grid.update_every_n_steps(0, ball)
    grid._update(0, ball)


def test_cells_that_no_camera_sees_stay_empty():
    grid = ours.OccGridEstimator([-1, -1, 1, 1, 1, 3], resolution=5)
    # looks along +z from the origin, and sees x / z within 1/4 at most
    K = torch.tensor([[2.0, 0, 0.5], [0, 2, 0.5], [0, 0, 1]])[None]
    grid.mark_invisible_cells(K, torch.eye(4)[None], 1, 1, near_plane=1.25, chunk=7)
    grid._update(0, lambda x: torch.ones(len(x), 1))
    axis = torch.linspace(-1, 1, 5)
    x, y, z = torch.meshgrid(axis, axis, axis + 2, indexing="ij")
    seen = (x / z >= -0.25) & (x / z < 0.25) & (y / z >= -0.25) & (y / z < 0.25) & (z >= 1.25)
    assert torch.equal(grid.binaries[0], seen)
    assert seen.any()
    grid._update(1, lambda x: torch.ones(len(x), 1), warmup_steps=0)
    assert torch.equal(grid.occs.view(5, 5, 5) == -1, ~seen)


def test_samples_need_no_more_opacity_than_cells_have_on_average():
    grid = ours.OccGridEstimator(BOX, 2)
    grid._update(0, lambda x: torch.full((len(x), 1), 0.02))
    o, d = some_rays()
    field = dict(alpha_fn=lambda t0, t1, i: torch.full_like(t0, 0.05), early_stop_eps=0.0)
    found = [
        len(grid.sampling(o, d, render_step_size=0.5, **field, alpha_thre=thre)[0])
        for thre in (0.0, 0.5)
    ]
    assert found[0] == found[1] > 0


def test_grid_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"roi_aabb must have shape \[6\] and resolution \[3\]"):
        ours.OccGridEstimator([0, 1], 4)
    grid = ours.OccGridEstimator(BOX, 2)
    grid._update(0, lambda x: torch.ones(len(x), 1))
    o, d = some_rays()
    with pytest.raises(ValueError, match="sigma_fn must return shape"):
        grid.sampling(o, d, lambda t0, t1, i: t0[:, None], render_step_size=0.5)


@pytest.mark.parametrize("sampling_type", ["uniform", "lindisp"])
@pytest.mark.parametrize("stratified", [False, True])
def test_proposals_sample_and_train_as_nerfaccs_do(their_estimators, sampling_type, stratified):
    results = []
    for module in (ours.estimators.prop_net, their_estimators.prop_net):
        torch.manual_seed(0)
        networks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Softplus(), torch.nn.Linear(8, 1))
            for _ in range(2)
        )
        optimizer = torch.optim.SGD(networks.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        estimator = module.PropNetEstimator(optimizer, scheduler)
        sigma_fns = [
            lambda starts, ends, network=network: network(torch.stack([starts, ends], -1))[
                ..., 0
            ].exp()
            for network in networks
        ]
        logged = []
        for requires_grad in (True, False, True):
            t_starts, t_ends = estimator.sampling(
                *(sigma_fns, [12, 8], 6),
                *(5, 0.5, 4.0, sampling_type, stratified, requires_grad),
            )
            trans = torch.linspace(1, 0, 6).expand(5, 6) ** 3
            loss = estimator.update_every_n_steps(trans, requires_grad, loss_scaler=8.0)
            logged.append((t_starts.detach(), t_ends.detach(), loss))
        results.append((logged, networks.state_dict()))
        assert estimator.compute_loss(trans) == 0
    torch.testing.assert_close(results[0], results[1])
    assert results[0][0][0][2] > 0
    assert results[0][0][1][2] == 0


def test_proposals_train_as_often_as_nerfaccs(theirs):
    from nerfacc.estimators.prop_net import get_proposal_requires_grad_fn

    mine = ours.estimators.prop_net.get_proposal_requires_grad_fn(3.0, 20)
    other = get_proposal_requires_grad_fn(3.0, 20)
    assert [mine(step) for step in range(60)] == [other(step) for step in range(60)]


def test_proposals_say_what_is_wrong():
    estimator = ours.PropNetEstimator()
    with pytest.raises(ValueError, match="prop_sigma_fns must be as many as prop_samples, got 0"):
        estimator.sampling([], [1], 1, 1, 0.1, 1.0)
    with pytest.raises(ValueError, match="sampling_type must be 'uniform' or 'lindisp', got 'log'"):
        estimator.sampling([], [], 1, 1, 0.1, 1.0, "log")
    with pytest.raises(ValueError, match="must have an optimizer"):
        estimator.update_every_n_steps(torch.ones(1, 2), requires_grad=True)


# ---- install()


@pytest.fixture
def modules(monkeypatch):
    """sys.modules without any nerfacc, put back as it was."""
    before = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "nerfacc"}
    for name in before:
        del sys.modules[name]
    yield sys.modules
    ours.uninstall()
    for name in [n for n in sys.modules if n.split(".")[0] == "nerfacc"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("before", ["imported", "not imported", "not installed"])
def test_install_makes_nerfacc_mean_this_package(modules, before):
    if before == "imported":
        pytest.importorskip("nerfacc")
    if before == "not installed":
        modules["nerfacc"] = None
    there = {name: module for name, module in modules.items() if name.startswith("nerfacc")}

    names = ours.install()
    import nerfacc
    import nerfacc.estimators.occ_grid
    from nerfacc import OccGridEstimator
    from nerfacc.volrend import rendering

    assert nerfacc is ours
    assert rendering is ours.rendering
    assert OccGridEstimator is nerfacc.estimators.occ_grid.OccGridEstimator is ours.OccGridEstimator
    assert {name: modules[name] for name in names} == {
        name: module for name, module in modules.items() if name.startswith("nerfacc")
    }
    assert {"nerfacc", "nerfacc.pdf", "nerfacc.losses", "nerfacc.estimators.prop_net"} <= {*names}
    assert ours.install() == names

    ours.uninstall()
    assert {n: m for n, m in modules.items() if n.startswith("nerfacc")} == there
    ours.uninstall()
    if before == "not installed":
        with pytest.raises(ImportError):
            import nerfacc


def test_what_is_not_here_is_an_import_error(modules):
    ours.install()
    with pytest.raises(ImportError):
        from nerfacc.cameras import opencv_lens_undistortion  # noqa: F401


# ---- training


@needs_nerfstudio
def test_instant_ngp_of_nerfstudio_trains_on_a_cpu(monkeypatch):
    pytest.importorskip("torchmetrics")
    model_of, rays, renderers = (
        imported(name)
        for name in ("models.instant_ngp", "cameras.rays", "model_components.renderers")
    )
    # as after install(), if nerfstudio was not imported before
    for module in (model_of, renderers):
        monkeypatch.setattr(module, "nerfacc", ours)
    field = functools.partial(model_of.NerfactoField, implementation="torch")
    monkeypatch.setattr(model_of, "NerfactoField", field)
    config = model_of.InstantNGPModelConfig(
        grid_resolution=16, grid_levels=2, log2_hashmap_size=10, max_res=64
    )
    config.near_plane, config.far_plane, config.render_step_size = 0.05, 4.0, 0.1
    box = imported("data.scene_box").SceneBox(torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
    torch.manual_seed(0)
    with mock.patch("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity"):
        model = config.setup(scene_box=box, num_train_data=4, device="cpu", grad_scaler=None)
    model.train()
    (callback,) = model.get_training_callbacks(mock.MagicMock())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    d, one = torch.nn.functional.normalize(torch.randn(64, 3), dim=-1), torch.ones(64, 1)
    bundle = rays.RayBundle(
        *(torch.randn(64, 3) / 10, d, one),
        camera_indices=torch.zeros(64, 1, dtype=torch.long),
        nears=0.05 * one,
        fars=4 * one,
    )
    batch, errors = {"image": torch.rand(64, 3)}, []
    for step in range(20):
        callback.run_callback(step=step)
        outputs = model.get_outputs(bundle)
        loss = model.get_loss_dict(outputs, batch)["rgb_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert outputs["num_samples_per_ray"].sum() > 64
    assert errors[-1] < 0.9 * errors[0]


FOX = ROOT.parent / "shared" / "data" / "fox"
BLOCK = 32  # pixels that are averaged, in each direction


def fox_rays():
    """Origins, directions and colours [N, H, W, 3] of every other photograph, lens left aside."""
    Image, np = (pytest.importorskip(name) for name in ("PIL.Image", "numpy"))
    scene = json.loads((FOX / "transforms.json").read_text())
    w, h = int(scene["w"]) // BLOCK, int(scene["h"]) // BLOCK
    colours, poses = [], []
    for frame in scene["frames"]:
        if not (FOX / frame["file_path"]).exists():
            continue
        with Image.open(FOX / frame["file_path"]) as image:
            # the decoder averages 8 x 8 pixels, in a tenth of the time
            image.draft("RGB", (scene["w"] // 8, scene["h"] // 8))
            colours.append(torch.tensor(np.asarray(image.resize((w, h), Image.Resampling.BOX))))
        poses.append(torch.tensor(frame["transform_matrix"])[:3])
    colours, poses = torch.stack(colours[::2]) / 255, torch.stack(poses[::2])
    x, y = torch.meshgrid(torch.arange(w) + 0.5, torch.arange(h) + 0.5, indexing="xy")
    x = (x * BLOCK - scene["cx"]) / scene["fl_x"]
    y = (y * BLOCK - scene["cy"]) / scene["fl_y"]
    d = torch.stack([x, -y, -torch.ones(h, w)], -1)
    d = torch.nn.functional.normalize(torch.einsum("nij,hwj->nhwi", poses[:, :, :3], d), dim=-1)
    return poses[:, None, None, :, 3].expand_as(d), d, colours


@pytest.mark.skipif(not FOX.is_dir(), reason="the fox scene is not beside the repository")
def test_example_in_the_docs_learns_the_fox(modules):
    text = (ROOT / "docs" / "compat.md").read_text()
    (example,) = re.findall(r"```python\n(import torch\n.*?Voxels.*?)```", text, re.S)
    example, names = compile(example, "docs/compat.md", "exec"), {}
    exec(example, names)
    rays = fox_rays()
    held_out = torch.arange(len(rays[0])) % 6 == 3
    origins, directions, colours = (x[~held_out].reshape(-1, 3) for x in rays)
    torch.manual_seed(0)
    field, grid, step_size = names["train"](origins, directions, colours, half_side=1.5)

    def psnr(image):
        return -10 * (image - seen).square().mean().log10().item()

    o, d, seen = (x[held_out].reshape(-1, 3) for x in rays)
    with torch.no_grad():
        rendered = torch.cat(
            [
                names["render"](field, grid, *some, step_size)[0]
                for some in zip(o.split(1024), d.split(1024), strict=True)
            ]
        )
    # views that it has not seen; one colour for all gives 12 dB
    assert psnr(colours.mean(0)) < 12.5
    assert psnr(rendered) > 16
    # most of the space around has turned out empty, as the samples are then few
    assert grid.binaries[1:].float().mean() < 0.5
