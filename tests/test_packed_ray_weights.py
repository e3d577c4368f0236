"""What only the packed ray weights know: the dense ones, walls, what remains behind a ray."""

import pytest
import torch

import rayfuse
import simt
from contract import PackedContract


class TestPackedRayWeights(PackedContract):
    op = rayfuse.packed_ray_weights
    # samples of a ray on average, from none to several registers
    sizes = tuple({"P": P} for P in (0, 1, 2, 3, 8, 17, 33, 130))
    typical = {"P": 11}
    gpu_sizes = ({"P": 64}, {"P": 1000})
    variants = ({}, {"opaque_background": True})

    @pytest.mark.parametrize("S", [1, 8, 17, 128, 129, 3000])
    @pytest.mark.parametrize("opaque", [False, True])
    def test_intervals_that_touch_are_the_dense_weights(self, forced_backend, device, S, opaque):
        sigma, t = (x.to(device) for x in rayfuse.ray_weights.op.sample((3,), torch.float64, S=S))
        sigma.requires_grad_(), t.requires_grad_()
        offsets = torch.arange(0, 3 * S + 1, S, device=device)
        packed = sigma.flatten(), t[:, :-1].flatten(), t[:, 1:].flatten(), offsets
        w, transmittance, remaining = self.call(packed, {"opaque_background": opaque})
        ours = w.view(3, S), torch.cat([transmittance.view(3, S), remaining[:, None]], 1)
        with rayfuse.use_backend("ref"):
            want = rayfuse.ray_weights(sigma, t, opaque_background=opaque)
        torch.testing.assert_close(ours, want)
        d_outputs = [torch.linspace(-1, 2, y.numel()).view_as(y).to(y) for y in want]
        grads = [torch.autograd.grad(outputs, [sigma, t], d_outputs) for outputs in (ours, want)]
        torch.testing.assert_close(*grads)

    def test_weights_and_the_light_behind_are_all_the_light(self, forced_backend, device):
        args = self.inputs((12,), torch.float64, device, P=20)
        w, _, remaining = self.call(args)
        ray = torch.arange(12, device=device).repeat_interleave(args[-1].diff())
        total = torch.zeros_like(remaining).index_add(0, ray, w)
        torch.testing.assert_close(total + remaining, torch.ones_like(total))
        empty = args[-1].diff() == 0
        assert empty.any() and (remaining[empty] == 1).all()

    def test_thin_samples_keep_their_digits(self, forced_backend, device):
        """1 - exp(-x) would flush them to 0."""
        sigma, t = torch.full((9,), 1e-9, device=device), torch.arange(9.0, device=device)
        w, _, _ = self.call([sigma, t, t + 1, torch.tensor([0, 9], device=device)])
        torch.testing.assert_close(w, sigma, rtol=1e-6, atol=0)

    def test_light_behind_many_samples_keeps_its_digits(self, forced_backend, device):
        t = torch.arange(60.0, device=device)
        offsets = torch.tensor([0, 60], device=device)
        _, transmittance, remaining = self.call([torch.ones_like(t), t, t + 1, offsets])
        exact = torch.exp(-torch.arange(61, dtype=torch.float64)).float()
        got = torch.cat([transmittance, remaining]).cpu()
        torch.testing.assert_close(got, exact, rtol=2e-6, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_walls_have_finite_gradients(self, forced_backend, device, dtype):
        inf = torch.inf
        # three rays in one: walls without width are nothing, a wall, a density that float16
        # cannot hold
        sigma = torch.tensor([0, inf, 0, inf, 0, 0, inf, inf, 1, 1, 0, 0, 1e6, 1e6, 1e6])
        start = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0] * 3)
        end = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0] * 3)
        args = [x.to(device, dtype) for x in (sigma, start, end)]
        offsets = torch.tensor([0, 5, 10, 15], device=device)
        outputs, grads = self.gradients([*args, offsets])
        assert outputs[0].tolist() == [0] * 5 + [0, 0, 1, 0, 0] * 2
        assert outputs[2].tolist() == [1, 0, 0]
        assert all(x.isfinite().all() for x in (*outputs, *grads))
        with rayfuse.use_backend("ref"):
            want = self.gradients([x.cpu().double() for x in args] + [offsets.cpu()])
        for ours, exact in zip(grads, want[1], strict=True):
            torch.testing.assert_close(ours.cpu().double(), exact, rtol=1e-3, atol=1e-5)

    def test_wall_in_a_long_ray_is_no_nan(self, forced_backend, device):
        """A sum that carries what it rounds off would turn inf - inf into NaN."""
        P, wall = 9000, 100
        sigma, t = torch.full((P,), 1e-3, device=device), torch.arange(float(P), device=device)
        sigma[wall] = torch.inf
        args = sigma, t, t + 1, torch.tensor([0, P], device=device)
        (w, transmittance, remaining), grads = self.gradients(args)
        torch.testing.assert_close(w.sum().item(), 1.0)
        assert not (transmittance[wall + 1 :].any() or w[wall + 1 :].any() or remaining.any())
        assert all(grad.isfinite().all() and not grad[wall + 1 :].any() for grad in grads)

    def test_output_without_a_gradient_counts_as_zero(self, forced_backend, device):
        args = self.inputs(device=device)
        for i in range(3):
            leaves, d_outputs = self.leaves(args), self.d_outputs(args)
            alone = torch.autograd.grad(self.outputs(leaves)[i], leaves[:3], d_outputs[i])
            for j in {0, 1, 2} - {i}:
                d_outputs[j].zero_()
            _, all_ = self.gradients(args, d_outputs)
            assert all(map(torch.equal, alone, all_))

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

    def test_debug_finds_negative_densities_and_accepts_walls(self):
        args = self.inputs()
        args[0][3] = torch.inf
        with rayfuse.debug():
            self.call(args)
        args[0][5] = -0.5
        with rayfuse.debug(), pytest.raises(ValueError, match=r">= 0, got -0.5 at \[5\]"):
            self.call(args)
