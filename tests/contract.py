"""What every op keeps on every backend.

An op's test class derives from Contract and says what it is and which sizes are worth a test; all
inputs come from the op's own spec.
"""

import contextlib
import functools
import math
import re
from pathlib import Path

import pytest
import torch

import rayfuse
from conftest import DTYPES, EMULATED
from rayfuse import backend
from rayfuse.op import HALVES

LEADING = [(), (1,), (5,), (2, 3), (0,)]
OF_LOSSES = (
    "test_reductions_agree_with_the_values_per_ray",
    "test_micro_batches_with_a_denominator_add_up_to_the_batch",
    "test_no_rays_give_exactly_zero_with_a_graph",
    "test_reduction_and_denominator_are_checked",
    "test_losses_and_gradients_at_once_are_both",
)
OF_NARROW = ("test_narrow_inputs_beside_float32_are_read_as_they_are",)
OF_KEPT = ("test_what_is_kept_is_as_right_as_torch",)


def as_tuple(out):
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def are_same(ours, right):
    """Whether two variants of a kernel gave the same value: to the bit.

    But for what triton compiled: it fuses products and sums in each variant as it likes, and orders
    a sum by the layout that suits the loads; there, within some roundings of the largest value.
    """
    if rayfuse.last_backend() != "triton" or "triton" in EMULATED or right.numel() == 0:
        return torch.equal(ours, right)
    sums = torch.promote_types(right.dtype, torch.float32)
    finite = torch.where(right.isinf(), 0, right)
    allowed = 16 * torch.finfo(sums).eps * finite.abs().amax()
    if right.dtype != sums:
        allowed = allowed + torch.finfo(right.dtype).eps * finite.abs()
    # what half precision cannot hold is infinite in both
    alike = (ours == right) | ((ours - right).abs() <= allowed)
    return ours.dtype == right.dtype and bool(alike.all())


LINUX = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux says what a process holds"
)


def resident(key="VmRSS", file="status"):
    """Megabytes of this process."""
    return int(Path(f"/proc/self/{file}").read_text().split(f"{key}:")[1].split()[0]) / 1024


class Contract:
    """Set `op` to the public function and `sizes` to dicts of its size letters."""

    op = None
    sizes: tuple[dict[str, int], ...] = ()
    # a size in the middle: big enough for every path, small enough for finite differences
    typical: dict[str, int] = {}
    leading = (7,)
    # keywords to check values and gradients under, None for an optional tensor that is absent; all
    # other tests use the first
    variants: tuple[dict[str, object], ...] = ({},)
    # what GPU kernels are compiled for: aligned and not, in one block and in many
    gpu_sizes: tuple[dict[str, int], ...] = ()
    # a GPU kernel that may spill, as docs/gpu names it -> why
    gpu_spills: dict[str, str] = {}
    # whether the quick suite tests what is the engine's on all backends with this op, or on one
    engine_on_every_backend = False

    def __init_subclass__(cls):
        if cls.op is None:
            return
        cls.spec = cls.op.op
        # what would not apply is not collected
        for applies, tests in (
            (cls.spec.is_loss, OF_LOSSES),
            (cls.spec.narrow, OF_NARROW),
            (cls.spec.signature.kept, OF_KEPT),
        ):
            for test in tests if not applies else ():
                setattr(cls, test, None)

    # ---- inputs

    def inputs(self, leading=None, dtype=torch.float32, device="cpu", seed=0, **sizes):
        leading = self.leading if leading is None else leading
        sizes = sizes or self.typical
        return [x.to(device) for x in self.spec.sample(leading, dtype, seed, **sizes)]

    def floating(self, args):
        """The places of inputs that are not integers."""
        return [i for i, x in enumerate(args) if x.is_floating_point()]

    def differentiable(self, variant=None):
        """The places of inputs that get a gradient."""
        absent = self.variants[0] if variant is None else variant
        inputs = self.spec.inputs
        return [i for i in self.spec.differentiable if absent.get(inputs[i], 0) is not None]

    def leaves(self, args, wanted=None):
        """Fresh copies, of which those that get a gradient want one."""
        wanted = self.spec.differentiable if wanted is None else wanted
        return [x.detach().clone().requires_grad_(i in wanted) for i, x in enumerate(args)]

    # ---- calls

    def call(self, args, variant=None, **options):
        """The op on its inputs in order, those that are optional by name."""
        named = {**(self.variants[0] if variant is None else variant), **options}
        required = []
        for array, x in zip(self.spec.signature.inputs, args, strict=True):
            if array.optional:
                named.setdefault(array.name, x)
            else:
                required.append(x)
        return type(self).op(*required, **named)

    def outputs(self, args, variant=None):
        """All outputs, one value per ray of losses."""
        options = {"reduction": "none"} if self.spec.is_loss else {}
        return as_tuple(self.call(args, variant, **options))

    def objective(self, args, **options):
        """A number: the mean losses, or the sum of all outputs squared."""
        out = as_tuple(self.call(args, **options))
        return sum(out) if self.spec.is_loss else sum(y.square().sum() for y in out)

    def d_outputs(self, args, variant=None, seed=1):
        """Random gradients of all outputs."""
        present = [
            None if (variant or {}).get(name, 0) is None else x.shape
            for name, x in zip(self.spec.inputs, args, strict=True)
        ]
        leading, sizes = self.spec.signature.bind(present)
        generator = torch.Generator().manual_seed(seed)
        wide = torch.promote_types(args[0].dtype, torch.float32)
        return [
            (torch.rand(y.shape(leading, sizes), generator=generator) + 0.5).to(
                args[0].device, wide
            )
            for y in self.spec.signature.outputs
        ]

    def gradients(self, args, d_outputs=None, variant=None):
        """The outputs per ray and the gradients of all inputs that get one."""
        variant = self.variants[0] if variant is None else variant
        args = self.leaves(args)
        outputs = self.outputs(args, variant)
        if d_outputs is None:
            d_outputs = self.d_outputs(args, variant)
        wanted = [args[i] for i in self.differentiable(variant)]
        d_outputs = [d_y.to(y.dtype) for y, d_y in zip(outputs, d_outputs, strict=True)]
        return outputs, torch.autograd.grad(outputs, wanted, d_outputs, materialize_grads=True)

    def gradients_of_objective(self, args, **options):
        args = self.leaves(args)
        value = self.objective(args, **options)
        return value.detach(), torch.autograd.grad(value, [args[i] for i in self.differentiable()])

    def results_of_torch(self, args, variant):
        """The truth in float64, and torch's own arithmetic in the dtype of the inputs."""
        args = [x.cpu() for x in args]
        d_outputs = self.d_outputs(args, variant)
        with rayfuse.use_backend("ref"):
            wide = [x.double() if x.is_floating_point() else x for x in args]
            true = self.gradients(wide, d_outputs, variant)
            return true, self.gradients(args, d_outputs, variant)

    @classmethod
    @functools.lru_cache(1000)
    def results_of_torch_at(cls, leading, dtype, i, v):
        """Computed once for all backends."""
        suite = cls()
        args = suite.inputs(leading, dtype, seed=i, **cls.sizes[i])
        return suite.results_of_torch(args, cls.variants[v])

    def assert_as_right_as_torch(self, args, what="", variant=None, results_of_torch=None):
        """|ours - f64| <= |torch's own arithmetic in this dtype - f64| + a few roundings.

        Returns our outputs and gradients.
        """
        variant = self.variants[0] if variant is None else variant
        ours = self.gradients(args, variant=variant)
        true, torch_ = results_of_torch or self.results_of_torch(args, variant)
        names = [
            *self.spec.outputs,
            *(f"d_{self.spec.inputs[i]}" for i in self.differentiable(variant)),
        ]
        for name, ours_, torch__, true_ in zip(
            names, *((*values, *grads) for values, grads in (ours, torch_, true)), strict=True
        ):
            self.assert_no_worse(f"{name} {what}", ours_, torch__, true_)
        return ours

    def assert_no_worse(self, what, ours, torch_, true):
        """The same of one tensor."""
        assert ours.shape == true.shape, what
        if true.numel() == 0:
            return
        scale = true.abs().max().clamp(min=1e-30)
        # in float64 the truth itself carries the roundings of a sum in another order
        roundings = 4 * torch.finfo(ours.dtype).eps if ours.dtype != true.dtype else 1e-12
        allowed = (torch_.double() - true).abs() + roundings * scale
        error = (ours.detach().cpu().double() - true).abs()
        worst = (error / allowed).max().item()
        assert worst <= 1, f"{what}: error is {worst:.2f} of what torch's own allows"

    def assert_equal(self, got, want, what="", same=torch.equal):
        """Two results of `gradients`, to the bit, or with are_same() of two variants."""
        for ours, right in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
            assert same(ours, right), what

    # ---- values

    def turn(self, v, dtype):
        """The places of a size whose turn it is with a variant and type, and of the last."""
        turn = v + len(self.variants) * DTYPES.index(dtype)
        return {turn % len(self.sizes), len(self.sizes) - 1}

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
    def test_values_and_gradients_are_as_right_as_torch(
        self, forced_backend, device, dtype, thorough
    ):
        # half precision is float32's at every size by the next test
        every_size = thorough or dtype not in HALVES
        # variants take turns where a call takes long, or where torch is held against itself
        every_pair = every_size and (thorough or forced_backend not in ("ref", *EMULATED))
        for v, variant in enumerate(self.variants):
            whole = every_pair or (v == 0 and every_size)
            for i in range(len(self.sizes)) if whole else self.turn(v, dtype):
                # what differs between variants, or sizes, does not depend on the leading shape
                for leading in {(5,), LEADING[i % len(LEADING)]} if v == 0 else [(5,)]:
                    args = self.inputs(leading, dtype, device, seed=i, **self.sizes[i])
                    outputs, grads = self.assert_as_right_as_torch(
                        args,
                        f"at {self.sizes[i]}, {leading}, {variant}",
                        variant,
                        self.results_of_torch_at(leading, dtype, i, v),
                    )
                    sums = torch.promote_types(dtype, torch.float32)
                    assert all(y.dtype == sums for y in outputs)
                    assert all(g.dtype == dtype for g in grads)

    @pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
    def test_half_precision_is_float32_rounded_once(self, forced_backend, device, dtype):
        for sizes in self.sizes:
            args = self.inputs(dtype=dtype, device=device, **sizes)
            wide = [x.float() if x.is_floating_point() else x for x in args]
            self.assert_rounded_once(args, wide)

    @pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
    def test_narrow_inputs_beside_float32_are_read_as_they_are(
        self, forced_backend, device, dtype, thorough
    ):
        whole = thorough or forced_backend not in EMULATED
        for sizes in self.sizes if whole else self.sizes[::-3]:
            args = self.inputs(dtype=torch.float32, device=device, **sizes)
            mixed = [
                x.to(dtype) if name in self.spec.narrow else x
                for name, x in zip(self.spec.inputs, args, strict=True)
            ]
            wide = [x.float() if x.is_floating_point() else x for x in mixed]
            self.assert_rounded_once(mixed, wide)

    def assert_rounded_once(self, args, wide):
        outputs, grads = self.gradients(args)
        wide_outputs, wide_grads = self.gradients(wide)
        inputs = [args[i] for i in self.differentiable()]
        rounded = [grad.to(x.dtype) for x, grad in zip(inputs, wide_grads, strict=True)]
        self.assert_equal((outputs, grads), (wide_outputs, rounded), same=are_same)

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
    def test_what_is_kept_is_as_right_as_torch(self, forced_backend, device, dtype, thorough):
        whole = thorough or forced_backend not in EMULATED
        for i, sizes in enumerate(self.sizes if whole else self.sizes[::-3]):
            args = self.inputs(dtype=dtype, seed=i, **sizes)
            wide = [x.double() if x.is_floating_point() else x for x in args]
            variant = self.variants[0]
            ours = self.kept(self.spec.raw_arguments([x.to(device) for x in args], **variant))
            with rayfuse.use_backend("ref"):
                torch_, true = (
                    self.kept(self.spec.raw_arguments(x, **variant)) for x in (args, wide)
                )
            for array, *of_each in zip(self.spec.signature.kept, ours, torch_, true, strict=True):
                assert of_each[0].dtype == torch.promote_types(dtype, torch.float32)
                self.assert_no_worse(f"{array.name} at {sizes}", *of_each)

    def test_backend_that_was_forced_is_the_one_that_runs(self, forced_backend, device):
        with rayfuse.use_backend("ref"):
            self.call(self.inputs(device=device))
        value = self.objective(self.leaves(self.inputs(device=device)))
        assert rayfuse.last_backend() == forced_backend
        with rayfuse.use_backend("ref"):
            value.backward()
        assert rayfuse.last_backend() == forced_backend, "the backward ran on another backend"

    def test_gradients_pass_gradcheck(self, forced_backend, device, thorough):
        args = self.leaves(self.inputs((3,), torch.float64, device))
        # torch is right about its own; and where a call takes long, all values were compared with
        # torch's in float64
        fast = forced_backend in ("ref", *EMULATED)
        some = forced_backend in EMULATED and not thorough
        for variant in self.variants[:1] if some else self.variants:
            assert torch.autograd.gradcheck(
                lambda *a: self.outputs(a, variant),  # noqa: B023
                args,
                fast_mode=fast,
                # autograd's own, whatever the variant
                check_undefined_grad=variant is self.variants[0],
            )
        if self.spec.is_loss:
            for reduction in ("mean", "sum"):
                assert torch.autograd.gradcheck(
                    lambda *a: self.call(a, reduction=reduction),  # noqa: B023
                    args,
                    fast_mode=True,
                )

    @pytest.mark.engine
    def test_second_derivatives_pass_gradgradcheck(self, forced_backend, device):
        """They are torch's, of the reference."""
        args = self.leaves(self.inputs((2,), torch.float64, device))
        assert torch.autograd.gradgradcheck(lambda *a: self.call(a), args, fast_mode=True)
        # a gradient with a graph is the same gradient, whichever inputs want one
        for i in self.differentiable():
            one = self.leaves(args, [i])
            (plain,) = torch.autograd.grad(self.objective(one), one[i])
            (graph,) = torch.autograd.grad(self.objective(one), one[i], create_graph=True)
            torch.testing.assert_close(graph, plain)

    def test_gradient_that_is_not_wanted_leaves_the_others_as_they_are(
        self, forced_backend, device
    ):
        args = self.inputs(device=device)
        d_outputs = self.d_outputs(args)
        _, everything = self.gradients(args, d_outputs)
        for i, whole in zip(self.differentiable(), everything, strict=True):
            alone = self.leaves(args, [i])
            torch.autograd.backward(self.outputs(alone), d_outputs)
            assert are_same(alone[i].grad, whole)
            assert all(x.grad is None for j, x in enumerate(alone) if j != i)

    # ---- reductions

    @pytest.mark.parametrize("rays", [(3, 7), (40_000,)], ids=str)
    def test_reductions_agree_with_the_values_per_ray(self, forced_backend, device, rays):
        if forced_backend in EMULATED:
            rays = tuple(min(n, 40) for n in rays)
        args = self.inputs(rays, device=device, **self.sizes[1])
        each = self.outputs(args)
        for reduction in ("mean", "sum"):
            reduced = as_tuple(self.call(args, reduction=reduction))
            for value, loss in zip(reduced, each, strict=True):
                want = getattr(loss.double(), reduction)()
                torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=0)

    def test_micro_batches_with_a_denominator_add_up_to_the_batch(self, forced_backend, device):
        args = self.inputs((6,), torch.float64, device)
        whole = self.gradients_of_objective(args)
        total, grads = 0, []
        for part in (slice(0, 1), slice(1, 6)):
            for denominator in (6, torch.tensor(6.0, dtype=torch.float64, device=device)):
                loss, grad = self.gradients_of_objective(
                    [x[part] for x in args], denominator=denominator
                )
            total, grads = total + loss, [*grads, grad]
        torch.testing.assert_close(total, whole[0])
        for parts, full in zip(zip(*grads, strict=True), whole[1], strict=True):
            torch.testing.assert_close(torch.cat(parts), full)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_no_rays_give_exactly_zero_with_a_graph(self, forced_backend, device, reduction):
        args = self.leaves(self.inputs((0,), device=device))
        loss = self.objective(args, reduction=reduction)
        loss.backward()
        assert loss.item() == 0
        assert all(args[i].grad.shape == args[i].shape for i in self.differentiable())

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
    def test_losses_and_gradients_at_once_are_both(self, forced_backend, device, dtype, thorough):
        """Sums over the rays, as `field_objective` asks for; one by one where there is no such
        kernel."""
        numbers = [0.75 - 0.5 * j for j in range(len(self.spec.outputs))]
        places = range(len(self.spec.differentiable))
        chosen, every = self.spec.kernels.choose(device), (1 << len(places)) - 1
        whole = thorough or forced_backend not in ("ref", *EMULATED)
        for v, variant in enumerate(self.variants):
            for i in range(len(self.sizes)) if whole else self.turn(v, dtype):
                what = f"at {self.sizes[i]}, {variant}"
                leading = LEADING[i % len(LEADING)]
                args = self.inputs(leading, dtype, device, seed=i, **self.sizes[i])
                raw = self.spec.raw_arguments(args, **variant)
                sums, grads = chosen.run_fwd_bwd(numbers, raw, every)
                out = as_tuple(chosen.run_fwd(raw))
                losses, kept = out[: len(numbers)], out[len(numbers) :]
                want = [x.double().sum().to(x.dtype) for x in losses]
                d_losses = map(torch.full_like, losses, numbers)
                want_grads = as_tuple(chosen.run_bwd((*d_losses, *kept, *raw), every))
                for x, y in zip((*sums, *grads), (*want, *want_grads), strict=True):
                    self.assert_alike(x, y, what)
                for bit in places:
                    alone = chosen.run_fwd_bwd(numbers, raw, 1 << bit)
                    assert are_same(alone[1][bit], grads[bit]), what
                    assert all(map(are_same, alone[0], sums)), what
                    assert all(x.numel() == 0 for j, x in enumerate(alone[1]) if j != bit)

    def assert_alike(self, ours, right, what):
        """Within some roundings of the largest value."""
        assert ours.shape == right.shape and ours.dtype == right.dtype, what
        eps = 16 * torch.finfo(torch.promote_types(right.dtype, torch.float32)).eps
        size = right.double().where(right.isfinite(), 0).abs()
        allowed = eps * size.flatten().max() if size.numel() else 0
        error = (ours.double() - right.double()).abs()
        rounded = error <= allowed + torch.finfo(right.dtype).eps * size
        # what half precision cannot hold is infinite in both
        assert bool((rounded | (ours == right)).all()), what

    # ---- memory

    def test_layouts_do_not_change_the_result(self, forced_backend, device):
        args = self.inputs((6,), device=device)
        d_outputs = self.d_outputs(args)
        want = self.gradients(args, d_outputs)

        def strided(x):
            return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]

        def misaligned(x):
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

        def transposed(x):
            return x.transpose(0, -1).contiguous().transpose(0, -1)

        for layout in (strided, misaligned, transposed):
            moved = [layout(x) for x in args]
            for i in self.spec.differentiable:
                moved[i].requires_grad_()
            outputs = self.outputs(moved)
            wanted = [moved[i] for i in self.differentiable()]
            grads = torch.autograd.grad(outputs, wanted, d_outputs, materialize_grads=True)
            self.assert_equal((outputs, grads), want, layout.__name__)

    def test_expanded_inputs_and_gradients_are_read_right(self, forced_backend, device):
        one = self.inputs((1,), torch.float64, device)
        args = [x.expand(4, *x.shape[1:]) for x in one]
        for i in self.spec.differentiable:
            args[i].requires_grad_()
        outputs = self.outputs(args)
        # an expanded gradient has stride 0
        d_one = [y.detach()[:1] for y in outputs]
        d_outputs = [d_y.expand(4, *d_y.shape[1:]) for d_y in d_one]
        wanted = [args[i] for i in self.differentiable()]
        grads = torch.autograd.grad(outputs, wanted, d_outputs, materialize_grads=True)
        want, full = self.gradients(one, d_one)
        for ours, whole in zip((*outputs, *grads), (*want, *full), strict=True):
            assert torch.equal(ours, whole.expand_as(ours))

    def test_every_output_is_written(self, forced_backend, device):
        """Memory that held NaN before must not show through."""
        for sizes in self.sizes:
            args = self.inputs(device=device, **sizes)
            d_outputs = self.d_outputs(args)
            # what was freed last is handed out first
            like = [args[i] for i in self.floating(args)]
            poison = [torch.full_like(x, torch.nan) for x in (*like, *like, *d_outputs, *d_outputs)]
            del poison
            outputs, grads = self.gradients(args, d_outputs)
            assert all(torch.isfinite(x).all() for x in (*outputs, *grads)), sizes

    def test_inputs_stay_as_they_are_through_two_backwards(self, forced_backend, device):
        args = self.leaves(self.inputs(device=device))
        before = [x.detach().clone() for x in args]
        value = self.objective(args)
        value.backward(retain_graph=True)
        first = [args[i].grad.clone() for i in self.differentiable()]
        value.backward()
        assert all(map(torch.equal, args, before))
        for i, grad in zip(self.differentiable(), first, strict=True):
            assert torch.equal(args[i].grad, 2 * grad)

    def test_gradients_have_memory_of_their_own(self, forced_backend, device):
        """Who gets them may add to them in place."""
        args = self.inputs(device=device)
        raw = self.spec.raw_arguments(args, **self.variants[0])
        given = (*self.d_outputs(args, self.variants[0]), *self.kept(raw), *raw)
        chosen, places = self.spec.kernels.choose(device), len(self.spec.differentiable)
        grads = [x for x in as_tuple(chosen.run_bwd(given, (1 << places) - 1)) if x.numel()]
        others = [x for x in given if torch.is_tensor(x) and x.numel()]
        assert all(x.is_contiguous() for x in grads)
        assert len({x.data_ptr() for x in (*grads, *others)}) == len(grads) + len(others)

    # ---- repeatability and bad values

    def test_result_is_the_same_to_the_bit_for_any_number_of_threads(self, forced_backend, device):
        # so many rays that torch's own sum of them depends on the number of threads
        for rays in (43,) if forced_backend in EMULATED else (100_003, 200_003):
            args = self.inputs((rays,), device=device, **self.sizes[2])
            self.assert_the_same_for_any_number_of_threads(args, forced_backend)

    def assert_the_same_for_any_number_of_threads(self, args, backend):
        threads, d_outputs = torch.get_num_threads(), self.d_outputs(args)
        results = []
        try:
            for n in (1, 2, 3, 4, 2) if backend.startswith("cpu") else (1, 3):
                torch.set_num_threads(n)
                results.append(self.gradients(args, d_outputs))
                if self.spec.is_loss:
                    value, grads = self.gradients_of_objective(args)
                    results[-1] = ((*results[-1][0], value), (*results[-1][1], *grads))
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            self.assert_equal(result, results[0])

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
    def test_bad_value_stays_in_its_own_ray(self, forced_backend, device, bad):
        clean = self.inputs((9,), device=device)
        d_outputs = self.d_outputs(clean)
        want = self.gradients(clean, d_outputs)
        others = [0, 2, 3, 5, 6, 8]
        for i in self.floating(clean):
            values = clean[i][0].numel()
            args = [y.clone() for y in clean]
            for r, place in zip((1, 4, 7), (0, values // 2, values - 1), strict=True):
                if values:
                    args[i][r].view(-1)[place] = bad
            got = self.gradients(args, d_outputs)
            for ours, right in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
                assert torch.equal(ours[others], right[others])

    def test_nan_comes_out_as_nan(self, forced_backend, device):
        clean = self.inputs(device=device)
        for i in self.differentiable():
            args = [y.clone() for y in clean]
            args[i][3].view(-1)[min(1, args[i][3].numel() - 1)] = torch.nan
            nans = [y.reshape(len(y), -1).isnan().any(1) for y in self.outputs(args)]
            nan = torch.stack(nans).any(0)
            assert nan.tolist() == [ray == 3 for ray in range(self.leading[0])], self.spec.inputs[i]

    # ---- torch's machinery

    def raw_calls(self, dtype, device):
        """The raw forward with its arguments; the raw backward, and its own but for `needs`."""
        fwd, bwd = (
            getattr(torch.ops.rayfuse, self.spec.name + suffix).default for suffix in ("", "_bwd")
        )
        tensors = self.inputs((2, 3), dtype, device)
        raw = self.spec.raw_arguments(tensors, **self.variants[0])
        return fwd, raw, bwd, (*self.d_outputs(tensors, self.variants[0]), *self.kept(raw), *raw)

    def kept(self, raw):
        """What the raw forward leaves to the backward alone."""
        if not self.spec.signature.kept:
            return ()
        out = getattr(torch.ops.rayfuse, self.spec.name)(*raw)
        return as_tuple(out)[len(self.spec.outputs) :]

    def test_kernels_return_what_was_registered(self, forced_backend, device):
        places = len(self.spec.differentiable)
        own = ("test_schema", "test_faketensor")
        for dtype in (torch.float64, torch.float16):
            fwd, raw, bwd, raw_bwd = self.raw_calls(dtype, device)
            torch.library.opcheck(fwd, raw, test_utils=own)
            for needs in {*(1 << i for i in range(places)), (1 << places) - 1}:
                torch.library.opcheck(bwd, (*raw_bwd, needs), test_utils=own)

    @pytest.mark.engine
    def test_raw_ops_pass_opcheck(self, forced_backend, device):
        fwd, raw, bwd, raw_bwd = self.raw_calls(torch.float16, device)
        torch.library.opcheck(fwd, raw)
        torch.library.opcheck(bwd, (*raw_bwd, (1 << len(self.spec.differentiable)) - 1))

    @pytest.mark.engine
    def test_compiles_without_a_graph_break(self, forced_backend, device):
        torch.compiler.reset()
        compiled = torch.compile(
            lambda *a: self.objective(a).sin(), fullgraph=True, backend="aot_eager", dynamic=True
        )
        for rays in (4, 7):
            args = self.leaves(self.inputs((rays,), torch.float64, device))
            wanted = [args[i] for i in self.differentiable()]
            grads = torch.autograd.grad(compiled(*args), wanted)
            want = torch.autograd.grad(self.objective(args).sin(), wanted)
            for ours, right in zip(grads, want, strict=True):
                torch.testing.assert_close(ours, right)
        assert rayfuse.last_backend() == forced_backend

    @pytest.mark.engine
    def test_vmap_is_one_more_leading_dimension(self, forced_backend, device):
        args = self.inputs((4, 3), torch.float64, device)
        losses = self.spec.is_loss
        for options in [{"reduction": r} for r in ("none", "mean", "sum")] if losses else [{}]:

            def one(*a, options=options):
                return as_tuple(self.call(a, **options))

            def stacked(calls):
                return tuple(map(torch.stack, zip(*calls, strict=True)))

            want = stacked(one(*[x[i] for x in args]) for i in range(4))
            torch.testing.assert_close(torch.vmap(one)(*args), want)
            last = [x.movedim(0, -1) for x in args]
            torch.testing.assert_close(torch.vmap(one, in_dims=-1)(*last), want)
        # only the last input has a batch dimension
        shared = [x[0] for x in args[:-1]]
        got = torch.vmap(one, in_dims=(*[None] * len(shared), 0))(*shared, args[-1])
        torch.testing.assert_close(got, stacked(one(*shared, x) for x in args[-1]))
        # the raw op batches by itself
        raw = getattr(torch.ops.rayfuse, self.spec.name)

        def raw_one(*a):
            return raw(*self.spec.raw_arguments(a, **self.variants[0]))

        torch.testing.assert_close(torch.vmap(raw_one)(*args), raw_one(*args))
        assert rayfuse.last_backend() == forced_backend

    @pytest.mark.engine
    def test_torch_func_gives_the_gradients_of_autograd(self, forced_backend, device):
        args = self.inputs((4, 3), torch.float64, device)
        wanted = tuple(self.differentiable())
        per_sample = torch.vmap(torch.func.grad(lambda *a: self.objective(a), wanted))(*args)
        for i in range(4):
            _, want = self.gradients_of_objective([x[i] for x in args])
            for ours, right in zip(per_sample, want, strict=True):
                torch.testing.assert_close(ours[i], right)

    def test_autocast_keeps_the_rule_of_float32_sums(self, forced_backend, device):
        for dtype in (torch.float32, torch.bfloat16):
            args = self.leaves(self.inputs(dtype=dtype, device=device))
            with torch.autocast(device, torch.bfloat16):
                outputs = self.outputs(args)
            torch.autograd.backward(outputs, self.d_outputs(args))
            assert all(y.dtype == torch.float32 for y in outputs)
            assert all(args[i].grad.dtype == dtype for i in self.differentiable())

    # ---- errors, in the same words on every backend

    def required(self, args):
        """The inputs that are given by position."""
        arrays = self.spec.signature.inputs
        return [x for array, x in zip(arrays, args, strict=True) if not array.optional]

    def bad_calls(self, device):
        """(message, exception, arguments by position) of what everybody gets wrong."""
        args = self.required(self.inputs(device=device))
        arrays = self.required(self.spec.signature.inputs)
        at = self.floating(args)[-1]
        first, name, last = arrays[0].name, arrays[at].name, args[at]
        yield f"{first} must be a tensor, got list", TypeError, [[0.0], *args[1:]]
        yield f"{first} must be float32, float64", TypeError, [x.long() for x in args]
        yield f"{first} must have shape", ValueError, [torch.zeros((), device=device), *args[1:]]
        yield "missing a required argument", TypeError, args[:-1]
        yield "too many positional arguments", TypeError, [*args, args[0]]
        if at == 0:
            return

        def instead(x):
            return [*args[:at], x, *args[at + 1 :]]

        narrow = ", or bfloat16 or float16" if name in self.spec.narrow else ""
        rule = f"{name} must be float32 like {first}{narrow}, got float64"
        yield rule, TypeError, instead(last.double())
        yield f"{name} must be on {device}", ValueError, instead(last.to("meta"))
        if arrays[at].leading:
            yield f"{name} must have shape", ValueError, instead(last[:3])
        known = {letter for array in arrays[:at] for letter, _ in array.dims}
        for k, (letter, _) in enumerate(arrays[at].dims):
            if letter is None or letter in known:
                short = last.narrow(k - len(arrays[at].dims), 0, 1)
                yield f"{name} must have shape", ValueError, instead(short)

    def test_errors_name_the_argument_the_rule_and_the_value(self, forced_backend, device):
        scalars = {k: v for k, v in self.variants[0].items() if v is not None}
        for message, error, args in self.bad_calls(device):
            with pytest.raises(error) as raised:
                type(self).op(*args, **scalars)
            text = str(raised.value)
            assert text.startswith(f"{self.spec.name}: "), text
            assert message in text, text
            assert "\n" not in text

    def test_raw_ops_check_what_the_kernels_would_read(self, forced_backend, device):
        args = self.inputs(device=device)
        fwd = getattr(torch.ops.rayfuse, self.spec.name)
        bwd = getattr(torch.ops.rayfuse, f"{self.spec.name}_bwd")
        at = self.floating(args)[-1]
        if at > 0:
            short = [*args[:at], args[at][:3], *args[at + 1 :]]
            variant = {k: v for k, v in self.variants[0].items() if v is not None}
            with pytest.raises(ValueError, match="must have shape"):
                fwd(*self.spec.raw_arguments(short, **variant))
        d_outputs = self.d_outputs(args, self.variants[0])
        shape, d_outputs[0] = list(d_outputs[0].shape), d_outputs[0][:-1]
        got = list(d_outputs[0].shape)
        want = f"d_{self.spec.outputs[0]} must have shape {shape}, got {got}"
        raw = self.spec.raw_arguments(args, **self.variants[0])
        with pytest.raises(ValueError, match=re.escape(want)):
            bwd(*d_outputs, *self.kept(raw), *raw, 1)

    def test_reduction_and_denominator_are_checked(self, forced_backend, device):
        args = self.inputs(device=device)
        with pytest.raises(
            ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'avg'"
        ):
            self.call(args, reduction="avg")
        with pytest.raises(ValueError, match="denominator must come with reduction='mean'"):
            self.call(args, reduction="sum", denominator=3)

    def test_debug_names_the_first_value_outside_the_domain(self, forced_backend, device):
        present = set(self.differentiable()) | set(self.floating(self.inputs(device=device)))
        for i in sorted(present):
            name = self.spec.inputs[i]
            if self.variants[0].get(name, 0) is None:
                continue
            args = self.inputs(device=device)
            args[i][2].view(-1)[-1] = torch.nan
            with contextlib.ExitStack() as stack:
                assert not backend.debugging()
                stack.enter_context(rayfuse.debug())
                stack.enter_context(pytest.raises(ValueError, match=rf"{name} must be"))
                self.call(args)
            self.call(args)  # and is silent outside

    def test_arguments_may_be_named(self, forced_backend, device):
        args = self.inputs(device=device)
        named = {**dict(zip(self.spec.inputs, args, strict=True)), **self.variants[0]}
        got, want = type(self).op(**named), self.call(args)
        assert all(map(torch.equal, as_tuple(got), as_tuple(want)))


class PackedContract(Contract):
    """The same for ops on packed rays: the leading dimensions are a number of rays, and the sizes P
    and Q the samples or bins of each on average."""

    # other sizes than the typical ones where there are a million samples
    long_sizes: dict[str, int] = {}

    def __init_subclass__(cls):
        super().__init_subclass__()
        if cls.op is None:
            return
        # the letter of a size -> the place of the offsets that count up to it
        cls.offsets = {
            cls.spec.domain[name].size: cls.spec.inputs.index(name) for name in cls.spec.integer
        }

    def inputs(self, leading=None, dtype=torch.float32, device="cpu", seed=0, **sizes):
        R = math.prod(self.leading if leading is None else leading)
        sizes = {**(sizes or self.typical), "R": R}
        sizes |= {letter: R * sizes[letter] for letter in self.offsets}
        return [x.to(device) for x in self.spec.sample((), dtype, seed, **sizes)]

    def own(self, array, args, first, last):
        """Where in an array rays first..last are."""
        letter = array.dims[0][0]
        if letter in self.offsets:
            offsets = args[self.offsets[letter]]
            return slice(offsets[first].item(), offsets[last].item())
        return slice(first, last + (array.name in self.spec.integer))

    def rays(self, args, first, last):
        """Some of the rays alone."""
        some = [
            x[self.own(array, args, first, last)]
            for array, x in zip(self.spec.signature.inputs, args, strict=True)
        ]
        for i in self.offsets.values():
            some[i] = some[i] - some[i][0]
        return some

    def longest(self, args):
        """The ray of the most samples."""
        return args[self.offsets["P"]].diff().argmax().item()

    def replaced(self, args, i, x):
        return [*args[:i], x, *args[i + 1 :]]

    def bad_calls(self, device):
        yield from super().bad_calls(device)
        args = self.inputs(device=device)
        for i in self.offsets.values():
            name, x = self.spec.inputs[i], args[i]
            rule = f"{name} must have shape [R+1]"
            for message, error, wrong in (
                (f"{name} must be int64, got int32", TypeError, x.int()),
                (rule, ValueError, x[None]),
                (rule, ValueError, x[:0]),
            ):
                yield message, error, self.required(self.replaced(args, i, wrong))

    def bad_offsets(self, offsets):
        P = offsets[-1].item()
        for place, value in ((0, 1), (0, -1), (3, P + 1), (3, -1), (-1, P - 1), (-1, 1 << 62)):
            wrong = offsets.clone()
            wrong[place] = value
            yield wrong
        yield offsets.flip(0)
        if len(self.offsets) == 1 and not any(
            array.dims[0] == ("R", 0) for array in self.spec.signature.inputs
        ):
            yield offsets[:1]
            yield torch.tensor([P, -P, 1 << 62, -(1 << 62), P // 2, 0, P, 1], device=offsets.device)

    def test_bad_offsets_are_named_where_they_can_be_seen_and_never_lead_out_of_bounds(
        self, forced_backend, device
    ):
        args = self.leaves(self.inputs(device=device))
        wanted = [args[i] for i in self.differentiable()]
        for i in self.offsets.values():
            rule = f"{self.spec.inputs[i]} must rise from 0 to the number of samples, got"
            for offsets in self.bad_offsets(args[i]):
                wrong = self.replaced(args, i, offsets)
                with rayfuse.debug(), pytest.raises(ValueError, match=rule):
                    self.call(wrong)
                if forced_backend == "ref" or forced_backend.startswith("cpu"):
                    with pytest.raises(ValueError, match=rule):
                        self.call(wrong)
                    continue
                outputs = self.outputs(wrong)
                poison = [torch.full_like(x, torch.nan) for x in (*wanted, *outputs)]
                del poison
                grads = torch.autograd.grad(outputs, wanted, list(map(torch.ones_like, outputs)))
                assert all(torch.isfinite(x).all() for x in (*outputs, *grads))

    def test_sorted_ray_indices_stand_for_offsets(self, forced_backend, device):
        args = self.inputs(device=device)
        i = self.offsets["P"]
        want = self.outputs(args)
        R = len(args[i]) - 1
        named = dict(zip(self.spec.inputs, args, strict=True))
        named |= {name: None for name, x in self.variants[0].items() if x is None}
        del named["offsets"]
        ray_indices = torch.arange(R, device=device).repeat_interleave(args[i].diff())
        options = {"reduction": "none"} if self.spec.is_loss else {}
        options |= {name: x for name, x in self.variants[0].items() if name not in named}
        got = as_tuple(type(self).op(**named, **options, ray_indices=ray_indices, rays=R))
        assert all(map(torch.equal, got, want))

    def test_empty_rays_anywhere_change_nothing(self, forced_backend, device):
        args = self.inputs(device=device)
        R = len(args[self.offsets["P"]]) - 1
        filled = slice(1, None, 3)

        def spread(array, x):
            """With an empty ray before each of these, and one after."""
            if array.dims[0][0] in self.offsets:
                return x
            if array.name in self.spec.integer:
                return x.repeat_interleave(3)[1:]
            y = torch.zeros(3 * R + 1, *x.shape[1:]).to(x)
            y[filled] = x
            return y

        def of_filled(array, y):
            return y if array.dims[0][0] in self.offsets else y[filled]

        arrays, outputs = self.spec.signature.inputs, self.spec.signature.outputs
        d_outputs = self.d_outputs(args)
        want, grads = self.gradients(args, d_outputs)
        with_empty = list(map(spread, arrays, args))
        d_with_empty = list(map(spread, outputs, d_outputs))
        got, same = self.gradients(with_empty, d_with_empty)
        with rayfuse.use_backend("ref"):
            right, _ = self.gradients(with_empty, d_with_empty)
        wanted = [arrays[i] for i in self.differentiable()]
        # not to the bit: how GPUs cut rays into tiles depends on how long they are on average
        for array, ours, alone in zip(
            (*outputs, *wanted), (*got, *same), (*want, *grads), strict=True
        ):
            torch.testing.assert_close(of_filled(array, ours), alone)
        for ours, torch_ in zip(got, right, strict=True):
            torch.testing.assert_close(ours, torch_)
            assert not self.spec.is_loss or (ours[0::3] == 0).all()

    # a million of both take the reference 15 s
    @pytest.mark.parametrize("rays", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
    def test_one_long_ray_beside_many_short_ones(self, forced_backend, device, rays):
        sizes = {**self.typical, **self.long_sizes}
        most = rays // sizes.get("C", 1)
        slow = forced_backend in EMULATED or forced_backend == "ref"
        long, many = (4_100, 40) if slow else (most, most)
        lengths = torch.ones(many + 1, dtype=torch.int64)
        lengths[many // 2] = long
        counts = dict.fromkeys(self.offsets, many + long)
        args = self.spec.sample((), **{**sizes, "R": many + 1, **counts})
        named = dict(zip(self.spec.inputs, args, strict=True))
        for i in self.offsets.values():
            named[self.spec.inputs[i]] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        for starts in [name for name in named if name.endswith("_starts")]:
            # in the order of the samples, whichever rays they were drawn for
            ends = torch.arange(1, many + long + 1) / long
            named[starts], named[starts.removesuffix("starts") + "ends"] = ends - 0.75 / long, ends
        self.assert_as_right_as_torch([x.to(device) for x in named.values()])

    def test_micro_batches_with_a_denominator_add_up_to_the_batch(self, forced_backend, device):
        args = self.inputs((6,), torch.float64, device)
        whole, grads = self.gradients_of_objective(args)
        parts = [
            self.gradients_of_objective(self.rays(args, *part), denominator=6)
            for part in ((0, 1), (1, 6))
        ]
        torch.testing.assert_close(sum(value for value, _ in parts), whole)
        for pieces, full in zip(zip(*(g for _, g in parts), strict=True), grads, strict=True):
            torch.testing.assert_close(torch.cat(pieces), full)

    def test_expanded_inputs_and_gradients_are_read_right(self, forced_backend, device):
        args = self.inputs(dtype=torch.float64, device=device)
        for i in self.differentiable():
            expanded = [*args]
            expanded[i] = args[i][:1].expand_as(args[i])
            outputs = self.outputs(self.leaves(args))
            d_outputs = [y.detach()[:1].expand_as(y) for y in outputs]
            dense = [x.clone() for x in expanded]
            want = self.gradients(dense, [d_y.clone() for d_y in d_outputs])
            expanded[i].requires_grad_()
            self.assert_equal(self.gradients(expanded, d_outputs), want)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
    def test_bad_value_stays_in_its_own_ray(self, forced_backend, device, bad):
        clean = self.inputs((9,), device=device)
        d_outputs = self.d_outputs(clean)
        want = self.gradients(clean, d_outputs)
        inputs = self.spec.signature.inputs
        results = (*self.spec.signature.outputs, *(inputs[i] for i in self.differentiable()))
        rays = clean[self.offsets["P"]].diff().argsort(descending=True)[:3].tolist()
        for i in self.floating(clean):
            args = [x.clone() for x in clean]
            for r, part in zip(rays, (0, 0.5, 1), strict=True):
                rows = self.own(inputs[i], clean, r, r + 1)
                if rows.start < rows.stop:
                    args[i][rows.start + int(part * (rows.stop - 1 - rows.start))] = bad
            got = self.gradients(args, d_outputs)
            for array, ours, right in zip(
                results, (*got[0], *got[1]), (*want[0], *want[1]), strict=True
            ):
                others = torch.ones(len(ours), dtype=torch.bool)
                for r in rays:
                    others[self.own(array, clean, r, r + 1)] = False
                assert torch.equal(ours[others], right[others])

    def test_nan_comes_out_as_nan(self, forced_backend, device):
        clean = self.inputs(device=device)
        r = self.longest(clean)
        inputs, outputs = self.spec.signature.inputs, self.spec.signature.outputs
        for i in self.differentiable():
            rows = self.own(inputs[i], clean, r, r + 1)
            args = [x.clone() for x in clean]
            args[i][min(rows.start + 1, rows.stop - 1)] = torch.nan
            own = [self.own(array, clean, r, r + 1) for array in outputs]
            nans = [y.reshape(len(y), -1).isnan().any(1) for y in self.outputs(args)]
            assert any(x[rows].any() for x, rows in zip(nans, own, strict=True)), inputs[i].name
            for x, rows in zip(nans, own, strict=True):
                assert not (x[: rows.start].any() or x[rows.stop :].any()), inputs[i].name

    def test_vmap_is_one_more_leading_dimension(self, forced_backend, device):
        """Batches may be of any lengths, and have no common shape: they are concatenated."""
        args = self.inputs(device=device)
        batch = [torch.stack([x, x]) for x in args]
        raw = getattr(torch.ops.rayfuse, self.spec.name)
        for call in (lambda *a: self.call(a), lambda *a: raw(*self.spec.raw_arguments(a))):
            with pytest.raises(NotImplementedError, match="vmap needs leading dimensions"):
                torch.vmap(call)(*batch)

    @pytest.mark.engine
    def test_torch_func_gives_the_gradients_of_autograd(self, forced_backend, device):
        args = self.inputs(dtype=torch.float64, device=device)
        wanted = tuple(self.differentiable())
        grads = torch.func.grad(lambda *a: self.objective(a), wanted)(*args)
        _, want = self.gradients_of_objective(args)
        for ours, right in zip(grads, want, strict=True):
            torch.testing.assert_close(ours, right)
