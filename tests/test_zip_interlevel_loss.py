"""What only Zip-NeRF's interlevel loss knows: the published form, its limits, its smoothness."""

import pytest
import torch

import rayfuse
from contract import Contract


def published(t, w, t_env, w_env, pulse_width, eps=1e-5):
    """As the paper builds it: sort the ends of all blurred edges, sum up the slopes of the density,
    then the density, and interpolate the parabolas. Widths must be positive."""
    r, zero = pulse_width, torch.zeros_like(t[..., :1])
    density = torch.cat([zero, w / t.diff(dim=-1), zero], -1)
    steps = density.diff(dim=-1) / (2 * r)
    ends, order = torch.cat([t - r, t + r], -1).sort(-1)
    slope = torch.cat([steps, -steps], -1).gather(-1, order).cumsum(-1)[..., :-1]
    width = ends.diff(dim=-1)
    blurred = torch.cat([zero, (slope * width).cumsum(-1)], -1)
    until = (blurred[..., 1:] + blurred[..., :-1]) / 2 * width
    until = torch.cat([zero, until.cumsum(-1)], -1)
    k = (torch.searchsorted(ends, t_env.contiguous(), right=True) - 1).clamp(0, width.shape[-1] - 1)
    d = (torch.minimum(t_env, ends[..., -1:]) - ends.gather(-1, k)).clamp(min=0)
    cdf = until.gather(-1, k) + d * (blurred.gather(-1, k) + d / 2 * slope.gather(-1, k))
    lacking = (cdf.diff(dim=-1) - w_env).clamp(min=0)
    return (lacking**2 / (w_env + eps)).mean(-1)


class TestZipInterlevelLoss(Contract):
    op = rayfuse.zip_interlevel_loss
    # around the registers' lanes, and triton's blocks of 128
    sizes = tuple(
        {"S": S, "E": E}
        for S, E in ((1, 1), (4, 9), (3, 2), (15, 16), (17, 65), (64, 129), (128, 64))
    )
    typical = {"S": 6, "E": 5}
    variants = ({"pulse_width": 0.05}, {"pulse_width": 0.3, "eps": 1e-3})
    gpu_sizes = ({"S": 48, "E": 96}, {"S": 32, "E": 64}, {"S": 4096, "E": 4096})

    @pytest.mark.parametrize("pulse_width", [0.003, 0.03, 0.5])
    def test_is_the_published_form(self, forced_backend, device, pulse_width):
        args = self.inputs((5,), torch.float64, device, S=20, E=30)
        args[3] = args[3] / 8
        leaves = self.leaves(args)
        got = self.call(leaves, pulse_width=pulse_width, reduction="none")
        want = published(*args[:3], leaves[3], pulse_width)
        assert want.min() > 0
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-10)
        (ours,), (theirs,) = (torch.autograd.grad(x.sum(), leaves[3]) for x in (got, want))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)

    def test_sample_without_width_is_the_limit_of_narrow_ones(self, forced_backend, device):
        t_env = torch.linspace(0, 1, 12, dtype=torch.float64, device=device)
        w_env = torch.full((11,), 0.01, dtype=torch.float64, device=device)
        w = torch.tensor([0.3, 0.7, 0.2], dtype=torch.float64, device=device)

        def loss(width):
            t = torch.tensor([0.2, 0.5, 0.5 + width, 0.6], dtype=torch.float64, device=device)
            return self.call([t, w, t_env, w_env])

        torch.testing.assert_close(loss(0.0), loss(1e-9), rtol=1e-6, atol=0)
        assert loss(0.0) > 0

    def test_all_weight_in_one_point(self, forced_backend, device):
        # the box of width 0.2 around 1 lies half in either bin
        t = torch.tensor([1.0, 1.0], device=device)
        t_env = torch.tensor([0.0, 1.0, 2.0], device=device)
        w_env = torch.tensor([0.0, 0.25], device=device, requires_grad=True)
        loss = self.call([t, torch.ones_like(t[:1]), t_env, w_env], pulse_width=0.1, eps=0.25)
        loss.backward()
        torch.testing.assert_close(loss.item(), 0.5 * (1 + 0.125))
        torch.testing.assert_close(w_env.grad.tolist(), [-0.5 * 2 * 4, -0.5 * 0.5 * 2.5])

    def test_gradient_at_no_weight_is_finite(self, forced_backend, device):
        args = self.inputs(device=device)
        args[3] = torch.zeros_like(args[3]).requires_grad_()
        self.call(args).backward()
        assert args[3].grad.isfinite().all() and args[3].grad.any()

    def test_enough_everywhere_costs_nothing(self, forced_backend, device):
        args = self.inputs(device=device)
        args[3] = torch.full_like(args[3], 100.0).requires_grad_()
        loss = self.call(args)
        loss.backward()
        assert loss.item() == 0 and not args[3].grad.any()

    def test_moving_an_edge_a_little_changes_little(self, forced_backend, device):
        """What outer_bound cannot: an edge of a sample crosses one of the envelope."""
        t_env = torch.linspace(0, 1, 5, dtype=torch.float64, device=device)
        w_env = torch.full((4,), 0.01, dtype=torch.float64, device=device)
        w = torch.tensor([1.0], dtype=torch.float64, device=device)
        below, above = (
            self.call([t_env.new_tensor([0.1, 0.5 + x]), w, t_env, w_env]) for x in (-1e-9, 1e-9)
        )
        torch.testing.assert_close(below, above, rtol=1e-6, atol=0)

    def test_final_level_gets_no_gradient(self, forced_backend, device):
        leaves = [x.requires_grad_() for x in self.inputs(device=device)]
        self.call(leaves).backward()
        assert [x.grad is None for x in leaves] == [True, True, True, False]

    @pytest.mark.parametrize("sizes", [{"S": 100, "E": 3000}, {"S": 3000, "E": 100}], ids=str)
    def test_long_rays(self, forced_backend, device, sizes):
        args = self.inputs((2,), device=device, **sizes)
        args[1] = args[1] * sizes["E"] / sizes["S"]
        self.assert_as_right_as_torch(args, f"at {sizes}")

    def test_pulse_width_is_checked(self):
        args = self.inputs()
        with pytest.raises(TypeError, match=r"zip_interlevel_loss: .*pulse_width"):
            rayfuse.zip_interlevel_loss(*args)
        with pytest.raises(ValueError, match="pulse_width must be finite and > 0, got 0"):
            self.call(args, pulse_width=0.0)
