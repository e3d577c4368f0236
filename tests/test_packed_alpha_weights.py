"""What only the packed weights from opacities know: the dense ones, opaque samples, visibility."""

import pytest
import torch

import rayfuse
import simt
from contract import PackedContract


class TestPackedAlphaWeights(PackedContract):
    op = rayfuse.packed_alpha_weights
    # samples of a ray on average, from none to several registers
    sizes = tuple({"P": P} for P in (0, 1, 2, 3, 8, 17, 33, 130))
    typical = {"P": 11}
    gpu_sizes = ({"P": 64}, {"P": 1000})
    gpu_spills = {
        f"packed_alpha_weights_bwd_kernel<{T}>": "8 bytes on sm_100 and sm_120, for a fourth block"
        for T in ("float", "__half", "__nv_bfloat16")
    }

    @pytest.mark.parametrize("S", [1, 8, 17, 128, 129, 3000])
    def test_equal_rays_are_the_dense_weights_with_opaque_samples(self, forced_backend, device, S):
        """Where others divide by 1 - alpha."""
        (alpha,) = (x.to(device) for x in rayfuse.alpha_weights.op.sample((3,), torch.float64, S=S))
        alpha = torch.where(alpha > 0.9, 1.0, torch.where(alpha < 0.1, 0.0, alpha))
        # light gets far in some rays only
        alpha = (alpha * torch.tensor([[1.0], [1.0], [1 / 64]]).to(alpha)).requires_grad_()
        offsets = torch.arange(0, 3 * S + 1, S, device=device)
        w, transmittance, remaining = self.call([alpha.flatten(), offsets])
        ours = w.view(3, S), torch.cat([transmittance.view(3, S), remaining[:, None]], 1)
        with rayfuse.use_backend("ref"):
            want = rayfuse.alpha_weights(alpha)
        torch.testing.assert_close(ours, want)
        d_outputs = [torch.linspace(-1, 2, y.numel()).view_as(y).to(y) for y in want]
        grads = [torch.autograd.grad(outputs, alpha, d_outputs) for outputs in (ours, want)]
        torch.testing.assert_close(*grads)

    def test_gradients_at_opaque_samples_are_exact(self, forced_backend, device):
        # w = a (1 - a') with a = 1: d_a' = 0 a', and d_a = 0.5 - (a' = 0.25)
        alpha = torch.tensor([1.0, 0.25], device=device)
        offsets = torch.tensor([0, 2], device=device)
        _, (d_alpha,) = self.gradients(
            [alpha, offsets],
            [torch.tensor([0.5, 1.0], device=device), torch.zeros_like(alpha), alpha.new_zeros(1)],
        )
        assert d_alpha.tolist() == [0.25, 0.0]

    def test_opacities_of_densities_give_their_weights(self, forced_backend, device):
        args = rayfuse.packed_ray_weights.op.sample((), torch.float64, R=9, P=200)
        alpha = -torch.expm1(-args[0] * (args[2] - args[1]))
        with rayfuse.use_backend("ref"):
            want = rayfuse.packed_ray_weights(*args)
        got = self.call([alpha.to(device), args[3].to(device)])
        torch.testing.assert_close(tuple(y.cpu() for y in got), want)

    def test_output_without_a_gradient_counts_as_zero(self, forced_backend, device):
        args = self.inputs(device=device)
        for i in range(3):
            leaves, d_outputs = self.leaves(args), self.d_outputs(args)
            (alone,) = torch.autograd.grad(self.outputs(leaves)[i], leaves[:1], d_outputs[i])
            for j in {0, 1, 2} - {i}:
                d_outputs[j].zero_()
            _, (all_,) = self.gradients(args, d_outputs)
            assert torch.equal(alone, all_)

    def test_visibility_is_that_of_each_ray_alone(self):
        args = self.inputs((4,), P=64)
        _, transmittance, _ = rayfuse.packed_alpha_weights(*args)
        visible = rayfuse.visibility_mask(transmittance, args[0], 1e-3, 0.1)
        assert visible.any() and not visible.all()
        for r in range(4):
            (alpha, _), own = self.rays(args, r, r + 1), slice(*args[1][r : r + 2].tolist())
            _, light = rayfuse.alpha_weights(alpha)
            assert torch.equal(visible[own], rayfuse.visibility_mask(light, alpha, 1e-3, 0.1))

    @pytest.mark.skipif(simt.reason() is not None, reason=str(simt.reason()))
    @pytest.mark.parametrize("P", [32, 1000])
    def test_one_launch_moves_whole_sectors(self, P):
        """Of rays that begin at some: lanes that skip a store are counted as if out of step."""
        args = self.inputs((16,), P=P)
        args[-1][:-1] -= args[-1][:-1] % 16
        executor = simt.load()
        executor.reset()
        with rayfuse.use_backend("simt"):
            self.gradients(args)
        counters = executor.counters()
        executor.reset()
        assert len(counters) == 2
        for kernel, found in counters.items():
            assert found["launches"] == 1
            assert found["sectors"] <= 1.1 * found["ideal_sectors"], kernel
