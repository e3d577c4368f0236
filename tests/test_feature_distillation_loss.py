"""What only feature distillation knows: it is the MSE of a rendering, and what pulls on what."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import rayfuse
from conftest import BACKENDS, device_of
from contract import Contract
from rayfuse import backend
from test_render_features import FEATURE_SIZES


class TestFeatureDistillationLoss(Contract):
    op = rayfuse.feature_distillation_loss
    # and where a ray does not fit on chip and has whole vectors of channels
    sizes = (*FEATURE_SIZES, {"S": 9, "C": 520})
    typical = {"S": 5, "C": 7}
    gpu_sizes = ({"S": 48, "C": 768}, {"S": 48, "C": 64}, {"S": 100, "C": 3})

    def bad_calls(self, device):
        yield from super().bad_calls(device)
        w, f, target = self.inputs(device=device)
        yield (
            "target must have shape [..., C] with ...=[7] (from w), C=7 (from f), got [7, 6]",
            ValueError,
            [w, f, target[:, :6]],
        )

    def test_mean_is_the_mse_of_the_rendering(self, forced_backend, device):
        """F3RM: `1e-3 * F.mse_loss(outputs["feature"], target)`, and its gradients."""
        args = self.leaves(self.inputs((3, 4), torch.float64, device))
        w, f, target = args
        want = 1e-3 * F.mse_loss((w[..., None] * f).sum(-2), target)
        ours = 1e-3 * self.call(args)
        torch.testing.assert_close(ours, want)
        torch.testing.assert_close(torch.autograd.grad(ours, args), torch.autograd.grad(want, args))

    def test_target_that_is_rendered_costs_nothing(self, forced_backend, device):
        w, f, _ = self.inputs(device=device)
        target = rayfuse.render_features(w, f)
        outputs, grads = self.gradients([w, f, target])
        assert not outputs[0].any()
        assert not any(grad.any() for grad in grads)

    def test_one_channel_of_one_sample(self, forced_backend, device):
        w, f, target = (torch.tensor(x, device=device) for x in ([0.5], [[4.0]], [5.0]))
        (loss,), (d_w, d_f, d_target) = self.gradients(
            [w, f, target], [torch.tensor(1.0, device=device)]
        )
        assert loss.item() == 9
        assert (d_w.item(), d_f.item(), d_target.item()) == (-24, -3, 6)

    @pytest.mark.parametrize("target_type", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("f_type", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_features_and_target_are_as_narrow_as_each_likes(
        self, forced_backend, device, f_type, target_type
    ):
        w, f, target = self.inputs(device=device)
        args = [w, f.to(f_type), target.to(target_type)]
        got, wide = self.gradients(args), self.gradients([x.float() for x in args])
        assert torch.equal(got[0][0], wide[0][0])
        for x, ours, full in zip(args, got[1], wide[1], strict=True):
            assert torch.equal(ours, full.to(x.dtype))

    def test_features_may_begin_anywhere_in_a_vector(self, forced_backend, device):
        w, f, target = self.inputs((2,), device=device, S=9, C=520)
        later = torch.cat([f.new_zeros(1), f.flatten()])[1:].view(f.shape)
        self.assert_equal(self.gradients([w, later, target]), self.gradients([w, f, target]))

    @pytest.mark.parametrize(("S", "C"), [(5000, 3), (3000, 20), (2, 9000)])
    def test_long_rays_and_many_channels(self, forced_backend, device, S, C):
        self.assert_as_right_as_torch(self.inputs((2,), device=device, S=S, C=C), f"at {S}, {C}")

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 12), st.integers(1, 40), st.floats(-1e3, 1e3), st.integers(0, 1000))
    def test_any_size_is_its_definition(self, S, C, offset, seed):
        """However far the target is from the rendering."""
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(3, S, generator=generator)
        f = torch.randn(3, S, C, generator=generator)
        target = offset + torch.randn(3, C, generator=generator)
        terms = w[..., None].double() * f.double()
        want = (terms.sum(-2) - target.double()).square().mean(-1)
        scale = (terms.abs().sum(-2) + target.abs()).square().mean(-1)
        for name in BACKENDS:
            if backend.reason(name) is None and device_of(name) == "cpu":
                with rayfuse.use_backend(name):
                    got = rayfuse.feature_distillation_loss(w, f, target, reduction="none")
                assert ((got - want).abs() <= 2e-6 * scale).all(), name
