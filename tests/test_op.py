"""What the engine makes of a spec, seen on ops of the reference alone that use all it knows."""

from typing import Literal

import pytest
import torch
from torch import Tensor

import rayfuse
from rayfuse.domain import csr, increasing, positive
from rayfuse.op import op, reduced


@op(
    "t[..., S+1] w[..., S] f?[..., S, C] background?[..., C]"
    " -> features[..., C] depth[...] total[...]",
    domain=dict(t=increasing, eps=positive),
    constant=("t",),
    narrow=("f",),
)
def toy(
    t: Tensor,
    w: Tensor,
    *,
    f: Tensor | None = None,
    background: Tensor | None = None,
    mode: Literal["plain", "twice"] = "plain",
    eps: float = 1e-3,
    square: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """A bit of everything."""
    w = w * w if square else w
    total = w.sum(-1)
    depth = (w * t[..., 1:]).sum(-1) / (total + eps)
    features = w.new_zeros((*total.shape, 0 if f is None else f.shape[-1]))
    if f is not None:
        features = (w[..., None] * f).sum(-2) * (2 if mode == "twice" else 1)
        if background is not None:
            features = features + (1 - total)[..., None] * background
    return features, depth, total


@op("w[..., S] -> near_loss[...] far_loss[...]")
def toy_losses(w: Tensor) -> tuple[Tensor, Tensor]:
    """Two losses."""
    return (w * w).sum(-1), (w - 1).square().sum(-1)


@op("w[P] offsets[R+1] -> loss[R]", domain=dict(offsets=csr))
def toy_packed(w: Tensor, offsets: Tensor) -> Tensor:
    """Segmented sums."""
    ray = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    return w.new_zeros(len(offsets) - 1).index_add(0, ray, w * w)


@op("x[..., S] -> y[..., S]")
def toy_scaled(x: Tensor, *, by: float) -> Tensor:
    """A scalar that has no default."""
    return by * x


def sines(x: Tensor) -> tuple[Tensor]:
    return (x.sin(),)


@op("x[..., S] -> loss[...] keeps sine[..., S]", keep=sines)
def toy_keeping(x: Tensor) -> Tensor:
    """Keeps its derivative, but for the sign."""
    return x.cos().sum(-1)


SIZES = dict(S=5, C=3)
SCALARS = dict(mode="twice", eps=0.5, square=True)


def leaves(dtype=torch.float64, leading=(2, 3)):
    t, w, f, background = toy.op.sample(leading, dtype, **SIZES)
    return t, *(x.requires_grad_() for x in (w, f, background))


def test_schema_says_what_is_optional_and_what_a_scalar_is():
    forward = torch.ops.rayfuse.toy.default._schema
    assert str(forward) == (
        "rayfuse::toy(Tensor t, Tensor w, Tensor? f, Tensor? background, int mode, float eps,"
        " bool square) -> (Tensor, Tensor, Tensor)"
    )
    backward = torch.ops.rayfuse.toy_bwd.default._schema
    assert str(backward) == (
        "rayfuse::toy_bwd(Tensor? d_features, Tensor? d_depth, Tensor? d_total, Tensor t, Tensor w,"
        " Tensor? f, Tensor? background, int mode, float eps, bool square, int needs)"
        " -> (Tensor, Tensor, Tensor)"
    )


def test_values_and_gradients_are_those_of_the_reference():
    t, w, f, background = leaves()
    ours = toy(t, w, f=f, background=background, **SCALARS)
    plain = toy.op.reference(t, w, f=f, background=background, **SCALARS)
    d_outputs = [torch.rand_like(x) for x in plain]
    for y, want in zip(ours, plain, strict=True):
        torch.testing.assert_close(y, want)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (w, f, background), d_outputs),
        torch.autograd.grad(plain, (w, f, background), d_outputs),
    )


def test_gradgradcheck_and_gradcheck():
    t, *wanted = leaves(leading=(2,))

    def call(w, f, background):
        return toy(t, w, f=f, background=background, **SCALARS)

    assert torch.autograd.gradcheck(call, wanted)
    assert torch.autograd.gradgradcheck(call, wanted)


def test_gradient_with_a_graph_counts_an_input_computed_from_another_one_once():
    """A fault that there was: the way through the second input counted twice."""
    t, w, f, background = leaves()
    for _ in range(2):
        total = sum(y.square().sum() for y in toy(t, w, f=f, background=background))
        plain, graph = (
            torch.autograd.grad(total, w, retain_graph=True, create_graph=again)[0]
            for again in (False, True)
        )
        torch.testing.assert_close(graph, plain)
        f = f * w[..., None]


def test_absent_tensors_are_none_all_the_way():
    t, w, *_ = leaves()
    features, depth, _ = toy(t, w)
    assert features.shape == (2, 3, 0)
    (d_w,) = torch.autograd.grad(depth.sum(), w)
    want = toy.op.reference(t, w)[1]
    torch.testing.assert_close(d_w, torch.autograd.grad(want.sum(), w)[0])


def test_output_that_nobody_used_has_no_gradient_at_the_kernel(monkeypatch):
    t, w, f, background = leaves()
    seen = []
    chosen = toy.op.kernels.choose("cpu")
    spy = chosen._replace(bwd=lambda *args: seen.append(args) or chosen.bwd(*args))
    monkeypatch.setattr(toy.op.kernels, "choose", lambda *_: spy)
    _, depth, _ = toy(t, w, f=f, background=background)
    d_w, d_f, d_background = torch.autograd.grad(
        depth.sum(), (w, f, background), materialize_grads=True
    )
    assert [x is None for x in seen[0][:3]] == [True, False, True]
    assert d_w.any() and not d_f.any() and not d_background.any()


def test_constant_input_gets_no_gradient():
    t, w, *_ = leaves()
    t.requires_grad_()
    toy(t, w)[1].sum().backward()
    assert t.grad is None and w.grad is not None


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_input_may_be_half_where_the_others_are_not(half):
    t, w, f, background = leaves(torch.float32)
    f = f.detach().to(half).requires_grad_()
    features, *_ = toy(t, w, f=f, background=background)
    assert features.dtype == torch.float32
    d_w, d_f = torch.autograd.grad(features.sum(), (w, f))
    assert (d_w.dtype, d_f.dtype) == (torch.float32, half)


def test_raw_ops_pass_opcheck():
    t, w, f, background = (x.detach() for x in leaves())
    raw = toy.op.raw_arguments((t, w, f, background), **SCALARS)
    assert raw[4:] == (1, 0.5, True)
    torch.library.opcheck(torch.ops.rayfuse.toy.default, raw)
    outputs = torch.ops.rayfuse.toy(*raw)
    for d_outputs in (outputs, (None, outputs[1], None)):
        for needs in range(1, 8):
            args = (*d_outputs, *raw, needs)
            torch.library.opcheck(torch.ops.rayfuse.toy_bwd.default, args)
    absent = toy.op.raw_arguments((t, w, f, background), f=None, background=None)
    torch.library.opcheck(torch.ops.rayfuse.toy.default, absent)


def test_compiles_without_a_graph_break():
    torch.compiler.reset()

    def call(t, w, f, background):
        features, depth, _ = toy(t, w, f=f, background=background, **SCALARS)
        return features.sum() + depth.square().sum()

    args = leaves()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*args), args[1:]), torch.autograd.grad(call(*args), args[1:])
    )
    # and where nothing wants a gradient
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), call(*args))
    plain = [x.detach() for x in args]
    torch.testing.assert_close(compiled(*plain), call(*plain))


def test_vmap_and_torch_func():
    args = toy.op.sample((4, 3), torch.float64, **SIZES)

    def call(t, w, f, background):
        return toy(t, w, f=f, background=background, **SCALARS)

    torch.testing.assert_close(torch.vmap(call)(*args), call(*args))

    def scalar(*args):
        features, _, total = call(*args)
        return features.sum() + total.sum()

    grads = torch.vmap(torch.func.grad(scalar, (1, 2)))(*args)
    want = torch.func.grad(lambda *a: scalar(*a), (1, 2))(*args)
    torch.testing.assert_close(grads, want)


def test_two_losses_are_reduced_alike():
    w = torch.rand(4, 5, dtype=torch.float64, requires_grad=True)
    near, far = toy_losses(w, denominator=8)
    torch.testing.assert_close(near, (w * w).sum() / 8)
    torch.testing.assert_close(far, (w - 1).square().sum() / 8)
    (d_w,) = torch.autograd.grad(near, w)
    torch.testing.assert_close(d_w, w / 4)
    each = torch.vmap(lambda w: toy_losses(w, reduction="sum"))(w)
    torch.testing.assert_close(each, toy_losses(w, reduction="none"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mean_is_to_the_bit_what_torch_divides(dtype):
    for rays in (1, 3, 7, 49, 1000, 4097):
        w = torch.rand(rays, 5, dtype=dtype, generator=torch.Generator().manual_seed(rays))
        w.requires_grad_()
        for denominator in (None, 3, 0.7, 1e6, (1 << 24) + 1, torch.tensor(7.0, dtype=dtype)):
            count = rays if denominator is None else denominator
            mean, _ = toy_losses(w, denominator=denominator)
            each, _ = toy_losses(w, reduction="none")
            assert torch.equal(mean, each.sum() / count)
            ours, right = (torch.autograd.grad(x, w)[0] for x in (2 * mean, each.sum() * 2 / count))
            assert torch.equal(ours, right)


def test_mean_of_what_has_no_value_is_torchs():
    with torch.no_grad():
        assert reduced(torch.empty(3, device="meta"), "mean", None).is_meta


def test_denominator_of_0_divides_as_torch_does():
    w = torch.rand(4, 5, requires_grad=True)
    for denominator in (0, torch.tensor(0.0)):
        loss, _ = toy_losses(w, denominator=denominator)
        loss.backward()
        assert loss.isinf() and w.grad.isinf().all()


def test_packed_rays_have_integer_offsets():
    w, offsets = toy_packed.op.sample((), torch.float64, P=20, R=7)
    assert offsets.dtype == torch.int64 and offsets[0] == 0 and offsets[-1] == 20
    assert (offsets.diff() == 0).any()
    assert torch.autograd.gradcheck(toy_packed, (w.requires_grad_(), offsets))
    assert toy_packed(w, offsets, reduction="none").shape == (7,)
    with pytest.raises(TypeError, match="toy_packed: offsets must be int64, got int32"):
        toy_packed(w, offsets.int())
    with pytest.raises(NotImplementedError, match="toy_packed: vmap needs leading dimensions"):
        torch.vmap(toy_packed, in_dims=(0, None))(w.expand(2, 20), offsets)
    offsets[3] = 21
    with rayfuse.debug(), pytest.raises(ValueError, match=r"offsets must rise .* got 21 at \[3\]"):
        toy_packed(w, offsets)


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        (dict(mode="thrice"), ValueError, "mode must be 'plain' or 'twice', got 'thrice'"),
        (dict(mode=1), TypeError, "mode must be 'plain' or 'twice', got 1"),
        (dict(eps="small"), TypeError, "eps must be a number, got 'small'"),
        (dict(eps=0.0), ValueError, "eps must be finite and > 0, got 0"),
        (dict(square=1), TypeError, "square must be True or False, got 1"),
        (dict(f=3), TypeError, "f must be a tensor or None, got int"),
        (dict(f=torch.rand(5, 3)), ValueError, "f must have shape [..., S, C]"),
        (dict(unknown=1), TypeError, "got an unexpected keyword argument 'unknown'"),
    ],
)
def test_errors_name_the_argument_the_rule_and_the_value(named, error, message):
    t, w, *_ = toy.op.sample((2,), **SIZES)
    for _ in range(2):
        with pytest.raises(error) as raised:
            toy(t, w, **named)
        assert str(raised.value).startswith("toy: ")
        assert message in str(raised.value)


def test_a_profile_names_the_op_and_where_it_ran():
    with torch.profiler.profile() as profile:
        rayfuse.distortion_loss(torch.linspace(0, 1, 6), torch.rand(5))
    names = {event.key for event in profile.key_averages()}
    assert f"rayfuse::distortion_loss on {rayfuse.last_backend()}" in names


def test_a_scalar_without_a_default_must_be_given():
    x = torch.rand(3)
    assert torch.equal(toy_scaled(x, by=2.0), 2 * x)
    with pytest.raises(TypeError, match="toy_scaled: missing a required argument: 'by'"):
        toy_scaled(x)


def test_named_tensors_and_wrong_dtypes():
    t, w, f, _ = toy.op.sample((2,), **SIZES)
    for y, want in zip(toy(w=w, t=t, f=f), toy(t, w, f=f), strict=True):
        assert torch.equal(y, want)
    rule = "f must be float32 like t, or bfloat16 or float16, got float64"
    with pytest.raises(TypeError, match=rule):
        toy(t, w, f=f.double())
    with pytest.raises(ValueError, match="mode must be < 2, got 2"):
        torch.ops.rayfuse.toy(t, w, f, None, 2, 0.5, False)


def test_what_is_kept_reaches_the_backward_and_nobody_else(monkeypatch):
    x = torch.rand(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert str(torch.ops.rayfuse.toy_keeping_bwd.default._schema) == (
        "rayfuse::toy_keeping_bwd(Tensor d_loss, Tensor sine, Tensor x, int needs) -> Tensor"
    )
    seen = []
    chosen = toy_keeping.op.kernels.choose("cpu")

    def bwd(d_loss, sine, x, needs):
        seen.append(sine)
        return -d_loss[..., None] * sine

    spy = chosen._replace(bwd=bwd)
    monkeypatch.setattr(toy_keeping.op.kernels, "choose", lambda *_: spy)
    loss = toy_keeping(x)
    assert loss.shape == ()
    (d_x,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(d_x, -x.sin() / 6)
    torch.testing.assert_close(seen[0], x.sin())
    with pytest.raises(ValueError, match=r"sine must have shape \[2, 3, 5\], got \[2, 3, 4\]"):
        torch.ops.rayfuse.toy_keeping_bwd(torch.ones(2, 3), x[..., 1:], x, 1)


def test_what_is_kept_goes_through_compile_vmap_and_grad():
    x = torch.rand(2, 3, 5, dtype=torch.float64, requires_grad=True)
    want = -x.detach().sin()
    compiled = torch.compile(toy_keeping, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x, reduction="sum"), x)[0], want)
    each = torch.vmap(torch.func.grad(lambda x: toy_keeping(x, reduction="sum")))
    torch.testing.assert_close(each(x.detach()), want)
    torch.testing.assert_close(torch.vmap(toy_keeping)(x), x.cos().sum(-1).mean(-1))
    assert torch.autograd.gradgradcheck(toy_keeping, (x,))
