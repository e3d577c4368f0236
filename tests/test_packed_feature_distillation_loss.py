"""What only feature distillation on packed rays knows: the dense op, the MSE of a rendering."""

import pytest
import torch
import torch.nn.functional as F

import rayfuse
from conftest import EMULATED
from test_packed_render_features import PackedFeatureContract, side_by_side


class TestPackedFeatureDistillationLoss(PackedFeatureContract):
    op = rayfuse.packed_feature_distillation_loss
    # and where a block owns each ray and has whole vectors of channels
    sizes = (*PackedFeatureContract.sizes, {"P": 9, "C": 520})

    def test_empty_rays_anywhere_change_nothing(self, forced_backend, device):
        """But what they cost themselves: they render to 0."""
        w, f, target, offsets = self.inputs(device=device)
        want = self.outputs([w, f, target, offsets])[0]
        R = len(target)
        targets = torch.zeros(3 * R + 1, target.shape[1], device=device)
        targets[1::3], targets[0::3] = target, 2
        got = self.outputs([w, f, targets, offsets.repeat_interleave(3)[1:]])[0]
        torch.testing.assert_close(got[1::3], want)
        assert (got[0::3] == 4).all() and not got[2::3].any()

    @pytest.mark.parametrize(("S", "C"), [(1, 3), (9, 4), (70, 7), (33, 64)])
    def test_rays_of_equal_length_are_dense_ones(self, forced_backend, device, S, C):
        dense = rayfuse.feature_distillation_loss.op.sample((3,), torch.float64, S=S, C=C)
        leaves = w, f, target = [x.to(device).requires_grad_() for x in dense]
        w_packed, f_packed, offsets = side_by_side((w, f), 3, S)
        ours = self.call([w_packed, f_packed, target, offsets], reduction="none")
        d_loss = torch.rand_like(ours)
        grads = torch.autograd.grad(ours, leaves, d_loss)
        with rayfuse.use_backend("ref"):
            want = rayfuse.feature_distillation_loss(w, f, target, reduction="none")
            torch.testing.assert_close(ours, want)
            torch.testing.assert_close(grads, torch.autograd.grad(want, leaves, d_loss))

    def test_mean_is_the_mse_of_the_rendering(self, forced_backend, device):
        args = self.leaves(self.inputs(dtype=torch.float64, device=device))
        w, f, target, offsets = args
        want = F.mse_loss(rayfuse.packed_render_features(w, f, offsets), target)
        ours = self.call(args)
        torch.testing.assert_close(ours, want)
        torch.testing.assert_close(
            torch.autograd.grad(ours, args[:3]), torch.autograd.grad(want, args[:3])
        )

    def test_target_that_is_rendered_costs_nothing(self, forced_backend, device):
        w, f, _, offsets = self.inputs(device=device)
        target = rayfuse.packed_render_features(w, f, offsets)
        outputs, grads = self.gradients([w, f, target, offsets])
        assert not outputs[0].any()
        assert not any(grad.any() for grad in grads)

    @pytest.mark.parametrize(("P", "C"), [(5, 3), (9, 520)])
    def test_samples_of_no_ray_get_zeros_and_change_nothing(self, forced_backend, device, P, C):
        if forced_backend == "ref" or forced_backend.startswith("cpu"):
            pytest.skip("offsets are looked at there, and must leave no sample out")
        w, f, target, good = self.inputs(device=device, P=P, C=C)
        own = slice(3, len(w) - 4)
        stray = torch.ones(len(w), dtype=torch.bool, device=device)
        stray[own] = False
        offsets = good.clamp(own.start, own.stop)
        _, (d_w, d_f, d_target) = self.gradients([w, f, target, offsets])
        want = self.gradients([w[own], f[own], target, offsets - own.start])[1]
        for ours, right in zip((d_w[own], d_f[own], d_target), want, strict=True):
            torch.testing.assert_close(ours, right)
        _, product = self.kept(self.spec.raw_arguments([w, f, target, offsets]))
        for x in (product, d_w, d_f):
            assert not x[stray].any()
        for offsets in self.bad_offsets(good):
            kept = self.kept(self.spec.raw_arguments([w, f, target, offsets]))
            assert all(torch.isfinite(x).all() for x in kept)

    @pytest.mark.parametrize(("P", "C"), [(2, 9000), (3000, 20)])
    def test_long_rays_and_many_channels(self, forced_backend, device, P, C):
        P = min(P, 1500) if forced_backend in EMULATED else P
        self.assert_as_right_as_torch(self.inputs((2,), device=device, P=P, C=C))
