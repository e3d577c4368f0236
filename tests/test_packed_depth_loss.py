"""What only the packed depth losses know: the dense ones, rays without a depth or any samples."""

import math

import pytest
import torch

import rayfuse
import simt
from conftest import EMULATED
from contract import PackedContract
from test_depth_loss import FORMS, NO_DEPTH, ds_nerf, urban, urban_mass


class TestPackedDepthLoss(PackedContract):
    op = rayfuse.packed_depth_loss
    # samples of a ray on average, around the lanes of the registers
    sizes = tuple({"P": P} for P in (0, 1, 3, 8, 17, 64))
    typical = {"P": 9}
    gpu_sizes = ({"P": 64}, {"P": 1000})
    variants = (
        {"sigma": 0.1},
        {"sigma": 0.3, "form": "urban"},
        {"sigma": 0.1, "lengths": None},
        {"sigma": 0.3, "form": "urban", "lengths": None, "depth_pred": None, "eps": 1e-3},
        {"sigma": 0.2, "form": "urban_mass"},
    )

    def bad_calls(self, device):
        for message, error, args in super().bad_calls(device):
            # the length of depth is the number of rays: where it is wrong the offsets do not fit
            yield message.replace("depth must have shape", "offsets must have shape"), error, args

    def ray_by_ray(self, args):
        """Values of each ray: samples of it, and its own."""
        w, s, depth, offsets, lengths, depth_pred = args
        for r, (begin, end) in enumerate(offsets.unfold(0, 2, 1).tolist()):
            own = [x[begin:end].tolist() for x in (w, s, lengths)]
            yield own, depth[r].item(), depth_pred[r].item()

    def test_values_are_the_published_ones(self, forced_backend, device):
        args = self.inputs((6,), torch.float64)
        w, s, depth, offsets, lengths, depth_pred = (x.to(device) for x in args)
        want = [ds_nerf(*own, depth, 0.2) for own, depth, _ in self.ray_by_ray(args)]
        got = rayfuse.packed_ds_nerf_depth_loss(
            w, s, lengths, depth, offsets, sigma=0.2, reduction="none"
        )
        torch.testing.assert_close(got.cpu(), torch.tensor(want, dtype=got.dtype))
        want = [urban(*own[:2], *depths, 0.2) for own, *depths in self.ray_by_ray(args)]
        got = rayfuse.packed_urban_radiance_field_depth_loss(
            w, s, depth, depth_pred, offsets, sigma=0.2, reduction="none"
        )
        torch.testing.assert_close(got.cpu(), torch.tensor(want, dtype=got.dtype))
        want = [urban_mass(*own, *depths, 0.2) for own, *depths in self.ray_by_ray(args)]
        (got,) = self.outputs([x.to(device) for x in args], {"form": "urban_mass", "sigma": 0.2})
        torch.testing.assert_close(got.cpu(), torch.tensor(want, dtype=got.dtype))

    @pytest.mark.parametrize("S", [0, 1, 9, 33])
    def test_rays_of_equal_counts_are_the_dense_loss(self, forced_backend, device, S):
        dense = rayfuse.depth_loss.op.sample((4,), torch.float64, S=S)
        w, s, depth, lengths, depth_pred = (x.to(device) for x in dense)
        leaves = [x.requires_grad_() for x in (w, s, lengths, depth_pred)]
        offsets = S * torch.arange(5, device=device)
        d_loss = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64, device=device)
        for form in FORMS:
            options = dict(sigma=0.3, form=form, reduction="none", depth_pred=depth_pred)
            ours = rayfuse.packed_depth_loss(
                w.flatten(), s.flatten(), depth, offsets, lengths=lengths.flatten(), **options
            )
            grads = torch.autograd.grad(ours, leaves, d_loss)
            with rayfuse.use_backend("ref"):
                want = rayfuse.depth_loss(w, s, depth, lengths=lengths, **options)
                torch.testing.assert_close(ours, want)
                torch.testing.assert_close(grads, torch.autograd.grad(want, leaves, d_loss))

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("bad", NO_DEPTH, ids=str)
    def test_ray_without_a_depth_is_zero_whatever_it_holds(self, forced_backend, device, form, bad):
        variant = {"form": form, "sigma": 0.3}
        clean = self.inputs((5,), device=device)
        r = self.longest(clean)
        own = self.own(self.spec.signature.inputs[0], clean, r, r + 1)
        for poison in (math.nan, math.inf):
            args = [x.clone() for x in clean]
            for i in (0, 1, 4):
                args[i][own] = poison
            args[2][r], args[5][r] = bad, poison
            losses, grads = self.gradients(args, variant=variant)
            want, right = self.gradients(clean, variant=variant)
            inside = [own, own, own, slice(r, r + 1)]
            assert losses[0][r] == 0
            assert not any(grad[part].any() for grad, part in zip(grads, inside, strict=True))
            for x, y, part in zip(
                (*losses, *grads), (*want, *right), (slice(r, r + 1), *inside), strict=True
            ):
                rest = torch.ones(len(x), dtype=torch.bool, device=device)
                rest[part] = False
                assert torch.equal(x[rest], y[rest])

    def test_ray_without_samples_keeps_the_term_of_its_depth(self, forced_backend, device):
        none = torch.zeros(0, device=device)
        depth, depth_pred = (torch.tensor([x], device=device) for x in (2.0, 1.5))
        offsets = torch.zeros(2, dtype=torch.int64, device=device)
        depth_pred.requires_grad_()
        loss = self.call([none, none, depth, offsets, none, depth_pred])
        loss.backward()
        assert loss.item() == 0.25 and depth_pred.grad.item() == -1

    def test_depth_gets_no_gradient(self, forced_backend, device):
        args = self.inputs(device=device)
        for i in self.floating(args):
            args[i].requires_grad_()
        self.call(args).backward()
        assert args[2].grad is None and args[0].grad is not None

    def test_long_rays(self, forced_backend, device):
        P = 3_000 if forced_backend in EMULATED else 20_000
        for variant in (*self.variants[:2], self.variants[-1]):
            args = self.inputs((2,), device=device, P=P)
            self.assert_as_right_as_torch(args, f"at {variant}", variant)

    @pytest.mark.skipif(simt.reason() is not None, reason=str(simt.reason()))
    @pytest.mark.parametrize("P", [64, 1000])
    def test_one_launch_moves_whole_sectors(self, P):
        """Of rays that begin at some: of a sector with two rays each moves all."""
        args = self.inputs((16,), P=P)
        offsets = args[self.offsets["P"]]
        offsets[:-1] -= offsets[:-1] % 16
        executor = simt.load()
        executor.reset()
        with rayfuse.use_backend("simt"):
            self.gradients(args)
        counters = executor.counters()
        executor.reset()
        assert len(counters) == 2
        for kernel, found in counters.items():
            assert found["launches"] == 1
            assert found["sectors"] <= 1.1 * found["ideal_sectors"], kernel

    def test_sigma_and_form_are_checked(self):
        args = self.inputs()
        with pytest.raises(ValueError, match="sigma must be finite and > 0, got 0"):
            self.call(args, sigma=0)
        with pytest.raises(
            ValueError, match="form must be 'ds_nerf', 'urban' or 'urban_mass', got"
        ):
            self.call(args, form="urf")
