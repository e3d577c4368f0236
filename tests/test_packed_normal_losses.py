"""What only the losses on normals of packed rays know: the dense op, one term alone, NaN."""

import pytest
import torch

import rayfuse
from conftest import EMULATED
from contract import PackedContract, are_same


class TestPackedNormalLosses(PackedContract):
    op = rayfuse.packed_normal_losses
    # samples of a ray on average, around the 16, 8, 4 and 2 lanes of the registers
    sizes = tuple({"P": P} for P in (0, 1, 2, 3, 5, 8, 17, 33, 64))
    typical = {"P": 5}
    gpu_sizes = ({"P": 64}, {"P": 1000})
    variants = ({}, {"nan": "propagate"}, {"d": None}, {"n_pred": None})

    @pytest.mark.parametrize("S", [1, 2, 7, 16, 33, 300])
    def test_rays_of_equal_length_are_dense_ones(self, forced_backend, device, S):
        dense = rayfuse.normal_losses.op.sample((3,), torch.float64, S=S)
        leaves = w, n, n_pred, d = [x.to(device).requires_grad_() for x in dense]
        offsets = torch.arange(0, 3 * S + 1, S, device=device)
        ours = rayfuse.packed_normal_losses(
            w.flatten(),
            n.flatten(0, 1),
            offsets,
            n_pred=n_pred.flatten(0, 1),
            d=d,
            reduction="none",
        )
        d_losses = torch.rand_like(ours[0]), torch.rand_like(ours[1])
        grads = torch.autograd.grad(ours, leaves, d_losses)
        with rayfuse.use_backend("ref"):
            want = rayfuse.normal_losses(w, n, n_pred=n_pred, d=d, reduction="none")
            torch.testing.assert_close(ours, want)
            torch.testing.assert_close(grads, torch.autograd.grad(want, leaves, d_losses))

    def test_each_loss_alone_is_that_of_both(self, forced_backend, device):
        args = self.leaves(self.inputs(device=device))
        w, n, offsets, n_pred, d = args
        both = self.outputs(args)
        ray_indices = torch.arange(len(d), device=device).repeat_interleave(offsets.diff())
        named = dict(ray_indices=ray_indices, rays=len(d), reduction="none")
        alone = (
            rayfuse.packed_orientation_loss(w, n, d, offsets, reduction="none"),
            rayfuse.packed_predicted_normal_loss(w, n, n_pred, offsets, reduction="none"),
        )
        again = (
            rayfuse.packed_orientation_loss(w, n, d, **named),
            rayfuse.packed_predicted_normal_loss(w, n, n_pred, **named),
        )
        assert all(map(are_same, both, alone)) and all(map(are_same, both, again))
        for ours, right, wanted in zip(both, alone, ((w, n, d), (w, n, n_pred)), strict=True):
            d_loss = torch.rand_like(ours)
            assert all(
                map(
                    are_same,
                    torch.autograd.grad(ours, wanted, d_loss, retain_graph=True),
                    torch.autograd.grad(right, wanted, d_loss),
                )
            )

    def test_absent_loss_is_zero_and_pulls_nobody(self, forced_backend, device):
        w, n, offsets, n_pred, d = self.leaves(self.inputs(device=device))
        _, predicted = rayfuse.packed_normal_losses(w, n, offsets, d=d, reduction="none")
        assert not predicted.any()
        assert not any(g.any() for g in torch.autograd.grad(predicted.sum(), (w, n)))
        # nor does the loss that nobody used
        _, predicted = rayfuse.packed_normal_losses(w, n, offsets, n_pred=n_pred, d=d)
        assert not torch.autograd.grad(predicted, d, materialize_grads=True)[0].any()

    @pytest.mark.parametrize("where", ["n", "d"])
    def test_nan_is_dropped_with_gradients_of_exactly_zero(self, forced_backend, device, where):
        args = self.inputs(device=device)
        r = self.longest(args)
        own = slice(args[2][r].item(), args[2][r + 1].item())
        bad = slice(own.start + 1, own.start + 2) if where == "n" else own
        w, n, offsets, _, d = args
        want = rayfuse.packed_orientation_loss(
            w.index_fill(0, torch.arange(bad.start, bad.stop, device=device), 0.0), n, d, offsets,
            reduction="none",
        )  # fmt: skip
        n, d = n.clone(), d.clone()
        if where == "n":
            n[bad] = torch.nan
        else:
            d[r] = torch.nan
        w, n, d = leaves = [x.requires_grad_() for x in (w, n, d)]
        loss = rayfuse.packed_orientation_loss(w, n, d, offsets, reduction="none")
        torch.testing.assert_close(loss, want)
        d_w, d_n, d_d = torch.autograd.grad(loss.sum(), leaves)
        assert all(x.isfinite().all() for x in (d_w, d_n, d_d))
        assert not d_w[bad].any() and not d_n[bad].any()

    def test_nan_comes_out_as_nan(self, forced_backend, device):
        """In the variant that drops none."""
        clean = self.inputs(device=device)
        r = self.longest(clean)
        for i in self.differentiable():
            rows = self.own(self.spec.signature.inputs[i], clean, r, r + 1)
            args = [x.clone() for x in clean]
            args[i][rows.start] = torch.nan
            losses = self.outputs(args, {"nan": "propagate"})
            nan = torch.stack([y.isnan() for y in losses]).any(0)
            assert nan.tolist() == [ray == r for ray in range(self.leading[0])]

    def test_long_rays(self, forced_backend, device):
        P = 3000 if forced_backend in EMULATED else 100_000
        self.assert_as_right_as_torch(self.inputs((2,), device=device, P=P))
