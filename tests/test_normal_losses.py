"""What only the losses on normals know: the published forms, one term alone, what a NaN does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rayfuse
from conftest import BACKENDS, device_of
from contract import Contract, are_same
from rayfuse import backend


def as_published(w, n, n_pred, d):
    """Ref-NeRF (2022), sample by sample: v points from the sample to the camera."""
    orientation, predicted = torch.zeros(2, len(w), dtype=w.dtype)
    for r in range(len(w)):
        for w_i, n_i, p_i in zip(w[r], n[r], n_pred[r], strict=True):
            orientation[r] += w_i * min(0.0, (n_i @ -d[r]).item()) ** 2
            predicted[r] += w_i * (1 - n_i @ p_i)
    return orientation, predicted


class TestNormalLosses(Contract):
    op = rayfuse.normal_losses
    # around the 16, 8, 4 and 2 lanes of the registers, which 3 of hold as many vectors
    sizes = tuple({"S": S} for S in (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 33, 48, 64, 257))
    typical = {"S": 9}
    gpu_sizes = ({"S": 128}, {"S": 100}, {"S": 65536})
    engine_on_every_backend = True
    variants = ({}, {"nan": "propagate"}, {"d": None}, {"n_pred": None})

    def test_values_are_the_published_ones(self, forced_backend, device):
        args = self.inputs((4,), torch.float64, device)
        published = as_published(*[x.cpu() for x in args])
        for ours, right in zip(self.outputs(args), published, strict=True):
            torch.testing.assert_close(ours.cpu(), right)

    def test_normal_that_looks_at_the_camera_costs_nothing(self, forced_backend, device):
        w, n, _, d = self.inputs((4,), torch.float64, device)
        towards, away = -d[:, None].expand_as(n), d[:, None].expand_as(n)
        assert not rayfuse.orientation_loss(w, towards, d, reduction="none").any()
        length = d.square().sum(-1)
        turned = rayfuse.orientation_loss(w, away, d, reduction="none")
        torch.testing.assert_close(turned, w.sum(-1) * length.square())
        opposite = rayfuse.predicted_normal_loss(w, towards, away, reduction="none")
        torch.testing.assert_close(opposite, w.sum(-1) * (1 + length))

    def test_each_loss_alone_is_that_of_both(self, forced_backend, device):
        args = self.leaves(self.inputs(device=device))
        w, n, n_pred, d = args
        both = self.outputs(args)
        alone = (
            rayfuse.orientation_loss(w, n, d, reduction="none"),
            rayfuse.predicted_normal_loss(w, n, n_pred, reduction="none"),
        )
        for ours, right, wanted in zip(both, alone, ((w, n, d), (w, n, n_pred)), strict=True):
            assert are_same(ours, right)
            d_loss = torch.rand_like(ours)
            assert all(
                map(
                    are_same,
                    torch.autograd.grad(ours, wanted, d_loss, retain_graph=True),
                    torch.autograd.grad(right, wanted, d_loss),
                )
            )

    def test_absent_loss_is_zero_and_pulls_nobody(self, forced_backend, device):
        args = self.leaves(self.inputs(device=device))
        w, n, n_pred, d = args
        orientation, predicted = rayfuse.normal_losses(w, n, d=d, reduction="none")
        assert orientation.any() and not predicted.any()
        assert not any(g.any() for g in torch.autograd.grad(predicted.sum(), (w, n)))
        orientation, predicted = rayfuse.normal_losses(w, n, n_pred=n_pred, reduction="none")
        assert predicted.any() and not orientation.any()
        # the loss that nobody used pulls nobody either
        _, predicted = rayfuse.normal_losses(*args[:2], n_pred=n_pred, d=d)
        assert not torch.autograd.grad(predicted, d, materialize_grads=True)[0].any()

    @pytest.mark.parametrize("where", ["n", "d"])
    def test_nan_is_dropped_with_gradients_of_exactly_zero(self, forced_backend, device, where):
        w, n, _, d = self.leaves(self.inputs(device=device))
        with torch.no_grad():
            n[2, 3] = torch.nan if where == "n" else n[2, 3]
            d[2] = torch.nan if where == "d" else d[2]
        loss = rayfuse.orientation_loss(w, n, d, reduction="none")
        d_w, d_n, d_d = torch.autograd.grad(loss.sum(), (w, n, d))
        assert all(x.isfinite().all() for x in (loss, d_w, d_n, d_d))
        dropped = slice(3, 4) if where == "n" else slice(None)
        assert not d_w[2, dropped].any() and not d_n[2, dropped].any()
        kept = [i for i in range(n.shape[1]) if where == "n" and i != 3]
        want = rayfuse.orientation_loss(w[:, kept], n[:, kept], d.nan_to_num(), reduction="none")
        torch.testing.assert_close(loss[2], want[2])
        if where == "d":
            assert not d_d[2].any()

    def test_nan_propagates_where_that_is_asked_for(self, forced_backend, device):
        w, n, _, d = self.leaves(self.inputs(device=device))
        with torch.no_grad():
            n[2, 3, 1] = torch.nan
        loss = rayfuse.orientation_loss(w, n, d, nan="propagate", reduction="none")
        assert loss.isnan().tolist() == [ray == 2 for ray in range(len(w))]
        d_n = torch.autograd.grad(loss.sum(), n)[0]
        assert d_n[2, 3].isnan().all() and d_n.isnan().sum() == 3

    def test_nan_comes_out_as_nan(self, forced_backend, device):
        """In the variant that drops none."""
        clean = self.inputs(device=device)
        for i in range(4):
            args = [x.clone() for x in clean]
            args[i][3].view(-1)[1] = torch.nan
            losses = self.outputs(args, {"nan": "propagate"})
            nan = torch.stack([y.isnan() for y in losses]).any(0)
            assert nan.tolist() == [ray == 3 for ray in range(self.leading[0])]

    @pytest.mark.parametrize("S", [4096, 20000])
    def test_long_rays(self, forced_backend, device, S):
        self.assert_as_right_as_torch(self.inputs((2,), device=device, S=S), f"at S={S}")

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.tuples(*[st.floats(-1e3, 1e3, width=32) | st.just(float("nan"))] * 7),
            min_size=1,
            max_size=40,
        ),
        st.tuples(*[st.floats(-2, 2, width=32)] * 3),
    )
    def test_whatever_comes_is_as_the_reference_has_it(self, samples, direction):
        packed = torch.tensor(samples)
        w, n, n_pred = packed[:, 0].abs(), packed[:, 1:4], packed[:, 4:]
        args = [w, n.contiguous(), n_pred.contiguous(), torch.tensor(direction)]
        with rayfuse.use_backend("ref"):
            want = self.gradients([x.double() for x in args], [torch.ones(())] * 2)
        for name in BACKENDS:
            if backend.reason(name) is None and device_of(name) == "cpu":
                with rayfuse.use_backend(name):
                    got = self.gradients(args, [torch.ones(())] * 2)
                for ours, right in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
                    scale = right.nan_to_num(0).abs().max().item() if right.numel() else 0.0
                    torch.testing.assert_close(
                        ours.double(), right, rtol=0, atol=1e-4 * (1 + scale), equal_nan=True
                    )
