"""What only the depth losses know: the published forms, rays without a depth, where bands end."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rayfuse
from conftest import BACKENDS, device_of
from contract import Contract
from rayfuse import backend

FORMS = ("ds_nerf", "urban", "urban_mass")
NO_DEPTH = (0.0, -1.0, math.inf, -math.inf, math.nan)


def ds_nerf(w, s, lengths, depth, sigma):
    """Deng et al. (2022), one ray, with nerfstudio's 2 sigma below."""
    return sum(
        -math.log(w_i + 1e-7) * math.exp(-((s_i - depth) ** 2) / (2 * sigma)) * l_i
        for w_i, s_i, l_i in zip(w, s, lengths, strict=True)
    )


def urban(w, s, depth, depth_pred, sigma):
    """Rematas et al. (2022), one ray, the samples of the bands summed."""
    scale = sigma / 3
    loss = (depth - depth_pred) ** 2
    for w_i, s_i in zip(w, s, strict=True):
        if depth - sigma <= s_i <= depth + sigma:
            z = (s_i - depth) / scale
            loss += (w_i - math.exp(-z * z / 2) / (scale * math.sqrt(2 * math.pi))) ** 2
        elif s_i < depth - sigma:
            loss += w_i**2
    return loss


def urban_mass(w, s, lengths, depth, depth_pred, sigma):
    """The squared distances of weights from masses, and that of the depths, one ray."""
    loss = (depth - depth_pred) ** 2
    for w_i, s_i, l_i in zip(w, s, lengths, strict=True):
        below = [
            math.erfc((depth - edge) / (sigma / 3) / math.sqrt(2)) / 2
            for edge in (s_i - l_i / 2, s_i + l_i / 2)
        ]
        if s_i - l_i / 2 <= depth + sigma:
            loss += (w_i - (below[1] - below[0])) ** 2
    return loss


class TestDepthLoss(Contract):
    op = rayfuse.depth_loss
    # around the 16, 8, 4 and 2 lanes of the registers
    sizes = tuple({"S": S} for S in (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 33, 48, 64, 257))
    typical = {"S": 9}
    gpu_sizes = ({"S": 128}, {"S": 100}, {"S": 65536})
    variants = (
        {"sigma": 0.1},
        {"sigma": 0.3, "form": "urban"},
        {"sigma": 0.1, "lengths": None},
        {"sigma": 0.3, "form": "urban", "lengths": None, "eps": 1e-3},
        {"sigma": 0.2, "depth_pred": None},
        {"sigma": 0.2, "form": "urban_mass"},
        {"sigma": 0.2, "form": "urban_mass", "lengths": None},
    )

    def test_values_are_the_published_ones(self, forced_backend, device):
        w, s, depth, lengths, depth_pred = self.inputs((6,), torch.float64, device)
        want = [
            ds_nerf(*rays, 0.2)
            for rays in zip(*(x.tolist() for x in (w, s, lengths, depth)), strict=True)
        ]
        got = rayfuse.ds_nerf_depth_loss(w, s, lengths, depth, sigma=0.2, reduction="none")
        torch.testing.assert_close(got.cpu(), torch.tensor(want, dtype=got.dtype))
        want = [
            urban(*rays, 0.2)
            for rays in zip(*(x.tolist() for x in (w, s, depth, depth_pred)), strict=True)
        ]
        got = rayfuse.urban_radiance_field_depth_loss(
            w, s, depth, depth_pred, sigma=0.2, reduction="none"
        )
        torch.testing.assert_close(got.cpu(), torch.tensor(want, dtype=got.dtype))

    def test_mass_is_that_of_a_normal_distribution(self, forced_backend, device):
        args = self.inputs((6,), torch.float64, device)
        rows = zip(*(args[i].tolist() for i in (0, 1, 3, 2, 4)), strict=True)
        want = [urban_mass(*rays, 0.2) for rays in rows]
        (got,) = self.outputs(args, {"form": "urban_mass", "sigma": 0.2})
        torch.testing.assert_close(got.cpu(), torch.tensor(want, dtype=got.dtype))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_interval_that_holds_the_whole_band_is_asked_for_all_the_weight(
        self, forced_backend, device, dtype
    ):
        """Before it for none, half a band for half; behind any weight is free."""
        depth, sigma = torch.tensor([4.0], dtype=dtype, device=device), 0.25
        # far before, around, around and wider, up to the middle, from the band's end on, behind
        s = [1.0, 4.0, 3.75, 3.5, 4.5, 4.75]
        lengths = [1.0, 1.0, 2.0, 1.0, 0.5, 0.5]
        mass = [0.0, 1.0, 1.0, 0.5, math.erfc(3 / math.sqrt(2)) / 2, None]
        for s_i, l_i, m in zip(s, lengths, mass, strict=True):
            one = [torch.tensor([[x]], dtype=dtype, device=device) for x in (s_i, l_i)]
            for w in (0.0, 0.25, 0.5, 1.0):
                weight = torch.full_like(one[0], w, requires_grad=True)
                loss = rayfuse.depth_loss(
                    weight, one[0], depth, lengths=one[1], form="urban_mass", sigma=sigma
                )
                (d_w,) = torch.autograd.grad(loss, weight)
                error = 0.0 if m is None else w - m
                assert loss.item() == pytest.approx(error**2, rel=0, abs=1e-6)
                assert d_w.item() == pytest.approx(2 * error, rel=0, abs=1e-6)

    def test_weight_that_is_the_mass_costs_exactly_nothing(self, forced_backend, device):
        s = torch.tensor([[0.5, 1.5, 2.5, 3.5]], device=device)
        w = torch.tensor([[0.0, 1.0, 0.0, 0.7]], device=device)
        args = [w, s, torch.tensor([1.5], device=device), torch.ones_like(s), torch.ones(1)]
        losses, grads = self.gradients(
            [x.to(device) for x in args],
            variant={"form": "urban_mass", "sigma": 0.125, "depth_pred": None},
        )
        assert not losses[0].any() and not any(grad.any() for grad in grads)

    def test_ends_of_the_band_belong_to_it(self, forced_backend, device):
        # all of these are exact in binary
        s = torch.tensor([[1.0, 1.25, 1.75, 2.0]], dtype=torch.float64, device=device)
        depth, sigma = torch.tensor([1.5], dtype=torch.float64, device=device), 0.25
        for i, f in enumerate((1.0, (1 - 12 * math.exp(-4.5) / math.sqrt(2 * math.pi)) ** 2)):
            for j, want in ((i, f), (3 - i, 0.0 if i == 0 else f)):
                w = torch.zeros_like(s)
                w[0, j] = 1
                empty = rayfuse.depth_loss(0 * w, s, depth, form="urban", sigma=sigma)
                base = 12 * math.exp(-4.5) / math.sqrt(2 * math.pi)
                torch.testing.assert_close(empty.item(), 2 * base**2)
                loss = rayfuse.depth_loss(w, s, depth, form="urban", sigma=sigma)
                others = 2 * base**2 if i == 0 else base**2
                torch.testing.assert_close(loss.item(), want + others)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("bad", NO_DEPTH, ids=str)
    def test_ray_without_a_depth_is_zero_whatever_it_holds(self, forced_backend, device, form, bad):
        variant = {"form": form, "sigma": 0.3}
        clean = self.inputs((4,), device=device)
        for poison in (1.0, math.nan, math.inf):
            args = [x.clone() for x in clean]
            for x in args:
                x[1] = poison
            args[2][1] = bad
            losses, grads = self.gradients(args, variant=variant)
            assert not losses[0][1].any()
            assert not any(grad[1].any() for grad in grads)
            want = self.gradients(clean, variant=variant)
            rest = [0, 2, 3]
            self.assert_equal(
                ([losses[0][rest]], [grad[rest] for grad in grads]),
                ([want[0][0][rest]], [grad[rest] for grad in want[1]]),
            )

    def test_mean_is_over_all_rays_unless_told(self, forced_backend, device):
        args = self.inputs((4,), torch.float64, device)
        each = self.outputs(args)[0]
        args[2][1] = 0.0
        rest = each.sum() - each[1]
        torch.testing.assert_close(self.call(args), rest / 4)
        torch.testing.assert_close(self.call(args, denominator=3), rest / 3)

    def test_depth_gets_no_gradient(self, forced_backend, device):
        args = [x.requires_grad_() for x in self.inputs(device=device)]
        self.call(args).backward()
        assert args[2].grad is None and args[0].grad is not None

    def test_weight_of_zero_has_a_finite_loss_and_gradient(self, forced_backend, device):
        """-log(1e-7), and a slope of 1e7."""
        w = torch.zeros(1, 1, dtype=torch.float64, device=device, requires_grad=True)
        s, depth = torch.full_like(w, 2.0).detach(), torch.full_like(w[0], 2.0).detach()
        loss = rayfuse.depth_loss(w, s, depth, sigma=0.1)
        torch.testing.assert_close(loss.item(), 7 * math.log(10))
        torch.testing.assert_close(torch.autograd.grad(loss, w)[0].item(), -1e7)

    @pytest.mark.parametrize("S", [4096, 20000])
    def test_long_rays(self, forced_backend, device, S):
        for variant in (*self.variants[:2], {"sigma": 0.2, "form": "urban_mass"}):
            args = self.inputs((2,), device=device, S=S)
            self.assert_as_right_as_torch(args, f"at S={S}, {variant}", variant)

    def test_sigma_and_form_are_checked(self):
        args = self.inputs()
        with pytest.raises(ValueError, match="sigma must be finite and > 0, got 0"):
            self.call(args, sigma=0)
        with pytest.raises(
            ValueError, match="form must be 'ds_nerf', 'urban' or 'urban_mass', got"
        ):
            self.call(args, form="urf")

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.floats(0, 1e3, width=32), st.floats(0, 100, width=32), st.floats(0, 10, width=32)
            ),
            min_size=1,
            max_size=40,
        ),
        st.sampled_from([*NO_DEPTH, 0.5, 2.0, 50.0]),
        st.sampled_from(FORMS),
        st.sampled_from([0.25, 1.0, 8.0]),
    )
    def test_whatever_comes_is_as_the_reference_has_it(self, samples, depth, form, sigma):
        w, s, lengths = torch.tensor(samples).T.contiguous()
        args = [w, s, torch.tensor(depth), lengths, torch.tensor(1.25)]
        variant = {"form": form, "sigma": sigma}
        ones = [torch.ones(())]
        with rayfuse.use_backend("ref"):
            want = self.gradients([x.double() for x in args], ones, variant)
        for name in BACKENDS:
            if backend.reason(name) is None and device_of(name) == "cpu":
                with rayfuse.use_backend(name):
                    got = self.gradients(args, ones, variant)
                for ours, right in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
                    torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-4)
