"""field_losses against the objective as F3RM and nerfstudio write it."""

import pytest
import torch
import torch.nn.functional as F

import rayfuse
from rayfuse import objective
from rayfuse.objective import FieldLosses

LOSSES = FieldLosses._fields[:6]


def inputs(dtype=torch.float64, device="cpu", rays=(5,), S=9, levels=(17, 6), seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*rays, *shape, generator=generator, dtype=torch.float64)

    def edges(n):
        return F.pad((draw(n) + 0.05).cumsum(-1), (1, 0)) / (n + 1)

    def unit(*shape):
        return F.normalize(draw(*shape, 3) - 0.5, dim=-1)

    s = edges(S)
    named = dict(
        sigma=2 * draw(S),
        t=0.5 + 4 * s,
        rgb=draw(S, 3),
        rgb_target=draw(3),
        features=draw(S, 8),
        features_target=draw(8),
        n=unit(S),
        d=unit(),
        n_pred=unit(S),
        s=s,
    )
    named = {name: x.to(device, dtype) for name, x in named.items()}
    proposals = [(edges(E).to(device, dtype), (draw(E) / E).to(device, dtype)) for E in levels]
    return named | dict(proposals=proposals)


def leaves(named):
    """Fresh copies that want gradients: of everything that may be trained."""
    trained = ("sigma", "rgb", "features", "n", "n_pred")
    named = {
        name: x if name == "proposals" else x.detach().clone().requires_grad_(name in trained)
        for name, x in named.items()
    }
    named["proposals"] = [(s, w.detach().clone().requires_grad_()) for s, w in named["proposals"]]
    return named


def trained(named):
    """The tensors that want gradients, by name."""
    found = {f"w_env_{i}": w for i, (_, w) in enumerate(named["proposals"])}
    return found | {name: x for name, x in named.items() if name != "proposals" and x.requires_grad}


def as_nerfstudio(
    sigma, t, rgb, rgb_target, features, features_target, n, d, n_pred, s, proposals, background
):
    """Losses of each ray, and what is rendered."""
    x = sigma * t.diff(dim=-1)
    w = (1 - torch.exp(-x)) * torch.exp(-F.pad(x[..., :-1].cumsum(-1), (1, 0)))
    accumulation = w.sum(-1)
    image = (w[..., None] * rgb).sum(-2) + (1 - accumulation)[..., None] * background
    mid = (t[..., 1:] + t[..., :-1]) / 2
    depth = ((w * mid).sum(-1) / (accumulation + 1e-10)).clip(mid[..., 0], mid[..., -1])
    fixed, away = w.detach(), (n * d[..., None, :]).sum(-1).clip(min=0)
    m = (s[..., 1:] + s[..., :-1]) / 2
    pairs = (m[..., :, None] - m[..., None, :]).abs()
    interlevel = 0
    for s_env, w_env in proposals:
        until = F.pad(w_env.cumsum(-1), (1, 0))
        last = w_env.shape[-1] - 1
        below = (
            torch.searchsorted(s_env[..., :-1].contiguous(), s[..., :-1].contiguous(), right=True)
            - 1
        )
        above = torch.searchsorted(s_env[..., 1:].contiguous(), s[..., 1:].contiguous(), right=True)
        outer = until.gather(-1, above.clip(0, last) + 1) - until.gather(-1, below.clip(0, last))
        interlevel = interlevel + ((fixed - outer).clip(min=0) ** 2 / (fixed + 1e-7)).mean(-1)
    return FieldLosses(
        rgb_loss=(image - rgb_target).square().mean(-1),
        feature_loss=((w[..., None] * features).sum(-2) - features_target).square().mean(-1),
        orientation_loss=(fixed * away**2).sum(-1),
        predicted_normal_loss=(fixed * (1 - (n.detach() * n_pred).sum(-1))).sum(-1),
        distortion_loss=(w * (w[..., None, :] * pairs).sum(-1)).sum(-1)
        + (w.square() * s.diff(dim=-1)).sum(-1) / 3,
        interlevel_loss=interlevel,
        rgb=image,
        depth=depth,
        accumulation=accumulation,
        weights=w,
    )


def gradients(outputs, named, seed=1):
    """Of random multiples of all outputs, to all that is trained."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(
        (y * (torch.rand(y.shape, generator=generator, dtype=torch.float64) + 0.5).to(y)).sum()
        for y in outputs
    )
    wanted = trained(named)
    return dict(zip(wanted, torch.autograd.grad(total, [*wanted.values()]), strict=True))


def test_every_term_and_gradient_is_that_of_nerfstudio_and_f3rm(forced_backend, device):
    for S, levels in ((9, (17, 6)), (1, (1,)), (40, (64, 33, 8))):
        named = inputs(device=device, S=S, levels=levels)
        background = torch.rand(5, 3, dtype=torch.float64, device=device)
        ours, theirs = leaves(named), leaves(named)
        got = rayfuse.field_losses(**ours, background=background, reduction="none")
        want = as_nerfstudio(**theirs, background=background)
        for name, x, y in zip(FieldLosses._fields, got, want, strict=True):
            torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}")
        want = gradients(want, theirs)
        for name, grad in gradients(got, ours).items():
            torch.testing.assert_close(
                grad, want[name], msg=lambda text, name=name: f"d_{name}: {text}"
            )


def test_gradients_of_a_term_go_where_nerfstudio_sends_them():
    reached = dict(
        rgb_loss={"sigma", "rgb"},
        feature_loss={"sigma", "features"},
        orientation_loss={"n"},
        predicted_normal_loss={"n_pred"},
        distortion_loss={"sigma"},
        interlevel_loss={"w_env_0", "w_env_1"},
    )
    for name, want in reached.items():
        named = leaves(inputs())
        getattr(rayfuse.field_losses(**named), name).backward()
        got = {k for k, x in trained(named).items() if x.grad is not None and x.grad.any()}
        assert got == want, name


def test_normals_without_a_graph_give_the_same_in_one_pass(monkeypatch):
    named = leaves(inputs())
    whole = rayfuse.field_losses(**named)
    want = gradients(whole, named)
    calls = []
    normal_losses = objective.ops.normal_losses

    def counted(*args, **options):
        calls.append(options)
        return normal_losses(*args, **options)

    monkeypatch.setattr(objective.ops, "normal_losses", counted)
    named["n"] = named["n"].detach()
    got = rayfuse.field_losses(**named)
    assert len(calls) == 1
    torch.testing.assert_close(got, whole)
    for name, grad in gradients(got, named).items():
        torch.testing.assert_close(grad, want[name], msg=name)


# the tensor whose absence switches a term off, and the op that then does not run
@pytest.mark.parametrize(
    ("absent", "off", "idle"),
    [
        (
            ("rgb_target", "features_target"),
            ("rgb_loss", "feature_loss"),
            "feature_distillation_loss",
        ),
        (("d", "n_pred"), ("orientation_loss", "predicted_normal_loss"), "normal_losses"),
        (("n",), ("orientation_loss", "predicted_normal_loss"), "normal_losses"),
        (("s", "proposals"), ("distortion_loss", "interlevel_loss"), "distortion_loss"),
        (("proposals",), ("interlevel_loss",), "interlevel_loss"),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_term_without_its_tensors_is_zero_and_its_op_does_not_run(
    monkeypatch, absent, off, idle, reduction
):
    monkeypatch.delattr(objective.ops, idle)
    named = inputs()
    whole = rayfuse.FieldLosses(*as_nerfstudio(**named, background=0))
    got = rayfuse.field_losses(
        **{name: x for name, x in named.items() if name not in absent}, reduction=reduction
    )
    for name in LOSSES:
        want = getattr(whole, name)
        want = torch.zeros_like(want) if name in off else want
        torch.testing.assert_close(
            getattr(got, name), want if reduction == "none" else want.mean(), msg=name
        )


def test_one_of_the_two_losses_of_normals_alone():
    named = inputs()
    whole = rayfuse.field_losses(**named)
    for absent, off, on in (
        ("d", "orientation_loss", "predicted_normal_loss"),
        ("n_pred", "predicted_normal_loss", "orientation_loss"),
    ):
        for n in (named["n"], named["n"].clone().requires_grad_()):
            got = rayfuse.field_losses(**{**named, absent: None, "n": n})
            assert getattr(got, off) == 0
            torch.testing.assert_close(getattr(got, on), getattr(whole, on))


def test_densities_alone_are_rendered_without_colour():
    named = inputs()
    got = rayfuse.field_losses(named["sigma"], named["t"])
    whole = rayfuse.field_losses(**named)
    assert all(getattr(got, name) == 0 for name in LOSSES)
    assert got.rgb.shape == (5, 0)
    for name in ("depth", "accumulation", "weights"):
        assert torch.equal(getattr(got, name), getattr(whole, name))


def packed(named):
    """The same rays end to end, behind an empty one and before another."""
    rays, S = named["sigma"].shape
    flat = {name: named[name].flatten(0, 1) for name in ("sigma", "rgb", "features", "n", "n_pred")}
    for name in ("t", "s"):
        flat[f"{name}_starts"] = named[name][:, :-1].flatten()
        flat[f"{name}_ends"] = named[name][:, 1:].flatten()
    for name in ("rgb_target", "features_target", "d"):
        flat[name] = F.pad(named[name], (0, 0, 1, 1))
    offsets = torch.arange(rays + 1, device=named["sigma"].device) * S
    return flat | dict(offsets=torch.cat([offsets[:1], offsets, offsets[-1:]]))


def test_packed_rays_have_the_losses_of_dense_ones(forced_backend, device):
    ours, theirs = ({**leaves(inputs(device=device)), "proposals": []} for _ in range(2))
    background = torch.rand(3, dtype=torch.float64, device=device)
    options = dict(background=background, reduction="none")
    got = rayfuse.packed_field_losses(**packed(ours), **options)
    want = rayfuse.field_losses(**theirs, **options)
    assert all(x[0] == 0 for x in got[2:6]) and torch.equal(got.rgb[0], background)
    got = [x[1:-1] for x in got[:-1]] + [got.weights.view_as(want.weights)]
    for name, x, y in zip(FieldLosses._fields, got, want, strict=True):
        torch.testing.assert_close(x, y, msg=name)
    want = gradients(want, theirs)
    for name, grad in gradients(got, ours).items():
        torch.testing.assert_close(grad, want[name], msg=name)


def test_normals_may_be_of_the_first_rays():
    named = {**inputs(), "proposals": []}
    some = {name: named[name][:2] for name in ("n", "n_pred", "d")}
    alone = rayfuse.field_losses(named["sigma"][:2], named["t"][:2], **some)[2:4]
    got = rayfuse.field_losses(**named | some, normal_rays=2)
    torch.testing.assert_close(got[2:4], alone)
    whole = packed(named)
    some = dict(n=whole["n"][:18], n_pred=whole["n_pred"][:18], d=whole["d"][:3], normal_rays=3)
    got = rayfuse.packed_field_losses(**whole | some, denominator=2)
    torch.testing.assert_close(got[2:4], alone)
    without = {name: None for name in ("n", "n_pred", "d")}
    assert rayfuse.packed_field_losses(**whole | without)[2:4] == (0, 0)


def test_backgrounds_are_those_of_composite_rays():
    named = inputs()
    for options in (
        dict(background=1.0),
        dict(background=torch.rand(5, 3, dtype=torch.float64)),
        dict(last_sample=True),
        dict(depth="median"),
    ):
        got = rayfuse.field_losses(**named, **options)
        want = rayfuse.composite_rays(
            named["t"], named["sigma"], f=named["rgb"], density=True, **options
        )
        torch.testing.assert_close(got[6:9], tuple(want))
        torch.testing.assert_close(got.rgb_loss, F.mse_loss(want.features, named["rgb_target"]))


def test_micro_batches_with_a_denominator_add_up():
    named = inputs(rays=(6,))
    whole = rayfuse.field_losses(**named)[:6]
    parts = []
    for part in (slice(0, 2), slice(2, 6)):
        some = {name: x[part] for name, x in named.items() if name != "proposals"}
        some["proposals"] = [(s[part], w[part]) for s, w in named["proposals"]]
        parts.append(rayfuse.field_losses(**some, denominator=6)[:6])
        sums = rayfuse.field_losses(**some, reduction="sum")[:6]
        torch.testing.assert_close(sums, tuple(6 * x for x in parts[-1]))
    torch.testing.assert_close(tuple(a + b for a, b in zip(*parts, strict=True)), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_accumulated_in_float32(dtype):
    named = inputs(dtype)
    wide = {name: x if name == "proposals" else x.float() for name, x in named.items()}
    wide["proposals"] = [(s.float(), w.float()) for s, w in named["proposals"]]
    background = torch.rand(5, 3).to(dtype)
    got = rayfuse.field_losses(**named, background=background)
    want = rayfuse.field_losses(**wide, background=background.float())
    assert all(x.dtype == torch.float32 for x in got)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_no_rays_and_more_leading_dimensions():
    for rays in ((0,), (2, 3), ()):
        named = leaves(inputs(rays=rays))
        got = rayfuse.field_losses(**named)
        assert all(x.isfinite().all() for x in got)
        sum(got[:6]).backward()
        assert all(x.grad.shape == x.shape for x in trained(named).values())


def test_batch_of_objectives_is_theirs_one_by_one():
    named = inputs(rays=(2, 3), levels=())
    del named["proposals"]
    with torch.no_grad():
        got = torch.vmap(lambda x: rayfuse.field_losses(**x))(named)
        each = [rayfuse.field_losses(**{name: x[i] for name, x in named.items()}) for i in (0, 1)]
    torch.testing.assert_close(tuple(got), tuple(map(torch.stack, zip(*each, strict=True))))


def test_whole_objective_is_one_graph():
    named = leaves(inputs(torch.float32))
    compiled = torch.compile(rayfuse.field_losses, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tuple(compiled(**named)), tuple(rayfuse.field_losses(**named)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(t=torch.rand(5, 9)), r"field_losses: t must have shape \[..., S\+1\] with"),
        (dict(rgb_target=torch.rand(5, 4)), r"field_losses: rgb_target must have shape \[..., C\]"),
        (dict(n=torch.rand(5, 8, 3)), r"field_losses: n must have shape \[..., S, 3\]"),
        (dict(s=None), "field_losses: s must be given with proposals, got None"),
        (dict(proposals=[(torch.rand(5, 4), torch.rand(5, 4))]), "interlevel_loss: w_env must"),
        (dict(reduction="max"), "reduction must be 'mean', 'sum' or 'none', got 'max'"),
        (dict(last_sample=True, background=1.0), "background must be None with last_sample=True"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        rayfuse.field_losses(**{**inputs(torch.float32), **change})


def test_colours_wanted_of_another_type_are_named():
    named = inputs()
    named["rgb_target"] = named["rgb_target"].float()
    with pytest.raises(
        TypeError, match="rgb_target must be float64 on cpu like sigma, got float32"
    ):
        rayfuse.field_losses(**named)
