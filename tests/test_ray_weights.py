"""What only the ray weights know: closed forms, walls, and how nerfstudio writes them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rayfuse
from conftest import BACKENDS, EMULATED, device_of
from contract import Contract
from rayfuse import backend


def as_nerfstudio(sigma, t):
    """`RaySamples.get_weights`, which hides the NaN of inf * 0."""
    x = sigma * t.diff(dim=-1)
    before = torch.cat([x.new_zeros((*x.shape[:-1], 1)), x[..., :-1].cumsum(-1)], -1)
    return torch.nan_to_num(torch.exp(-before) * (1 - torch.exp(-x)))


class TestRayWeights(Contract):
    op = rayfuse.ray_weights
    # around the 16, 8, 4 and 2 lanes of the registers, and what users train with
    sizes = tuple({"S": S} for S in (0, 1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 33, 48, 64, 257))
    typical = {"S": 19}
    gpu_sizes = ({"S": 128}, {"S": 100}, {"S": 65536})
    variants = ({}, {"opaque_background": True})

    def bad_calls(self, device):
        yield from super().bad_calls(device)
        _, t = self.inputs(device=device)
        yield "t must have shape [..., S+1] with ...=[7], S=20", ValueError, [t, t]

    def test_values_are_those_of_nerfstudio(self, forced_backend, device):
        sigma, t = self.inputs((5,), torch.float64, device, S=48)
        w, _ = self.call([10 * sigma, t])
        torch.testing.assert_close(w, as_nerfstudio(10 * sigma, t))

    def test_one_sample_of_constant_density(self, forced_backend, device):
        sigma, t = torch.tensor([0.5], device=device), torch.tensor([1.0, 3.0], device=device)
        w, transmittance = self.call([sigma, t])
        torch.testing.assert_close(w.item(), 1 - 1 / torch.e)
        torch.testing.assert_close(transmittance.tolist(), [1.0, 1 / torch.e])

    def test_weights_and_the_light_behind_are_all_the_light(self, forced_backend, device):
        w, transmittance = self.call(self.inputs(dtype=torch.float64, device=device, S=100))
        torch.testing.assert_close(w, -transmittance.diff(dim=-1))

    def test_thin_samples_keep_their_digits(self, forced_backend, device):
        """1 - exp(-x) would flush them to 0."""
        sigma, t = torch.full((9,), 1e-9), torch.arange(10.0)
        w, _ = self.call([sigma.to(device), t.to(device)])
        torch.testing.assert_close(w.cpu(), sigma, rtol=1e-6, atol=0)

    def test_light_behind_many_samples_keeps_its_digits(self, forced_backend, device):
        sigma, t = torch.full((60,), 1.0), torch.arange(61.0)
        _, transmittance = self.call([sigma.to(device), t.to(device)])
        exact = torch.exp(-t.double()).float()
        torch.testing.assert_close(transmittance.cpu(), exact, rtol=2e-6, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_walls_have_finite_gradients(self, forced_backend, device, dtype):
        inf = torch.inf
        t = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 3.0], dtype=dtype, device=device)
        for densities, weights in (
            # a wall without width is nothing
            ([0.0, inf, 0.0, inf, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]),
            ([0.0, inf, inf, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0, 0.0]),
            # a density that float16 cannot hold
            ([0.0, 0.0, 1e6, 1e6, 1e6], [0.0, 0.0, 1.0, 0.0, 0.0]),
        ):
            sigma = torch.tensor(densities, dtype=dtype, device=device)
            outputs, grads = self.gradients([sigma, t])
            assert outputs[0].tolist() == weights
            assert all(x.isfinite().all() for x in (*outputs, *grads))
            with rayfuse.use_backend("ref"):
                want = self.gradients([sigma.cpu().double(), t.cpu().double()])
            for ours, exact in zip(grads, want[1], strict=True):
                torch.testing.assert_close(ours.cpu().double(), exact, rtol=1e-3, atol=1e-5)

    def test_wall_is_opaque_however_thin(self, forced_backend, device):
        t = torch.tensor([0.0, 2.0**-120], device=device)
        w, transmittance = self.call([torch.full_like(t[:1], torch.inf), t])
        assert (w.item(), transmittance.tolist()) == (1.0, [1.0, 0.0])

    def test_wall_in_a_long_ray_is_no_nan(self, forced_backend, device):
        """A sum that carries what it rounds off would turn inf - inf into NaN."""
        S, wall = 9000, 100
        sigma, t = torch.full((S,), 1e-3, device=device), torch.arange(S + 1.0, device=device)
        sigma[wall] = torch.inf
        (w, transmittance), grads = self.gradients([sigma, t])
        torch.testing.assert_close(w.sum().item(), 1.0)
        assert not transmittance[wall + 1 :].any()
        assert all(grad.isfinite().all() for grad in grads)

    def test_opaque_background_stops_all_light(self, forced_backend, device):
        sigma, t = self.inputs(device=device)
        w, transmittance = self.call([sigma, t], {"opaque_background": True})
        assert not transmittance[:, -1].any()
        torch.testing.assert_close(w.sum(-1), torch.ones(7, device=device))
        open_, _ = self.call([sigma, t])
        assert torch.equal(w[:, :-1], open_[:, :-1])

    @pytest.mark.parametrize("S", [4096, 65536])
    def test_long_rays(self, forced_backend, device, S):
        S = min(S, 20_000) if forced_backend in EMULATED else S
        self.assert_as_right_as_torch(self.inputs((2,), device=device, S=S), f"at S={S}")

    def test_output_without_a_gradient_counts_as_zero(self, forced_backend, device):
        args = self.inputs(device=device)
        for i in (0, 1):
            leaves = self.leaves(args)
            outputs = self.outputs(leaves)
            d_outputs = self.d_outputs(args)
            alone = torch.autograd.grad(outputs[i], leaves, d_outputs[i])
            d_outputs[1 - i].zero_()
            _, both = self.gradients(args, d_outputs)
            assert all(map(torch.equal, alone, both))

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.floats(0, 1e6, width=32) | st.just(0.0),
                st.floats(0, 2.0**100, width=32) | st.just(torch.inf),
            ),
            min_size=1,
            max_size=40,
        )
    )
    def test_whatever_is_sorted_comes_out_as_defined(self, samples):
        t = torch.tensor([0.0, *sorted(edge for edge, _ in samples)])
        sigma = torch.tensor([density for _, density in samples])
        exact = rayfuse.ray_weights.op.reference(sigma.double(), t.double())
        for name in BACKENDS:
            if backend.reason(name) is None and device_of(name) == "cpu":
                with rayfuse.use_backend(name):
                    outputs, grads = self.gradients([sigma, t])
                for ours, want in zip(outputs, exact, strict=True):
                    # the rounding of x is one of exp(-x) times x
                    torch.testing.assert_close(ours.double(), want, rtol=0, atol=3e-6, msg=name)
                assert all(grad[:-1].isfinite().all() for grad in grads), name

    def test_debug_finds_negative_densities_and_accepts_walls(self):
        sigma, t = self.inputs()
        sigma[2, 3] = torch.inf
        with rayfuse.debug():
            self.call([sigma, t])
        sigma[1, 5] = -0.5
        with rayfuse.debug(), pytest.raises(ValueError, match=r">= 0, got -0.5 at \[1, 5\]"):
            self.call([sigma, t])
