"""What only the packed distortion loss knows: its definition, the dense one, closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rayfuse
import simt
from conftest import BACKENDS, EMULATED, device_of
from contract import PackedContract
from rayfuse import backend


def pairwise(t_starts, t_ends, w, offsets):
    """The definition, O(S^2) of each ray: Barron et al., Mip-NeRF 360 (2022), eq. 15."""
    losses = []
    for begin, end in offsets.unfold(0, 2, 1).tolist():
        start, stop, weight = (x[begin:end] for x in (t_starts, t_ends, w))
        mid = (start + stop) / 2
        distance = (mid[:, None] - mid[None, :]).abs()
        inter = (weight[:, None] * weight[None, :] * distance).sum()
        losses.append(inter + (weight**2 * (stop - start)).sum() / 3)
    return torch.stack(losses)


class TestPackedDistortionLoss(PackedContract):
    op = rayfuse.packed_distortion_loss
    # samples of a ray on average, from none to several registers
    sizes = tuple({"P": P} for P in (0, 1, 2, 3, 5, 8, 15, 17, 33, 64, 130))
    typical = {"P": 19}
    gpu_sizes = ({"P": 64}, {"P": 1000})
    engine_on_every_backend = True

    def test_reference_is_the_pairwise_definition(self):
        for P in (1, 2, 7, 40):
            args = self.leaves(self.inputs((4,), torch.float64, P=P))
            with rayfuse.use_backend("ref"):
                ours = self.call(args, reduction="none")
            want = pairwise(*args)
            torch.testing.assert_close(ours, want)
            torch.testing.assert_close(
                torch.autograd.grad(ours.sum(), args[:3]),
                torch.autograd.grad(want.sum(), args[:3]),
            )

    @pytest.mark.parametrize("S", [1, 2, 15, 16, 17, 31, 33, 48, 127, 128, 129, 257, 1025, 3000])
    def test_intervals_that_touch_are_the_dense_loss(self, forced_backend, device, S):
        dense = rayfuse.distortion_loss.op
        t, w = (x.to(device) for x in dense.sample((3,), torch.float64, S=S))
        d_loss = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, device=device)
        t.requires_grad_(), w.requires_grad_()
        offsets = torch.arange(0, 3 * S + 1, S, device=device)
        packed = t[:, :-1].flatten(), t[:, 1:].flatten(), w.flatten(), offsets
        ours = self.call(packed, reduction="none")
        grads = torch.autograd.grad(ours, [t, w], d_loss)
        with rayfuse.use_backend("ref"):
            want = rayfuse.distortion_loss(t, w, reduction="none")
            torch.testing.assert_close(ours, want)
            torch.testing.assert_close(grads, torch.autograd.grad(want, [t, w], d_loss))

    def test_two_points_of_weight_cost_twice_their_distance(self, forced_backend, device):
        # whatever lies between them: 2 * 0.25 * 0.75 * (5 - 1)
        t = torch.tensor([1.0, 5.0], dtype=torch.float64, device=device)
        w = torch.tensor([0.25, 0.75], dtype=torch.float64, device=device)
        offsets = torch.tensor([0, 2], device=device)
        torch.testing.assert_close(self.call([t, t, w, offsets]).item(), 1.5)

    def test_far_away_it_is_as_exact_as_the_numbers_given(self, forced_backend, device):
        """Intervals of 0.01 at a distance of 1000, where prefix sums of w m lose 3 digits."""
        generator = torch.Generator().manual_seed(0)
        t = 1000 + 0.01 * torch.rand(64, 129, generator=generator).cumsum(-1)
        w = torch.rand(64 * 128, generator=generator) / 128
        offsets = torch.arange(0, 64 * 128 + 1, 128)
        args = t[:, :-1].flatten(), t[:, 1:].flatten(), w, offsets
        exact = pairwise(*(x.double() for x in args[:3]), offsets)
        got = self.call([x.to(device) for x in args], reduction="none").cpu().double()
        assert ((got - exact).abs() / exact).max() < 1e-6

    @pytest.mark.parametrize("S", [4096, 65536])
    def test_long_rays(self, forced_backend, device, S):
        S = min(S, 10_000) if forced_backend in EMULATED else S
        self.assert_as_right_as_torch(self.inputs((3,), device=device, P=S))

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.lists(
                st.tuples(
                    st.floats(0, 1e6, width=32),
                    st.floats(0, 1e6, width=32),
                    st.floats(-1, 1e3, width=32),
                ),
                max_size=40,
            ),
            min_size=1,
            max_size=5,
        )
    )
    def test_whatever_is_sorted_comes_out_as_defined(self, rays):
        """Empty rays, coincident edges, huge gaps and slightly negative weights included."""
        edges = [sorted(t for sample in ray for t in sample[:2]) for ray in rays]
        t_starts = torch.tensor([t for ray in edges for t in ray[::2]])
        t_ends = torch.tensor([t for ray in edges for t in ray[1::2]])
        w = torch.tensor([weight for ray in rays for _, _, weight in ray])
        offsets = torch.tensor([0, *map(len, rays)]).cumsum(0)
        t = t_starts.double(), t_ends.double()
        exact = pairwise(*t, w.double(), offsets)
        scale = pairwise(*t, w.double().abs(), offsets)
        for name in BACKENDS:
            if backend.reason(name) is None and device_of(name) == "cpu":
                with rayfuse.use_backend(name):
                    got = self.call([t_starts, t_ends, w, offsets], reduction="none").double()
                assert ((got - exact).abs() <= 1e-5 * scale + 1e-30).all(), name

    @pytest.mark.skipif(simt.reason() is not None, reason=str(simt.reason()))
    @pytest.mark.parametrize("P", [30, 64, 1000])
    def test_one_launch_moves_whole_sectors_wherever_rays_begin(self, P):
        executor = simt.load()
        executor.reset()
        with rayfuse.use_backend("simt"):
            self.gradients(self.inputs((16,), P=P))
        counters = executor.counters()
        executor.reset()
        assert len(counters) == 2
        for kernel, found in counters.items():
            assert found["launches"] == 1
            assert found["sectors"] <= 1.1 * found["ideal_sectors"], kernel

    def test_debug_finds_intervals_out_of_order(self):
        args = self.inputs()
        place = args[-1][2].item()
        for i, name in enumerate(("t_starts", "t_ends")):
            wrong = [x.clone() for x in args]
            wrong[i][place + 1] = args[0][place] - 1
            with rayfuse.debug(), pytest.raises(ValueError, match=f"{name} must not decrease"):
                self.call(wrong)
