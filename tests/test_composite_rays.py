"""What only compositing knows: its published forms, depths, backgrounds, densities on the fly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rayfuse
from conftest import BACKENDS, EMULATED, device_of
from contract import Contract, are_same
from rayfuse import backend
from rayfuse.ops.composite_rays import blend_background, blend_for_loss


def as_nerfstudio(t, w, f, background, depth):
    """`RGBRenderer`, `DepthRenderer` with this ray's own limits, and `AccumulationRenderer`."""
    steps = (t[..., 1:] + t[..., :-1]) / 2
    rgb = (w[..., None] * f).sum(-2) + background * (1 - w.sum(-1, keepdim=True))
    if depth == "expected":
        distance = (w * steps).sum(-1) / (w.sum(-1) + 1e-10)
        distance = torch.clip(distance, steps[..., 0], steps[..., -1])
    else:
        half = torch.full_like(w[..., :1], 0.5)
        index = torch.searchsorted(w.cumsum(-1), half, side="left").clamp(0, w.shape[-1] - 1)
        distance = steps.gather(-1, index)[..., 0]
    return rgb, distance, w.sum(-1)


def as_multinerf(t, w):
    """`distance_mean` of `volumetric_rendering`."""
    log_mid = ((t[..., 1:] + t[..., :-1]) / 2).log()
    mean = (w * log_mid).sum(-1) / w.sum(-1).clamp(min=torch.finfo(torch.float32).eps)
    return torch.nan_to_num(mean.exp(), torch.inf).clip(t[..., 0], t[..., -1])


class TestCompositeRays(Contract):
    op = rayfuse.composite_rays
    # around the 16, 8, 4 and 2 lanes of the registers, in samples and in channels
    sizes = (
        *({"S": S, "C": 3} for S in (0, 1, 2, 3, 8, 15, 17, 33, 48, 65)),
        *({"S": 1, "C": C} for C in (0, 5)),
        *({"S": S, "C": C} for S, C in ((19, 1), (17, 2), (19, 4), (7, 5), (18, 16), (5, 37))),
    )
    typical = {"S": 19, "C": 3}
    gpu_sizes = ({"S": 128, "C": 3}, {"S": 48, "C": 64}, {"S": 65536, "C": 3})
    variants = (
        {},
        {"density": True, "background": None},
        {"density": True, "depth": "log_mean", "last_sample": True, "background": None},
        {"depth": "log_mean", "f": None},
        {"depth": "median", "last_sample": True, "background": None},
        {"depth": "none", "density": True, "f": None, "background": None},
    )

    def realistic(self, device, dtype=torch.float64, S=48):
        sigma, t = rayfuse.ray_weights.op.sample((32,), dtype, S=S)
        w, _ = rayfuse.ray_weights.op.reference(sigma, t)
        f = torch.rand(32, S, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        return [x.to(device) for x in (t, w, sigma, f.to(dtype))]

    def bad_calls(self, device):
        for message, error, args in super().bad_calls(device):
            # a third one is f
            yield message, error, [*args, args[0]] if "too many" in message else args
        t, w, _, _ = self.inputs(device=device)
        yield "f must have shape [..., S, C] with ...=[7], S=19 (from t)", ValueError, [t, w, t]

    def test_wrong_options_say_so(self):
        t, w, f, background = self.inputs()
        for message, options in (
            ("background must be None with last_sample=True", dict(last_sample=True)),
            ("depth must be 'expected', 'log_mean', 'median' or 'none', got 'x'", dict(depth="x")),
        ):
            with pytest.raises(ValueError) as raised:
                rayfuse.composite_rays(t, w, f, background=background, **options)
            assert str(raised.value).startswith(f"composite_rays: {message}")

    @pytest.mark.parametrize("depth", ["expected", "median"])
    def test_values_are_those_of_nerfstudio(self, forced_backend, device, depth):
        t, w, _, f = self.realistic(device)
        background = f[:, 0].contiguous()
        got = rayfuse.composite_rays(t, w, f, background=background, depth=depth)
        for ours, want in zip(got, as_nerfstudio(t, w, f, background, depth), strict=True):
            torch.testing.assert_close(ours, want)

    def test_logarithmic_depth_is_that_of_multinerf(self, forced_backend, device):
        t, w, _, _ = self.realistic(device)
        got = rayfuse.composite_rays(t, w, depth="log_mean")
        torch.testing.assert_close(got.depth, as_multinerf(t, w))

    @pytest.mark.parametrize("depth", ["expected", "log_mean", "median", "none"])
    def test_densities_give_what_their_weights_give(self, forced_backend, device, depth):
        t, w, sigma, f = self.realistic(device)
        leaves = [x.requires_grad_() for x in (t, sigma, f)]
        background = torch.full((3,), 0.5, dtype=torch.float64, device=device)
        fused = rayfuse.composite_rays(
            t, sigma, f, density=True, depth=depth, background=background
        )
        with rayfuse.use_backend("ref"):
            w, _ = rayfuse.ray_weights(sigma, t)
            apart = rayfuse.composite_rays(t, w, f, depth=depth, background=background)
        assert fused.depth.any() == (depth != "none")
        objectives = [sum(x.square().sum() for x in out) for out in (fused, apart)]
        torch.testing.assert_close(*objectives)
        torch.testing.assert_close(
            *(torch.autograd.grad(objective, leaves) for objective in objectives)
        )

    @pytest.mark.parametrize("density", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_features_may_be_half(self, forced_backend, device, dtype, density):
        for S, C in ((48, 3), (7, 5)):
            t, w, f, background = self.inputs(device=device, S=S, C=C)
            f = f.to(dtype)
            variant = {"density": density}
            outputs, grads = self.gradients([t, w, f, background], variant=variant)
            want, wide = self.gradients([t, w, f.float(), background], variant=variant)
            assert all(map(torch.equal, outputs, want))
            assert grads[2].dtype == dtype
            wide = [x.to(grad.dtype) for x, grad in zip(wide, grads, strict=True)]
            assert all(map(torch.equal, grads, wide))

    def test_walls_have_finite_gradients(self, forced_backend, device):
        t = torch.tensor([0.5, 1.0, 1.0, 2.0, 3.0], device=device)
        for densities in ([0.0, torch.inf, 0.0, 1.0], [0.0, 1.0, torch.inf, torch.inf]):
            sigma = torch.tensor(densities, device=device)
            f = torch.rand(4, 2, device=device)
            background = f[0].clone()
            outputs, grads = self.gradients([t, sigma, f, background], variant={"density": True})
            assert all(x.isfinite().all() for x in (*outputs, *grads))
            with rayfuse.use_backend("ref"):
                wide = [x.cpu().double() for x in (t, sigma, f, background)]
                want = self.gradients(wide, variant={"density": True})
            for ours, exact in zip((*outputs, *grads), (*want[0], *want[1]), strict=True):
                torch.testing.assert_close(ours.cpu().double(), exact, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("depth", ["expected", "log_mean", "median"])
    def test_ray_without_weight_has_a_depth_and_finite_gradients(
        self, forced_backend, device, depth
    ):
        t = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64, device=device)
        w = torch.zeros(3, dtype=torch.float64, device=device)
        leaves = [x.requires_grad_() for x in (t, w)]
        out = rayfuse.composite_rays(*leaves, depth=depth)
        # no weight: 0, and the logarithm of the mean, are clipped; half of nothing is at the end
        assert out.depth.item() == {"expected": 0.75, "log_mean": 1.0, "median": 3.0}[depth]
        got = torch.autograd.grad(out.depth, leaves, materialize_grads=True)
        with rayfuse.use_backend("ref"):
            want = torch.autograd.grad(
                rayfuse.composite_rays(*leaves, depth=depth).depth, leaves, materialize_grads=True
            )
        torch.testing.assert_close(got, want)

    def test_median_is_the_first_midpoint_that_reaches_a_half(self, forced_backend, device):
        t = torch.arange(5.0, device=device)
        for weights, depth in (
            ([0.5, 0.0, 0.5, 0.0], 0.5),
            ([0.25, 0.25, 0.5, 0.0], 1.5),
            ([0.1, 0.1, 0.1, 0.9], 3.5),
            ([0.1, 0.1, 0.1, 0.1], 3.5),
        ):
            w = torch.tensor(weights, device=device)
            assert rayfuse.composite_rays(t, w, depth="median").depth.item() == depth

    def test_backgrounds_that_all_rays_share(self, forced_backend, device):
        t, w, f, _ = self.inputs(device=device)
        color = torch.tensor([0.25, 0.5, 1.0], device=device, requires_grad=True)
        each = color.detach().expand(7, 3)
        shared = rayfuse.composite_rays(t, w, f, background=color)
        assert torch.equal(
            shared.features, rayfuse.composite_rays(t, w, f, background=each).features
        )
        shared.features.sum().backward()
        torch.testing.assert_close(color.grad, (1 - w.sum(-1)).sum().expand(3))
        white = rayfuse.composite_rays(t, w, f, background=1)
        assert torch.equal(
            white.features,
            rayfuse.composite_rays(t, w, f, background=torch.ones_like(each)).features,
        )
        # one ray, without leading dimensions
        one = rayfuse.composite_rays(t[0], w[0], f[0], background=0.5)
        many = rayfuse.composite_rays(t, w, f, background=0.5)
        assert torch.equal(one.features, many.features[0])

    def test_last_sample_is_the_background(self, forced_backend, device):
        t, w, _, f = self.realistic(device)
        behind = rayfuse.composite_rays(t, w, f, background=f[:, -1].contiguous())
        out = rayfuse.composite_rays(t, w, f, last_sample=True)
        torch.testing.assert_close(out.features, behind.features)

    @pytest.mark.parametrize("density", [False, True])
    @pytest.mark.parametrize("S", [4096, 65536])
    def test_long_rays(self, forced_backend, device, S, density):
        """Torch sums optical depths in double on a CPU, so that its own error says nothing."""
        S = min(S, 20_000) if forced_backend in EMULATED else S
        args = self.inputs((2,), device=device, S=S, C=2)
        if not density:
            args[1] /= S
        outputs, grads = self.gradients(args, variant={"density": density})
        with rayfuse.use_backend("ref"):
            want = self.gradients([x.cpu().double() for x in args], variant={"density": density})
        for ours, exact in zip((*outputs, *grads), (*want[0], *want[1]), strict=True):
            error = (ours.cpu().double() - exact).abs().max() / exact.abs().max()
            assert error < 2e-6

    def test_outputs_without_a_gradient_count_as_zero(self, forced_backend, device):
        args = self.inputs(device=device)
        for i in range(3):
            leaves = self.leaves(args)
            d_outputs = self.d_outputs(args)
            alone = torch.autograd.grad(
                self.outputs(leaves)[i], leaves, d_outputs[i], materialize_grads=True
            )
            for j in {0, 1, 2} - {i}:
                d_outputs[j].zero_()
            _, everything = self.gradients(args, d_outputs)
            for ours, want in zip(alone, everything, strict=True):
                assert are_same(ours, want)

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(
            st.tuples(st.floats(0, 1e3, width=32), st.floats(0, 1, width=32)),
            min_size=1,
            max_size=40,
        ),
        st.sampled_from(["expected", "log_mean", "median"]),
    )
    def test_depth_is_within_the_ray(self, samples, depth):
        t = torch.tensor([0.0, *sorted(edge for edge, _ in samples)])
        w = torch.tensor([weight for _, weight in samples])
        for name in BACKENDS:
            if backend.reason(name) is None and device_of(name) == "cpu":
                with rayfuse.use_backend(name):
                    got = rayfuse.composite_rays(t, w, depth=depth).depth
                assert t[0] <= got <= t[-1], name


def test_rgba_is_blended_over_a_background():
    image = torch.rand(4, 5, 4)
    rgb, alpha = image[..., :3], image[..., 3:]
    torch.testing.assert_close(blend_background(image, 1.0), rgb * alpha + 1 - alpha)
    color = torch.tensor([0.1, 0.2, 0.3])
    torch.testing.assert_close(blend_background(image, color), rgb * alpha + color * (1 - alpha))
    assert blend_background(rgb, color) is rgb


def test_random_background_is_the_same_behind_render_and_target():
    """A perfect render of a transparent target costs nothing, whatever the background."""
    target = torch.rand(6, 4)
    features, accumulation = target[:, :3] * target[:, 3:], target[:, 3]
    for background in ("random", "last_sample", None):
        rendered, wanted = blend_for_loss(features, accumulation, target, background)
        torch.testing.assert_close(rendered, wanted)
    rendered, wanted = blend_for_loss(
        features + (1 - accumulation)[:, None] * 0.5, accumulation, target, 0.5
    )
    torch.testing.assert_close(rendered, wanted)
