"""What every op keeps on every backend.

An op's test class derives from Contract and says what it is and which sizes are worth a test; all
inputs come from the op's own spec.
"""

import contextlib
import itertools

import pytest
import torch

import rayfuse
from conftest import DTYPES, EMULATED
from rayfuse import backend
from rayfuse.op import HALVES

LEADING = [(), (1,), (5,), (2, 3), (0,)]


class Contract:
    """Set `op` to the public function and `sizes` to dicts of its size letters."""

    op = None
    sizes: tuple[dict[str, int], ...] = ()
    # a size in the middle: big enough for every path, small enough for finite differences
    typical: dict[str, int] = {}
    leading = (7,)
    # what GPU kernels are compiled for: aligned and not, in one block and in many
    gpu_sizes: tuple[dict[str, int], ...] = ()

    def __init_subclass__(cls):
        cls.spec = cls.op.op

    # ---- inputs

    def inputs(self, leading=None, dtype=torch.float32, device="cpu", seed=0, **sizes):
        leading = self.leading if leading is None else leading
        sizes = sizes or self.typical
        return [x.to(device) for x in self.spec.sample(leading, dtype, seed, **sizes)]

    def call(self, args, **options):
        return type(self).op(*args, **options)

    def gradients(self, args, d_loss, needs=None):
        """The loss of each ray and the gradients of all inputs, or of those in `needs`."""
        args = [x.detach().clone().requires_grad_() for x in args]
        loss = self.call(args, reduction="none")
        wanted = [x for i, x in enumerate(args) if needs is None or i in needs]
        return loss, torch.autograd.grad(loss, wanted, d_loss.to(loss))

    def d_loss(self, leading, seed=1):
        return torch.rand(leading, generator=torch.Generator().manual_seed(seed)) + 0.5

    def assert_as_right_as_torch(self, ours, args, leading, what):
        """|ours - f64| <= |torch's own arithmetic in this dtype - f64| + a few roundings."""
        d_loss = self.d_loss(leading)
        with rayfuse.use_backend("ref"):
            true = self.gradients([x.detach().cpu().double() for x in args], d_loss)
            torch_ = self.gradients([x.detach().cpu() for x in args], d_loss)
        names = [what, *(f"d_{name}" for name in self.spec.inputs)]
        for name, ours_, torch__, true_ in zip(
            names, (ours[0], *ours[1]), (torch_[0], *torch_[1]), (true[0], *true[1]), strict=True
        ):
            if true_.numel() == 0:
                assert ours_.shape == true_.shape
                continue
            scale = true_.abs().max().clamp(min=1e-30)
            # in float64 the truth itself carries the roundings of a sum in another order
            roundings = 4 * torch.finfo(ours_.dtype).eps if ours_.dtype != true_.dtype else 1e-12
            allowed = (torch__.double() - true_).abs() + roundings * scale
            error = (ours_.detach().cpu().double() - true_).abs()
            worst = (error / allowed).max().item()
            assert worst <= 1, f"{name}: error is {worst:.2f} of what torch's own allows"

    # ---- values

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
    def test_values_and_gradients_are_as_right_as_torch(self, forced_backend, device, dtype):
        for (i, sizes), leading in itertools.product(enumerate(self.sizes), LEADING):
            args = self.inputs(leading, dtype, device, seed=i, **sizes)
            ours = self.gradients(args, self.d_loss(leading).to(device))
            assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert all(g.dtype == dtype for g in ours[1])
            self.assert_as_right_as_torch(ours, args, leading, f"loss at {sizes}, {leading}")

    @pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
    def test_half_precision_is_float32_rounded_once(self, forced_backend, device, dtype):
        for sizes in self.sizes:
            args = self.inputs(dtype=dtype, device=device, **sizes)
            d_loss = self.d_loss(self.leading).to(device)
            loss, grads = self.gradients(args, d_loss)
            wide, wide_grads = self.gradients([x.float() for x in args], d_loss)
            assert torch.equal(loss, wide)
            assert all(map(torch.equal, grads, [grad.to(dtype) for grad in wide_grads]))

    def test_backend_that_was_forced_is_the_one_that_runs(self, forced_backend, device):
        args = [x.requires_grad_() for x in self.inputs(device=device)]
        with rayfuse.use_backend("ref"):
            self.call(self.inputs(device=device))
        loss = self.call(args)
        assert rayfuse.last_backend() == forced_backend
        with rayfuse.use_backend("ref"):
            loss.backward()
        assert rayfuse.last_backend() == forced_backend, "the backward ran on another backend"

    def test_gradients_pass_gradcheck(self, forced_backend, device):
        args = [x.requires_grad_() for x in self.inputs((3,), torch.float64, device)]
        for reduction in ("mean", "sum", "none"):
            assert torch.autograd.gradcheck(lambda *a: self.call(a, reduction=reduction), args)  # noqa: B023

    def test_second_derivatives_pass_gradgradcheck(self, forced_backend, device):
        args = [x.requires_grad_() for x in self.inputs((2,), torch.float64, device)]
        assert torch.autograd.gradgradcheck(lambda *a: self.call(a), args)
        # a gradient with a graph is the same gradient, whichever inputs want one
        for i in range(len(args)):
            one = [x.detach().requires_grad_(i == j) for j, x in enumerate(args)]
            (plain,) = torch.autograd.grad(self.call(one), one[i])
            (graph,) = torch.autograd.grad(self.call(one), one[i], create_graph=True)
            torch.testing.assert_close(graph, plain)

    def test_gradient_that_is_not_wanted_leaves_the_others_as_they_are(
        self, forced_backend, device
    ):
        args = self.inputs(device=device)
        d_loss = self.d_loss(self.leading).to(device)
        _, everything = self.gradients(args, d_loss)
        for i in range(len(args)):
            alone = [x.detach().clone().requires_grad_(i == j) for j, x in enumerate(args)]
            self.call(alone, reduction="none").backward(d_loss)
            assert torch.equal(alone[i].grad, everything[i])
            assert all(x.grad is None for j, x in enumerate(alone) if j != i)

    # ---- reductions

    @pytest.mark.parametrize("rays", [(3, 7), (40_000,)], ids=str)
    def test_reductions_agree_with_the_values_per_ray(self, forced_backend, device, rays):
        if forced_backend in EMULATED:
            rays = tuple(min(n, 400) for n in rays)
        args = self.inputs(rays, device=device, **self.sizes[1])
        each = self.call(args, reduction="none").double()
        torch.testing.assert_close(self.call(args).double(), each.mean(), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            self.call(args, reduction="sum").double(), each.sum(), rtol=1e-6, atol=0
        )

    def test_micro_batches_with_a_denominator_add_up_to_the_batch(self, forced_backend, device):
        args = self.inputs((6,), torch.float64, device)
        whole = self.gradients_of_mean(args)
        total, grads = 0, []
        for part in (slice(0, 1), slice(1, 6)):
            for denominator in (6, torch.tensor(6.0, dtype=torch.float64, device=device)):
                loss, grad = self.gradients_of_mean([x[part] for x in args], denominator)
            total, grads = total + loss, [*grads, grad]
        torch.testing.assert_close(total, whole[0])
        for parts, full in zip(zip(*grads, strict=True), whole[1], strict=True):
            torch.testing.assert_close(torch.cat(parts), full)

    def gradients_of_mean(self, args, denominator=None):
        args = [x.detach().clone().requires_grad_() for x in args]
        loss = self.call(args, denominator=denominator)
        return loss.detach(), torch.autograd.grad(loss, args)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_no_rays_give_exactly_zero_with_a_graph(self, forced_backend, device, reduction):
        args = [x.requires_grad_() for x in self.inputs((0,), device=device)]
        loss = self.call(args, reduction=reduction)
        loss.backward()
        assert loss.item() == 0
        assert all(x.grad.shape == x.shape for x in args)

    # ---- memory

    def test_layouts_do_not_change_the_result(self, forced_backend, device):
        args = self.inputs((6,), device=device)
        d_loss = self.d_loss((6,)).to(device)
        want = self.gradients(args, d_loss)

        def strided(x):
            return torch.stack([x, -x], -1)[..., 0]

        def misaligned(x):
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

        def transposed(x):
            return x.t().contiguous().t()

        for layout in (strided, misaligned, transposed):
            moved = [layout(x).requires_grad_() for x in args]
            loss = self.call(moved, reduction="none")
            grads = torch.autograd.grad(loss, moved, d_loss)
            assert torch.equal(loss, want[0]), layout.__name__
            for grad, full in zip(grads, want[1], strict=True):
                assert torch.equal(grad, full), layout.__name__

    def test_expanded_inputs_and_gradients_are_read_right(self, forced_backend, device):
        one = self.inputs((1,), torch.float64, device)
        args = [x.expand(4, *x.shape[1:]).requires_grad_() for x in one]
        loss = self.call(args, reduction="none")
        # an expanded gradient has stride 0
        grads = torch.autograd.grad(loss, args, loss.new_full((1,), 2.0).expand(4))
        want, full = self.gradients(one, torch.full((1,), 2.0))
        assert torch.equal(loss, want.expand(4))
        for grad, whole in zip(grads, full, strict=True):
            assert torch.equal(grad, whole.expand_as(grad))

    def test_every_output_is_written(self, forced_backend, device):
        """Memory that held NaN before must not show through."""
        for sizes in self.sizes:
            args = self.inputs(device=device, **sizes)
            d_loss = self.d_loss(self.leading).to(device)
            # what was freed last is handed out first
            poison = [torch.full_like(x, torch.nan) for x in (*args, *args, d_loss, d_loss)]
            del poison
            loss, grads = self.gradients(args, d_loss)
            assert all(torch.isfinite(x).all() for x in (loss, *grads)), sizes

    def test_inputs_stay_as_they_are_through_two_backwards(self, forced_backend, device):
        args = [x.requires_grad_() for x in self.inputs(device=device)]
        before = [x.detach().clone() for x in args]
        loss = self.call(args)
        loss.backward(retain_graph=True)
        first = [x.grad.clone() for x in args]
        loss.backward()
        for x, was, grad in zip(args, before, first, strict=True):
            assert torch.equal(x, was)
            assert torch.equal(x.grad, 2 * grad)

    # ---- repeatability and bad values

    def test_result_is_the_same_to_the_bit_for_any_number_of_threads(self, forced_backend, device):
        threads = torch.get_num_threads()
        # so many rays that torch's own sum of them depends on the number of threads
        for rays in (1_003,) if forced_backend in EMULATED else (100_003, 200_003):
            args = self.inputs((rays,), device=device, **self.sizes[2])
            results = []
            try:
                for n in (1, 2, 3, 4, 2):
                    torch.set_num_threads(n)
                    results.append(self.gradients_of_mean(args))
            finally:
                torch.set_num_threads(threads)
            for loss, grads in results[1:]:
                assert torch.equal(loss, results[0][0])
                assert all(map(torch.equal, grads, results[0][1]))

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
    def test_bad_value_stays_in_its_own_ray(self, forced_backend, device, bad):
        clean = self.inputs((9,), device=device)
        d_loss = self.d_loss((9,)).to(device)
        want = self.gradients(clean, d_loss)
        others = [0, 1, 2, 3, 5, 6, 7, 8]
        for i, x in enumerate(clean):
            for column in (0, x.shape[-1] // 2, x.shape[-1] - 1):
                args = [y.clone() for y in clean]
                args[i][4, column] = bad
                got = self.gradients(args, d_loss)
                for ours, right in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
                    assert torch.equal(ours[others], right[others])

    def test_nan_comes_out_as_nan(self, forced_backend, device):
        args = self.inputs(device=device)
        for x in args:
            bad = [y.clone() for y in args]
            bad[[y is x for y in args].index(True)][3, 1] = torch.nan
            assert self.call(bad, reduction="none").isnan().tolist() == [
                ray == 3 for ray in range(self.leading[0])
            ]

    # ---- torch's machinery

    def test_raw_ops_pass_opcheck(self, forced_backend, device):
        for dtype in (torch.float64, torch.float16):
            args = self.inputs((2, 3), dtype, device)
            d_loss = self.call(args, reduction="none")
            fwd, bwd = (
                getattr(torch.ops.rayfuse, self.spec.name + suffix).default
                for suffix in ("", "_bwd")
            )
            torch.library.opcheck(fwd, args)
            for needs in range(1, 1 << len(args)):
                torch.library.opcheck(bwd, [d_loss, *args, needs])

    def test_compiles_without_a_graph_break(self, forced_backend, device):
        torch.compiler.reset()
        compiled = torch.compile(
            lambda *a: self.call(a).sin(), fullgraph=True, backend="aot_eager", dynamic=True
        )
        for rays in (4, 7):
            args = [x.requires_grad_() for x in self.inputs((rays,), torch.float64, device)]
            grads = torch.autograd.grad(compiled(*args), args)
            want = torch.autograd.grad(self.call(args).sin(), args)
            for ours, right in zip(grads, want, strict=True):
                torch.testing.assert_close(ours, right)
        assert rayfuse.last_backend() == forced_backend

    def test_vmap_is_one_more_leading_dimension(self, forced_backend, device):
        args = self.inputs((4, 3), torch.float64, device)
        for reduction in ("none", "mean", "sum"):
            want = torch.stack(
                [self.call([x[i] for x in args], reduction=reduction) for i in range(4)]
            )

            def one(*a, reduction=reduction):
                return self.call(a, reduction=reduction)

            torch.testing.assert_close(torch.vmap(one)(*args), want)
            last = [x.movedim(0, -1) for x in args]
            torch.testing.assert_close(torch.vmap(one, in_dims=-1)(*last), want)
        # only the last input has a batch dimension
        shared = [x[0] for x in args[:-1]]
        in_dims = (*[None] * len(shared), 0)
        got = torch.vmap(one, in_dims=in_dims)(*shared, args[-1])
        want = torch.stack([self.call([*shared, x], reduction="sum") for x in args[-1]])
        torch.testing.assert_close(got, want)
        # the raw op batches by itself
        raw = getattr(torch.ops.rayfuse, self.spec.name)
        torch.testing.assert_close(torch.vmap(raw)(*args), raw(*args))
        assert rayfuse.last_backend() == forced_backend

    def test_torch_func_gives_the_gradients_of_autograd(self, forced_backend, device):
        args = self.inputs((4, 3), torch.float64, device)
        every = tuple(range(len(args)))
        per_sample = torch.vmap(torch.func.grad(lambda *a: self.call(a), every))(*args)
        for i in range(4):
            _, want = self.gradients_of_mean([x[i] for x in args])
            for ours, right in zip(per_sample, want, strict=True):
                torch.testing.assert_close(ours[i], right)

    def test_autocast_keeps_the_rule_of_float32_losses(self, forced_backend, device):
        for dtype in (torch.float32, torch.bfloat16):
            args = [x.requires_grad_() for x in self.inputs(dtype=dtype, device=device)]
            with torch.autocast(device, torch.bfloat16):
                loss = self.call(args)
            loss.backward()
            assert loss.dtype == torch.float32
            assert all(x.grad.dtype == dtype for x in args)

    # ---- errors, in the same words on every backend

    def bad_calls(self, device):
        """(message, exception, call) of what everybody gets wrong; ops add their own."""
        args = self.inputs(device=device)
        first, last = self.spec.inputs[0], self.spec.inputs[-1]
        yield f"{first} must be a tensor, got list", TypeError, [[0.0], *args[1:]]
        yield (
            f"{last} must be float32 like {first}, got float64",
            TypeError,
            [*args[:-1], args[-1].double()],
        )
        yield f"{first} must be float32, float64", TypeError, [x.long() for x in args]
        yield f"{last} must be on {device}", ValueError, [*args[:-1], args[-1].to("meta")]
        yield f"{last} must have shape", ValueError, [*args[:-1], args[-1][:3]]
        yield f"{last} must have shape", ValueError, [*args[:-1], args[-1][..., :-1]]
        yield f"{first} must have shape", ValueError, [torch.zeros((), device=device), *args[1:]]
        yield "missing a required argument", TypeError, args[:-1]
        yield "too many positional arguments", TypeError, [*args, args[0]]

    def test_errors_name_the_argument_the_rule_and_the_value(self, forced_backend, device):
        for message, error, args in self.bad_calls(device):
            with pytest.raises(error) as raised:
                self.call(args)
            text = str(raised.value)
            assert text.startswith(f"{self.spec.name}: "), text
            assert message in text, text
            assert "\n" not in text

    def test_raw_ops_check_what_the_kernels_would_read(self, forced_backend, device):
        args = self.inputs(device=device)
        fwd = getattr(torch.ops.rayfuse, self.spec.name)
        bwd = getattr(torch.ops.rayfuse, f"{self.spec.name}_bwd")
        with pytest.raises(ValueError, match="must have shape"):
            fwd(*args[:-1], args[-1][:3])
        with pytest.raises(ValueError, match=r"d_loss must have shape \[7\], got \[6\]"):
            bwd(torch.ones(6, device=device), *args, 1)

    def test_reduction_and_denominator_are_checked(self, forced_backend, device):
        args = self.inputs(device=device)
        with pytest.raises(
            ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'avg'"
        ):
            self.call(args, reduction="avg")
        with pytest.raises(ValueError, match="denominator must come with reduction='mean'"):
            self.call(args, reduction="sum", denominator=3)

    def test_debug_names_the_first_value_outside_the_domain(self, forced_backend, device):
        for i, name in enumerate(self.spec.inputs):
            args = self.inputs(device=device)
            args[i][2, 1] = torch.nan
            with contextlib.ExitStack() as stack:
                assert not backend.debugging()
                stack.enter_context(rayfuse.debug())
                stack.enter_context(pytest.raises(ValueError, match=rf"{name} must be finite"))
                self.call(args)
            self.call(args)  # and is silent outside

    def test_arguments_may_be_named(self, forced_backend, device):
        args = self.inputs(device=device)
        named = dict(zip(self.spec.inputs, args, strict=True))
        assert torch.equal(type(self).op(**named), self.call(args))
