"""What only the interlevel loss knows: the published forms, what covers costs nothing, small w."""

import pytest
import torch

import rayfuse
from contract import Contract


def as_nerfstudio(t, w, t_env, w_env, eps=1e-7):
    """The loss of all samples of all rays at once, restated."""
    w_outer = rayfuse.outer_bound(t, t_env, w_env)
    return ((w - w_outer).clip(min=0) ** 2 / (w + eps)).mean()


class TestInterlevelLoss(Contract):
    op = rayfuse.interlevel_loss
    # around the registers' lanes and the nodes of 16 edges, and triton's blocks of 128
    sizes = tuple(
        {"S": S, "E": E}
        for S, E in ((1, 1), (3, 5), (4, 9), (16, 16), (17, 33), (64, 15), (128, 31), (65, 130))
    )
    typical = {"S": 6, "E": 5}
    variants = ({}, {"outside": "zero"}, {"outside": "below_zero"}, {"eps": 1e-3})
    gpu_sizes = ({"S": 48, "E": 96}, {"S": 48, "E": 256}, {"S": 4096, "E": 4096})

    def test_mean_over_rays_is_the_mean_over_all_samples(self, forced_backend, device):
        args = self.inputs((5, 6), torch.float64, device, S=12, E=4)
        with rayfuse.use_backend("ref"):
            want = as_nerfstudio(*args)
        assert want > 0
        torch.testing.assert_close(self.call(args), want)

    def test_what_is_kept_are_the_gradients_of_each_rays_loss(self, forced_backend, device):
        args = self.inputs(dtype=torch.float64, device=device, **self.sizes[3])
        ones = [torch.ones(self.leading, dtype=torch.float64, device=device)]
        for variant in self.variants:
            _, *kept = self.spec.run_fwd(*self.spec.raw_arguments(args, **variant))
            with rayfuse.use_backend("ref"):
                _, want = self.gradients(args, ones, variant)
            torch.testing.assert_close(tuple(kept), want)

    def test_one_bin_that_lacks_half(self, forced_backend, device):
        # 1/2 (1 - 1/2)^2 / 1 for the first sample, and nothing for the second
        t = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64, device=device)
        w, w_env = (torch.tensor(x, dtype=torch.float64, device=device) for x in ([1, 0.5], [0.5]))
        w_env.requires_grad_()
        loss = self.call([t, w, t[::2], w_env])
        torch.testing.assert_close(loss.item(), 0.125)
        (d_w_env,) = torch.autograd.grad(loss, w_env)
        torch.testing.assert_close(d_w_env.tolist(), [-0.5])

    def test_envelope_of_the_same_histogram_costs_nothing(self, forced_backend, device):
        t, w, _, _ = self.inputs(device=device, S=30, E=1)
        leaves = [t, w.requires_grad_(), t, w.detach().clone().requires_grad_()]
        loss = self.call(leaves)
        loss.backward()
        # the last sample has one bin, which the reference finds as a difference of sums
        assert loss.item() < 1e-12
        assert leaves[1].grad.abs().max() < 1e-5 and leaves[3].grad.abs().max() < 1e-5

    def test_weights_around_minus_eps_are_no_nan(self, forced_backend, device):
        t = torch.linspace(0, 1, 5, device=device)
        w = torch.tensor([-1e-7, 0.0, -2e-7, 1e-7], device=device, requires_grad=True)
        w_env = torch.zeros(4, device=device, requires_grad=True)
        loss = self.call([t, w, t, w_env])
        loss.backward()
        # the last one alone is not covered: 1/4 w^2 / (w + eps)
        torch.testing.assert_close(loss.item(), 1.25e-8)
        assert w.grad.isfinite().all() and w_env.grad.isfinite().all()
        assert w.grad[:3].tolist() == [0, 0, 0]

    @pytest.mark.parametrize(
        "dtype, sizes",
        [(torch.float32, {"S": 200, "E": 3200}), (torch.float64, {"S": 2000, "E": 300})],
        ids=str,
    )
    def test_long_rays(self, forced_backend, device, dtype, sizes):
        self.assert_as_right_as_torch(self.inputs((2,), dtype, device, **sizes), f"at {sizes}")

    def test_far_bins_do_not_cost_digits(self, forced_backend, device):
        """Sums of 4096 weights, of which a sample sees one or two."""
        t = torch.linspace(0, 1, 4097, device=device)
        generator = torch.Generator().manual_seed(0)
        w_env = torch.rand(2, 4096, generator=generator).to(device)
        w = (2 * w_env + 2).requires_grad_()
        exact = [x.detach().double().cpu() for x in (t.expand(2, -1), w, t.expand(2, -1), w_env)]
        with rayfuse.use_backend("ref"):
            want = self.call(exact, reduction="none")
        got = self.call([t.expand(2, -1), w, t.expand(2, -1), w_env], reduction="none")
        assert ((got.detach().cpu().double() - want) / want).abs().max() < 3e-7

    def test_options_are_checked(self):
        args = self.inputs()
        with pytest.raises(ValueError, match="interlevel_loss: outside must be 'clamp', 'zero' or"):
            self.call(args, outside="ignore")
        with pytest.raises(ValueError, match="interlevel_loss: eps must be finite and > 0, got 0"):
            self.call(args, eps=0.0)
