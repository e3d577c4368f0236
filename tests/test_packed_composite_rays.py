"""What only packed compositing knows: the dense form, empty rays, backgrounds, sums along rays."""

import pytest
import torch

import rayfuse
import simt
from contract import PackedContract

DENSE = rayfuse.composite_rays.op


class TestPackedCompositeRays(PackedContract):
    op = rayfuse.packed_composite_rays
    # samples of a ray on average, from none to several registers, and channels around their lanes
    sizes = (
        *({"P": P, "C": 3} for P in (0, 2, 1, 9, 33)),
        *({"P": P, "C": C} for P, C in ((1, 0), (19, 1), (17, 4), (5, 37))),
    )
    typical = {"P": 19, "C": 3}
    gpu_sizes = ({"P": 64, "C": 3}, {"P": 48, "C": 64})
    variants = (
        {},
        {"density": True, "background": None},
        {"density": True, "depth": "log_mean", "last_sample": True, "background": None},
        {"depth": "log_mean", "f": None},
        {"depth": "median", "last_sample": True, "background": None},
        {"depth": "none", "density": True, "f": None, "background": None},
    )

    def bad_calls(self, device):
        for message, error, args in super().bad_calls(device):
            # a fifth one is f
            yield message, error, [*args, args[0]] if "too many" in message else args

    def packed(self, t, w, f):
        """Touching intervals of as many samples on each ray, as packed ones."""
        R, S = w.shape
        offsets = torch.arange(0, R * S + 1, S, device=w.device)
        return t[:, :-1].flatten(), t[:, 1:].flatten(), w.flatten(), offsets, f.flatten(0, 1)

    @pytest.mark.parametrize("S", [1, 15, 16, 17, 129, 1100])
    def test_intervals_that_touch_are_the_dense_op(self, forced_backend, device, S):
        inputs = (x.to(device) for x in DENSE.sample((3,), torch.float64, S=S, C=3))
        t, w, f, background = (x.requires_grad_() for x in inputs)
        for variant in self.variants[:5]:
            options = {name: x for name, x in variant.items() if x is not None}
            if "background" not in variant:
                options["background"] = background
            # not all of the weight in the first sample
            given = w / S if not options.get("density") else w
            leaves = [t, w, f, *([background] if "background" in options else [])]
            ours = type(self).op(*self.packed(t, given, f), **options)
            with rayfuse.use_backend("ref"):
                want = rayfuse.composite_rays(t, given, f, **options)
            grads = [
                torch.autograd.grad(sum(x.square().sum() for x in out), leaves, retain_graph=True)
                for out in (ours, want)
            ]
            torch.testing.assert_close(tuple(ours), tuple(want))
            torch.testing.assert_close(*grads)

    def test_empty_rays_show_their_background(self, forced_backend, device):
        none, offsets = torch.zeros(0, device=device), torch.zeros(4, dtype=torch.int64)
        color = torch.tensor([0.25, 0.5, 1.0], device=device, requires_grad=True)
        for depth in ("expected", "log_mean", "median", "none"):
            out = rayfuse.packed_composite_rays(
                none, none, none, offsets.to(device), background=color, depth=depth
            )
            assert torch.equal(out.features, color.expand(3, 3))
            assert not out.depth.any() and not out.accumulation.any()
            (grad,) = torch.autograd.grad(out.features.sum(), color)
            assert torch.equal(grad, torch.full_like(color, 3))

    def test_backgrounds_that_all_rays_share(self, forced_backend, device):
        *samples, f, background = self.inputs(device=device)
        color = background[0].clone()
        for given, each in (
            (color, color.expand_as(background)),
            (1, torch.ones_like(background)),
            (torch.tensor(0.5, device=device), torch.full_like(background, 0.5)),
        ):
            shared = rayfuse.packed_composite_rays(*samples, f, background=given)
            want = rayfuse.packed_composite_rays(*samples, f=f, background=each)
            assert torch.equal(shared.features, want.features)

    def test_last_sample_is_the_background(self, forced_backend, device):
        *samples, f, _ = self.inputs(device=device)
        offsets = samples[-1]
        last = f[(offsets[1:] - 1).clamp(min=0)]
        out = rayfuse.packed_composite_rays(*samples, f, last_sample=True)
        behind = rayfuse.packed_composite_rays(*samples, f, background=last)
        filled = offsets.diff() > 0
        torch.testing.assert_close(out.features[filled], behind.features[filled])
        assert not out.features[~filled].any()

    def test_wrong_options_say_so(self):
        *samples, f, background = self.inputs()
        with pytest.raises(ValueError, match="background must be None with last_sample=True"):
            rayfuse.packed_composite_rays(*samples, f, background=background, last_sample=True)

    def test_walls_have_finite_gradients(self, forced_backend, device):
        edges = torch.tensor([0.5, 1.0, 1.0, 2.0, 3.0], device=device)
        t = edges[:-1].repeat(2), edges[1:].repeat(2)
        sigma = torch.tensor([0.0, torch.inf, 0.0, 1.0, 0.0, 1.0, torch.inf, torch.inf])
        f = torch.rand(8, 2, generator=torch.Generator().manual_seed(0))
        offsets = torch.tensor([0, 4, 8], device=device)
        args = [*t, sigma.to(device), offsets, f.to(device), torch.ones(2, 2, device=device)]
        outputs, grads = self.gradients(args, variant={"density": True})
        assert all(x.isfinite().all() for x in (*outputs, *grads))
        with rayfuse.use_backend("ref"):
            wide = [x.cpu().double() if x.is_floating_point() else x.cpu() for x in args]
            want = self.gradients(wide, variant={"density": True})
        for ours, exact in zip((*outputs, *grads), (*want[0], *want[1]), strict=True):
            torch.testing.assert_close(ours.cpu().double(), exact, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("density", [False, True])
    def test_long_rays(self, forced_backend, device, density):
        """Several of what a ray is cut into on chip."""
        args = self.inputs((3,), device=device, P=5_000, C=2)
        if not density:
            args[2] /= 5_000
        variant = {"density": density}
        outputs, grads = self.gradients(args, variant=variant)
        with rayfuse.use_backend("ref"):
            wide = [x.cpu().double() if x.is_floating_point() else x.cpu() for x in args]
            want = self.gradients(wide, variant=variant)
        for ours, exact in zip((*outputs, *grads), (*want[0], *want[1]), strict=True):
            error = (ours.cpu().double() - exact).abs().max() / exact.abs().max()
            assert error < 2e-6

    def test_median_of_a_long_ray(self, forced_backend, device):
        S = 3_000
        t = torch.arange(S, dtype=torch.float32, device=device)
        w = torch.full((S,), 1 / S, device=device)
        offsets = torch.tensor([0, S], device=device)
        for scale, sample in ((1, S // 2), (0.25, S - 1), (1e6, 0)):
            out = rayfuse.packed_composite_rays(t, t + 1, scale * w, offsets, depth="median")
            assert abs(out.depth.item() - (sample + 0.5)) <= 1

    def test_outputs_without_a_gradient_count_as_zero(self, forced_backend, device):
        args = self.inputs(device=device)
        for i in range(3):
            leaves = self.leaves(args)
            d_outputs = self.d_outputs(args)
            wanted = [leaves[j] for j in self.differentiable()]
            alone = torch.autograd.grad(
                self.outputs(leaves)[i], wanted, d_outputs[i], materialize_grads=True
            )
            for j in {0, 1, 2} - {i}:
                d_outputs[j].zero_()
            _, everything = self.gradients(args, d_outputs)
            for ours, want in zip(alone, everything, strict=True):
                torch.testing.assert_close(ours, want, rtol=0, atol=0)

    def test_sums_along_rays_are_those_of_index_add(self, forced_backend, device):
        _, _, w, offsets, f, _ = self.inputs(dtype=torch.float64, device=device)
        w.requires_grad_(), f.requires_grad_()
        R = len(offsets) - 1
        ray_indices = torch.arange(R, device=device).repeat_interleave(offsets.diff())
        for values in (None, f):
            src = w[:, None] if values is None else w[:, None] * values
            want = src.new_zeros(R, src.shape[1]).index_add(0, ray_indices, src)
            got = rayfuse.accumulate_along_rays(w, values, offsets=offsets)
            same = rayfuse.accumulate_along_rays(w, values, ray_indices=ray_indices, rays=R)
            assert torch.equal(got, same)
            torch.testing.assert_close(got, want)
            leaves = [w] if values is None else [w, values]
            grads = [torch.autograd.grad(x.square().sum(), leaves) for x in (got, want)]
            torch.testing.assert_close(*grads)

    @pytest.mark.skipif(simt.reason() is not None, reason=str(simt.reason()))
    @pytest.mark.parametrize("sizes", [{"P": 30, "C": 3}, {"P": 1000, "C": 3}, {"P": 64, "C": 16}])
    def test_one_launch_moves_few_sectors_twice(self, sizes):
        executor = simt.load()
        executor.reset()
        with rayfuse.use_backend("simt"):
            self.gradients(self.inputs((16,), **sizes), variant={"density": True})
        counters = executor.counters()
        executor.reset()
        assert len(counters) == 2
        for kernel, found in counters.items():
            assert found["launches"] == 1
            assert found["sectors"] <= 1.1 * found["ideal_sectors"], kernel
