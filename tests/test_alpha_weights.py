"""What only the weights from opacities know: opaque samples, closed forms, visibility."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rayfuse
from conftest import BACKENDS, EMULATED, device_of
from contract import Contract
from rayfuse import backend
from rayfuse.ops.alpha_weights import visibility_mask


def one_by_one(alpha, d_w, d_transmittance):
    """Values, and gradients by hand from T_{i+1} = T_i (1 - alpha_i)."""
    light, w = [torch.ones_like(alpha[..., 0])], []
    for a in alpha.unbind(-1):
        w.append(light[-1] * a)
        light.append(light[-1] * (1 - a))
    d_light, d_alpha = d_transmittance[..., -1], []
    for i in reversed(range(alpha.shape[-1])):
        d_alpha.insert(0, light[i] * (d_w[..., i] - d_light))
        d_light = (
            d_transmittance[..., i] + d_w[..., i] * alpha[..., i] + d_light * (1 - alpha[..., i])
        )
    return torch.stack(w, -1), torch.stack(light, -1), torch.stack(d_alpha, -1)


class TestAlphaWeights(Contract):
    op = rayfuse.alpha_weights
    # around the 16, 8, 4 and 2 lanes of the registers, and what users train with
    sizes = tuple({"S": S} for S in (0, 1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 33, 48, 64, 257))
    typical = {"S": 19}
    gpu_sizes = ({"S": 128}, {"S": 100}, {"S": 65536})

    @pytest.mark.parametrize("S", [1, 5, 19, 70, 600])
    def test_opaque_samples_have_exact_gradients(self, forced_backend, device, S):
        """Where others divide by 1 - alpha."""
        (alpha,) = self.inputs((64,), torch.float64, device, S=S)
        alpha = torch.where(alpha > 0.8, 1.0, torch.where(alpha < 0.2, 0.0, alpha))
        d_w, d_transmittance = self.d_outputs([alpha])
        (w, transmittance), (d_alpha,) = self.gradients([alpha], [d_w, d_transmittance])
        want = one_by_one(alpha, d_w, d_transmittance)
        for ours, right in zip((w, transmittance, d_alpha), want, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-12)

    def test_reference_is_exact_for_opaque_samples_too(self):
        alpha = torch.tensor([0.5, 1.0, 0.25, 1.0], dtype=torch.float64, requires_grad=True)
        d_w, d_transmittance = self.d_outputs([alpha])
        with rayfuse.use_backend("ref"):
            _, (d_alpha,) = self.gradients([alpha], [d_w, d_transmittance])
            assert torch.autograd.gradcheck(rayfuse.alpha_weights, alpha)
        want = one_by_one(alpha, d_w, d_transmittance)[2].detach()
        torch.testing.assert_close(d_alpha, want)

    def test_weights_and_the_light_behind_are_all_the_light(self, forced_backend, device):
        w, transmittance = self.call(self.inputs(dtype=torch.float64, device=device, S=100))
        torch.testing.assert_close(w, -transmittance.diff(dim=-1))

    def test_opacities_of_densities_give_their_weights(self, forced_backend, device):
        sigma, t = rayfuse.ray_weights.op.sample((5,), torch.float64, S=48)
        alpha = -torch.expm1(-sigma * t.diff(dim=-1))
        with rayfuse.use_backend("ref"):
            want = rayfuse.ray_weights(sigma, t)
        for ours, right in zip(self.call([alpha.to(device)]), want, strict=True):
            torch.testing.assert_close(ours.cpu(), right)

    @pytest.mark.parametrize("S", [4096, 65536])
    def test_long_rays(self, forced_backend, device, S):
        """S factors are as many roundings; torch multiplies in double on a CPU."""
        S = min(S, 20_000) if forced_backend in EMULATED else S
        (alpha,) = (x / 1000 for x in self.inputs((2,), device=device, S=S))
        outputs, grads = self.gradients([alpha])
        with rayfuse.use_backend("ref"):
            want = self.gradients([alpha.cpu().double()])
        for ours, exact in zip((*outputs, *grads), (*want[0], *want[1]), strict=True):
            error = (ours.cpu().double() - exact).abs().max() / exact.abs().max()
            assert error < 1e-7 * S**0.5

    def test_output_without_a_gradient_counts_as_zero(self, forced_backend, device):
        args = self.inputs(device=device)
        for i in (0, 1):
            leaves = self.leaves(args)
            d_outputs = self.d_outputs(args)
            (alone,) = torch.autograd.grad(self.outputs(leaves)[i], leaves, d_outputs[i])
            d_outputs[1 - i].zero_()
            _, (both,) = self.gradients(args, d_outputs)
            assert torch.equal(alone, both)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40))
    def test_any_opacities_come_out_as_defined(self, opacities):
        alpha = torch.tensor(opacities)
        d_w, d_transmittance = self.d_outputs([alpha])
        want = one_by_one(alpha.double(), d_w.double(), d_transmittance.double())
        for name in BACKENDS:
            if backend.reason(name) is None and device_of(name) == "cpu":
                with rayfuse.use_backend(name):
                    outputs, grads = self.gradients([alpha], [d_w, d_transmittance])
                for ours, right in zip((*outputs, *grads), want, strict=True):
                    torch.testing.assert_close(ours.double(), right, rtol=0, atol=1e-5, msg=name)

    def test_visibility_is_the_rule_of_nerfacc(self):
        (alpha,) = self.inputs((4,), S=64)
        _, transmittance = rayfuse.alpha_weights(alpha)
        visible = visibility_mask(transmittance, alpha, early_stop_eps=1e-3, alpha_thre=0.1)
        assert torch.equal(visible, (transmittance[:, :-1] >= 1e-3) & (alpha >= 0.1))
        assert torch.equal(visible, visibility_mask(transmittance[:, :-1], alpha, 1e-3, 0.1))
        assert visible.any() and not visible.all()
        # an empty sample that light reaches is visible unless a threshold says otherwise
        assert visibility_mask(torch.ones(2), torch.zeros(1)).item()
