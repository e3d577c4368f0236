"""What only feature rendering of packed rays knows: the dense op, nerfacc, how rays keep apart."""

import pytest
import torch

import rayfuse
from conftest import EMULATED
from contract import PackedContract
from rayfuse import backend


class PackedFeatureContract(PackedContract):
    """What both ops on packed features are tested with."""

    # samples of a ray on average, and channels: around the 16, 8, 4 and 2 lanes of the registers,
    # and where several samples share one
    sizes = tuple(
        {"P": P, "C": C}
        for P, C in (
            *((0, 3), (3, 3), (1, 1), (2, 5), (9, 2), (17, 7), (6, 8), (5, 15), (2, 77), (3, 130)),
        )
    )
    typical = {"P": 5, "C": 3}
    gpu_sizes = ({"P": 48, "C": 768}, {"P": 48, "C": 64}, {"P": 100, "C": 3})

    # the reference takes 20 passes over all samples
    long_sizes = {"C": 1}


def side_by_side(dense, R, S):
    """Dense inputs w [R, S], f [R, S, C] as packed ones, with the offsets."""
    w, f = dense
    offsets = torch.arange(0, R * S + 1, max(S, 1), device=w.device)
    return w.flatten(), f.flatten(0, 1), offsets


class TestPackedRenderFeatures(PackedFeatureContract):
    op = rayfuse.packed_render_features

    @pytest.mark.parametrize(("S", "C"), [(1, 3), (9, 4), (70, 7), (33, 64)])
    def test_rays_of_equal_length_are_dense_ones(self, forced_backend, device, S, C):
        w, f = (
            x.to(device).requires_grad_()
            for x in rayfuse.render_features.op.sample((3,), torch.float64, S=S, C=C)
        )
        ours = rayfuse.packed_render_features(*side_by_side((w, f), 3, S))
        d_features = torch.rand_like(ours)
        grads = torch.autograd.grad(ours, (w, f), d_features)
        with rayfuse.use_backend("ref"):
            want = rayfuse.render_features(w, f)
            torch.testing.assert_close(ours, want)
            torch.testing.assert_close(grads, torch.autograd.grad(want, (w, f), d_features))

    def test_it_is_what_nerfacc_accumulates(self, forced_backend, device):
        w, f, offsets = self.inputs(dtype=torch.float64, device=device)
        R = len(offsets) - 1
        ray = torch.arange(R, device=device).repeat_interleave(offsets.diff())
        want = w.new_zeros(R, f.shape[1]).index_add(0, ray, w[:, None] * f)
        torch.testing.assert_close(self.call([w, f, offsets]), want)

    @pytest.mark.parametrize("C", [1, 2, 3, 4, 7, 9])
    def test_short_ray_after_a_long_bad_one_is_clean(self, forced_backend, device, C):
        """Registers of several samples, and memory used again, hold nothing of another ray."""
        lengths = torch.tensor([13, 1, 2, 5, 3])
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device)
        w, f = torch.full((24,), torch.nan), torch.full((24, C), torch.nan)
        w[13:], f[13:] = 1, 2
        w, f = w.to(device).requires_grad_(), f.to(device).requires_grad_()
        features = rayfuse.packed_render_features(w, f, offsets)
        assert features[0].isnan().all()
        assert torch.equal(features[1:], 2.0 * lengths[1:, None].expand(4, C).to(device))
        d_w, d_f = torch.autograd.grad(features, (w, f), torch.ones_like(features))
        assert (d_w[13:] == 2 * C).all() and (d_f[13:] == 1).all()

    @pytest.mark.parametrize("C", [2, 40])
    def test_long_rays(self, forced_backend, device, C):
        P = 3000 if forced_backend in EMULATED else 200_000 // C
        self.assert_as_right_as_torch(self.inputs((3,), device=device, P=P, C=C))

    @pytest.mark.parametrize("isa", backend.isas())
    def test_large_gradient_is_that_of_its_parts(self, isa):
        """From 32 MB on it goes past the cache, to where one was before."""
        args = self.leaves(self.inputs((1100,), P=32, C=256))
        d_features = torch.rand(1100, 256)

        def gradients(first, last):
            some = self.leaves(self.rays(args, first, last))
            features = rayfuse.packed_render_features(*some)
            return torch.autograd.grad(features, some[:2], d_features[first:last])

        with rayfuse.use_backend(f"cpu.{isa}"):
            whole = gradients(0, 1100)
            parts = zip(gradients(0, 500), gradients(500, 1100), strict=True)
        assert whole[1].nbytes > 32 << 20
        assert all(map(torch.equal, whole, map(torch.cat, parts)))
