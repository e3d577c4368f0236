"""field_objective: the sum of field_losses, with its gradients made in the forward."""

import warnings
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import rayfuse
from rayfuse import backend
from rayfuse.objective import LOSSES
from test_objective import inputs, packed

# of either sign, and of different sizes
MULTIPLIERS = dict(zip(LOSSES, (1.0, 1e-3, 0.5, -0.25, 2, 3), strict=True))


def leaves(named):
    """Fresh copies, of which all that may want gradients do, and these by name."""
    pairs, spec = pytree.tree_flatten_with_path(named)
    fresh, wanted = [], {}
    for path, x in pairs:
        if torch.is_tensor(x) and x.is_floating_point():
            x = wanted[pytree.keystr(path)] = x.detach().clone().requires_grad_()
        fresh.append(x)
    return pytree.tree_unflatten(fresh, spec), wanted


def in_one_pass(named, multipliers=MULTIPLIERS):
    """The sum, what it is of, and the tensors that want gradients."""
    named, wanted = leaves(named)
    function = rayfuse.packed_field_objective if "offsets" in named else rayfuse.field_objective
    return *function(multipliers, **named), wanted


def weighted(out, multipliers=MULTIPLIERS):
    return sum(x * getattr(out, name) for name, x in multipliers.items())


def one_by_one(named, multipliers=MULTIPLIERS):
    """The same of field_losses."""
    named, wanted = leaves(named)
    function = rayfuse.packed_field_losses if "offsets" in named else rayfuse.field_losses
    out = function(**named)
    return weighted(out, multipliers), out, wanted


def gradients(total, wanted, **options):
    grads = torch.autograd.grad(total, [*wanted.values()], materialize_grads=True, **options)
    return dict(zip(wanted, grads, strict=True))


def assert_same_gradients(total, wanted, want_total, want_wanted):
    want = gradients(want_total, want_wanted)
    for name, grad in gradients(total, wanted).items():
        torch.testing.assert_close(
            grad, want[name], equal_nan=True, msg=lambda text, name=name: f"d_{name}: {text}"
        )


@pytest.fixture
def silent():
    with warnings.catch_warnings(action="error"):
        yield


def cases():
    dense = inputs()
    flat = {name: x for name, x in packed(dense).items() if name != "proposals"}
    first = {name: dense[name][:2] for name in ("n", "n_pred", "d")}
    yield "dense", dense
    yield "packed", flat
    yield "background", dense | dict(background=torch.rand(5, 3, dtype=torch.float64))
    yield "shared background", dense | dict(background=torch.rand(3, dtype=torch.float64))
    yield "normals of the first rays", dense | first | dict(normal_rays=2)
    yield "sum", dense | dict(reduction="sum", depth="median", background=1.0)
    yield "denominator", dense | dict(denominator=7, last_sample=True)
    yield "packed denominator", flat | dict(denominator=7.5)
    for absent in ("rgb_target", "features", "n", "d", "n_pred", "proposals"):
        yield f"no {absent}", {name: x for name, x in dense.items() if name != absent}
    nothing = torch.zeros(5, 9, 0, dtype=torch.float64)
    yield "no channels", dense | dict(rgb=nothing, rgb_target=nothing[:, 0])
    yield "no rays", inputs(rays=(0,))
    yield "more dimensions", inputs(rays=(2, 3))


@pytest.mark.parametrize("named", [pytest.param(x, id=name) for name, x in cases()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_sum_and_gradients_are_those_of_the_losses(silent, dtype, named):
    named = pytree.tree_map(
        lambda x: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x, named
    )
    loss, out, wanted = in_one_pass(named)
    want_loss, want, want_wanted = one_by_one(named)
    assert type(loss.grad_fn).__name__ == "_OnePassBackward"
    torch.testing.assert_close((loss, *out), (want_loss, *want))
    assert_same_gradients(loss, wanted, want_loss, want_wanted)


def test_every_backend_makes_them(silent, forced_backend, device):
    for named in (inputs(), {x: y for x, y in packed(inputs()).items() if x != "proposals"}):
        named = pytree.tree_map(lambda x: x.to(device), named)
        loss, out, wanted = in_one_pass(named)
        want_loss, want, want_wanted = one_by_one(named)
        torch.testing.assert_close((loss, *out), (want_loss, *want))
        assert rayfuse.last_backend() == forced_backend
        with rayfuse.use_backend("ref"):
            first = gradients(loss, wanted, retain_graph=True)
            # where it is computed again, it is on the same backend
            again = gradients(loss, wanted)
        if device == "cpu":
            assert rayfuse.last_backend() == forced_backend
        want = gradients(want_loss, want_wanted)
        for name in wanted:
            torch.testing.assert_close(first[name], want[name], msg=name)
            torch.testing.assert_close(again[name], want[name], msg=name)


@pytest.mark.parametrize(
    "op",
    [
        rayfuse.distortion_loss,
        rayfuse.feature_distillation_loss,
        rayfuse.interlevel_loss,
        rayfuse.normal_losses,
        rayfuse.packed_feature_distillation_loss,
        rayfuse.packed_normal_losses,
    ],
    ids=lambda op: op.__name__,
)
def test_losses_and_gradients_are_one_kernel_on_a_cpu(op):
    op = op.op
    if backend.reason("cpu"):
        pytest.skip(backend.reason("cpu"))
    sizes = dict(S=5, C=3, E=4) if not op.integer else dict(P=8, C=3, R=2)
    raw = op.raw_arguments(op.sample(() if op.integer else (2,), **sizes))
    alone = op.kernels.choose("cpu", "cpu")._replace(fwd=None, bwd=None)
    sums, grads = alone.run_fwd_bwd([1.0] * len(op.outputs), raw, 1)
    assert len(sums) == len(op.outputs) and len(grads) == len(op.differentiable)


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_tensors_without_values_have_the_plain_sum(where):
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        sigma, t = torch.empty(5, 9, requires_grad=True), torch.empty(5, 10)
        rgb, wanted = torch.empty(5, 9, 3), torch.empty(5, 3)
        loss, out = rayfuse.field_objective(dict(rgb_loss=1), sigma, t, rgb=rgb, rgb_target=wanted)
    assert loss.shape == () and out.rgb.shape == (5, 3)


def test_features_in_half_precision_beside_float32(silent):
    named = inputs(torch.float32)
    named |= {x: named[x].half() for x in ("rgb", "features", "features_target", "rgb_target")}
    loss, _, wanted = in_one_pass(named)
    assert_same_gradients(loss, wanted, *one_by_one(named)[::2])


def test_normals_without_a_graph(silent):
    """One op makes both of their losses then."""
    named = inputs()
    n = named.pop("n")
    fresh, wanted = leaves(named)
    loss, out = rayfuse.field_objective(MULTIPLIERS, **fresh, n=n)
    want_fresh, want_wanted = leaves(named)
    want = rayfuse.field_losses(**want_fresh, n=n)
    torch.testing.assert_close(tuple(out), tuple(want))
    assert_same_gradients(loss, wanted, weighted(want), want_wanted)


def test_backward_runs_no_op(monkeypatch):
    loss, _, wanted = in_one_pass(inputs())
    for run in ("run_fwd", "run_bwd", "run_fwd_bwd"):
        monkeypatch.delattr(backend.Chosen, run)
    loss.backward()
    reached = {name for name, x in wanted.items() if x.grad is not None}
    # but for the edges of proposals, in which the loss is piecewise constant
    assert reached == {name for name in wanted if not name.endswith("[0]")}


def test_loss_without_a_multiplier_is_computed_and_has_no_gradient(silent):
    want = rayfuse.field_losses(**inputs())
    for multipliers in (dict(rgb_loss=2.0), dict(rgb_loss=2.0, interlevel_loss=0)):
        loss, out, wanted = in_one_pass(inputs(), multipliers)
        torch.testing.assert_close((loss, *out), (2 * want.rgb_loss, *want))
        loss.backward()
        reached = {name for name, x in wanted.items() if x.grad is not None}
        assert reached == {f"['{name}']" for name in ("sigma", "t", "rgb", "rgb_target")}


@pytest.mark.parametrize("scale", [0.5, -3.0, 0.0])
def test_scaled_sum_has_scaled_gradients(silent, scale):
    loss, _, wanted = in_one_pass(inputs())
    want_loss, _, want_wanted = one_by_one(inputs())
    assert_same_gradients(scale * loss, wanted, scale * want_loss, want_wanted)


def test_scaled_sum_of_half_precision_loses_nothing():
    """What a GradScaler is for: gradients that are 0 in float16 before they are scaled."""
    named, tiny = inputs(torch.float16), dict(feature_loss=1e-8)
    loss, _, wanted = in_one_pass(named, tiny)
    assert not gradients(loss, wanted)["['features']"].any()
    loss, _, wanted = in_one_pass(named, tiny)
    want_loss, _, want_wanted = one_by_one(named, tiny)
    with pytest.warns(UserWarning, match="computed again"):
        got = gradients(65536 * loss, wanted)
    want = gradients(65536 * want_loss, want_wanted)
    assert all(torch.equal(x, want[name]) for name, x in got.items())
    assert got["['features']"].any()


@pytest.mark.parametrize("of_loss", [0, 1])
def test_everything_that_is_returned_is_differentiable(of_loss):
    def total(loss, out):
        generator = torch.Generator().manual_seed(1)
        return of_loss * loss + sum(
            (y * torch.rand(y.shape, generator=generator, dtype=y.dtype)).sum() for y in out
        )

    loss, out, wanted = in_one_pass(inputs())
    want_loss, want, want_wanted = one_by_one(inputs())
    with pytest.warns(UserWarning, match="computed again"):
        assert_same_gradients(total(loss, out), wanted, total(want_loss, want), want_wanted)
    loss, out, wanted = in_one_pass(inputs())
    want_loss, want, want_wanted = one_by_one(inputs())
    with pytest.warns(UserWarning, match="computed again"):
        assert_same_gradients(out.depth.sum(), wanted, want.depth.sum(), want_wanted)


def test_second_backward_and_second_derivative(silent):
    loss, _, wanted = in_one_pass(inputs())
    first = gradients(loss, wanted, retain_graph=True)
    again = gradients(loss, wanted, retain_graph=True)
    torch.testing.assert_close(again, first)
    # what was handed over is the caller's, to change as he likes
    for name, x in first.items():
        assert x.numel() == 0 or x.data_ptr() != again[name].data_ptr(), name
    with_graph = gradients(loss, wanted, create_graph=True)
    torch.testing.assert_close(with_graph, first)
    want_loss, _, want_wanted = one_by_one(inputs())
    want = gradients(want_loss, want_wanted, create_graph=True)
    assert_same_gradients(
        sum(x.square().sum() for x in with_graph.values()),
        wanted,
        sum(x.square().sum() for x in want.values()),
        want_wanted,
    )


def test_input_computed_from_another_one_counts_once():
    """With the gradients that were made, and where all is computed again."""
    for scale in (1, 65536):
        named = {**inputs(torch.float16 if scale > 1 else torch.float64), "proposals": []}
        grads = []
        for loss_of in (
            lambda fresh: rayfuse.field_objective(MULTIPLIERS, **fresh)[0],
            lambda fresh: weighted(rayfuse.field_losses(**fresh)),
        ):
            sigma = named["sigma"].clone().requires_grad_()
            rgb = named["rgb"] * sigma[..., None]
            loss = loss_of(named | dict(sigma=sigma, rgb=rgb))
            with warnings.catch_warnings(action="ignore"):
                grads.append(torch.autograd.grad(scale * loss, sigma)[0])
        torch.testing.assert_close(*grads)


def test_what_the_backward_is_done_with_is_freed():
    named, _ = leaves(inputs())
    features = named.pop("features") * 1
    loss, _ = rayfuse.field_objective(MULTIPLIERS, **named, features=features)
    alive = weakref.ref(features)
    del features
    assert alive() is not None, "the backward may want to compute it again"
    loss.backward()
    assert alive() is None


def test_same_to_the_bit_for_any_number_of_threads():
    threads, results = torch.get_num_threads(), []
    named = inputs(torch.float32, rays=(20_011,))
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            loss, out, wanted = in_one_pass(named)
            results.append((loss, *out, *gradients(loss, wanted).values()))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_a_value_for_each_ray_no_gradient_and_no_number_are_the_plain_sum():
    named = inputs()
    loss, _ = rayfuse.field_objective(MULTIPLIERS, **named)
    assert loss.grad_fn is None
    torch.testing.assert_close(loss, one_by_one(named)[0].detach())
    for options in (dict(reduction="none"), dict(denominator=torch.tensor(3.0).double())):
        loss, _, wanted = in_one_pass(named | options)
        want_loss, _, want_wanted = one_by_one(named | options)
        assert_same_gradients(loss.sum(), wanted, want_loss.sum(), want_wanted)
    loss, _, _ = in_one_pass(named | dict(denominator=0))
    assert loss.isinf() or loss.isnan()


def test_compiles_without_a_graph_break_and_batches():
    named = {x: y for x, y in inputs().items() if x != "proposals"}

    def loss(named):
        return rayfuse.field_objective(MULTIPLIERS, **named)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    fresh, wanted = leaves(named)
    assert_same_gradients(compiled(fresh), wanted, *one_by_one(named)[::2])
    batch = pytree.tree_map(lambda x: torch.stack([x, x]), named)
    torch.testing.assert_close(torch.vmap(loss)(batch), loss(named).expand(2))


def test_a_profile_names_the_ops():
    with torch.profiler.profile() as profile:
        in_one_pass(inputs())
    names = {event.key for event in profile.key_averages()}
    ran = rayfuse.last_backend()
    for op in ("ray_weights", "distortion_loss", "feature_distillation_loss"):
        assert f"rayfuse::{op} on {ran}" in names


@pytest.mark.parametrize(
    ("multipliers", "error", "message"),
    [
        ({}, ValueError, r"multipliers must name one or more of rgb_loss, .*, got \[\]"),
        (dict(depth=1), ValueError, r"multipliers must name one or more .*, got \['depth'\]"),
        (dict(rgb_loss="1"), TypeError, "multipliers must hold numbers, got str for rgb_loss"),
        (
            dict(rgb_loss=torch.tensor(1.0)),
            TypeError,
            "multipliers must hold numbers, got Tensor for rgb_loss",
        ),
    ],
    ids=str,
)
def test_wrong_multipliers_are_named(multipliers, error, message):
    for function in (in_one_pass, lambda *a: in_one_pass({**packed(inputs())}, *a[1:])):
        with pytest.raises(error, match=message):
            function(inputs(), multipliers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(reduction="max"), "field_losses: reduction must be 'mean', 'sum' or 'none'"),
        (dict(reduction="sum", denominator=3), "denominator must come with reduction='mean'"),
        (dict(t=torch.rand(5, 9)), r"field_losses: t must have shape \[..., S\+1\] with"),
        (dict(proposals=[(torch.rand(5, 4), torch.rand(5, 4))]), "interlevel_loss: w_env must"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        in_one_pass(inputs(torch.float32) | change)
