"""What only the distortion loss knows: its definition, closed forms, invariances, stability."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rayfuse
from conftest import BACKENDS, EMULATED, device_of
from contract import Contract
from rayfuse import backend


def pairwise(t, w):
    """The definition, O(S^2): Barron et al., Mip-NeRF 360 (2022), eq. 15."""
    mid = (t[..., 1:] + t[..., :-1]) / 2
    distance = (mid[..., :, None] - mid[..., None, :]).abs()
    inter = (w[..., :, None] * w[..., None, :] * distance).sum((-1, -2))
    return inter + (w**2 * t.diff(dim=-1)).sum(-1) / 3


class TestDistortionLoss(Contract):
    op = rayfuse.distortion_loss
    # around the 16, 8, 4 and 2 lanes of the registers, and what users train with
    sizes = tuple(
        {"S": S} for S in (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 64, 257)
    )
    typical = {"S": 19}
    gpu_sizes = ({"S": 128}, {"S": 100}, {"S": 65536})
    engine_on_every_backend = True

    def bad_calls(self, device):
        yield from super().bad_calls(device)
        t, w = self.inputs(device=device)
        yield (
            "w must have shape [..., S] with ...=[7], S=19 (from t), got [7, 20]",
            ValueError,
            [t, t],
        )
        yield (
            "t must have shape [..., S+1] with S >= 0, got [7, 0]",
            ValueError,
            [t[:, :0], w],
        )

    def test_reference_is_the_pairwise_definition(self):
        for S in (0, 1, 2, 7, 40):
            args = [x.requires_grad_() for x in self.inputs((3,), torch.float64, S=S)]
            with rayfuse.use_backend("ref"):
                ours = self.call(args, reduction="none")
            torch.testing.assert_close(ours, pairwise(*args))
            torch.testing.assert_close(
                torch.autograd.grad(ours.sum(), args),
                torch.autograd.grad(pairwise(*args).sum(), args),
            )

    def test_one_interval_costs_a_third_of_its_width(self, forced_backend, device):
        t = torch.tensor([2.0, 5.0], dtype=torch.float64, device=device)
        loss = self.call([t, torch.ones_like(t[:1])])
        torch.testing.assert_close(loss.item(), 1.0)

    def test_two_points_of_weight_cost_twice_their_distance(self, forced_backend, device):
        # zero widths leave the midpoints alone: 2 * 0.25 * 0.75 * (5 - 1)
        t = torch.tensor([1.0, 1.0, 5.0, 5.0], dtype=torch.float64, device=device)
        w = torch.tensor([0.25, 0.0, 0.75], dtype=torch.float64, device=device)
        torch.testing.assert_close(self.call([t, w]).item(), 1.5)

    def test_loss_is_linear_in_distance_and_quadratic_in_weight(self, forced_backend, device):
        t, w = self.inputs(dtype=torch.float64, device=device)
        loss = self.call([t, w])
        torch.testing.assert_close(self.call([3 * t, w]), 3 * loss)
        torch.testing.assert_close(self.call([t + 5, w]), loss)
        torch.testing.assert_close(self.call([t, 3 * w]), 9 * loss)
        mirrored = self.call([-t.flip(-1), w.flip(-1)])
        torch.testing.assert_close(mirrored, loss)

    def test_far_away_it_is_as_exact_as_the_numbers_given(self, forced_backend, device):
        """Intervals of 0.01 at a distance of 1000, where prefix sums of w m lose 3 digits."""
        generator = torch.Generator().manual_seed(0)
        t = 1000 + 0.01 * torch.rand(64, 129, generator=generator).cumsum(-1)
        w = torch.rand(64, 128, generator=generator) / 128
        exact = pairwise(t.double(), w.double())
        got = self.call([t.to(device), w.to(device)], reduction="none").cpu().double()
        assert ((got - exact).abs() / exact).max() < 1e-6

    @pytest.mark.parametrize("S", [4096, 65536])
    def test_long_rays(self, forced_backend, device, S):
        S = min(S, 20_000) if forced_backend in EMULATED else S
        self.assert_as_right_as_torch(self.inputs((2,), device=device, S=S), f"at S={S}")

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.tuples(st.floats(0, 1e6, width=32), st.floats(-1, 1e3, width=32)),
            min_size=1,
            max_size=40,
        )
    )
    def test_whatever_is_sorted_comes_out_as_defined(self, samples):
        """Coincident edges, huge gaps and slightly negative weights included."""
        t = torch.tensor([0.0, *sorted(edge for edge, _ in samples)])
        w = torch.tensor([weight for _, weight in samples])
        exact = pairwise(t.double(), w.double())
        scale = pairwise(t.double(), w.double().abs())
        for name in BACKENDS:
            if backend.reason(name) is None and device_of(name) == "cpu":
                with rayfuse.use_backend(name):
                    got = rayfuse.distortion_loss(t, w).double()
                assert (got - exact).abs() <= 1e-5 * scale + 1e-30, name

    def test_debug_finds_edges_that_decrease(self):
        t, w = self.inputs()
        t[1, 5] = t[1, 4] - 0.5
        with (
            rayfuse.debug(),
            pytest.raises(ValueError, match=r"t must .* not decrease .* at \[1, 5\]"),
        ):
            self.call([t, w])
        with (
            rayfuse.debug(),
            pytest.raises(ValueError, match="w must be finite and >= 0, got -1 at"),
        ):
            self.call([t.sort(-1).values, w - 1 - w])
