"""What only the scans know: torch's own, zeros in products, sums of a million samples."""

import itertools

import pytest
import torch

import rayfuse
import simt
from conftest import EMULATED
from contract import PackedContract

CHOICES = [
    dict(kind=kind, exclusive=exclusive, reverse=reverse)
    for kind, exclusive, reverse in itertools.product(("sum", "prod"), (0, 1), (0, 1))
]


def by_torch(x, offsets, kind, exclusive, reverse):
    """Ray by ray, by torch.cumsum and torch.cumprod."""
    scan, nothing = (torch.cumsum, 0.0) if kind == "sum" else (torch.cumprod, 1.0)
    rays = []
    for begin, end in offsets.unfold(0, 2, 1).tolist():
        ray = x[begin:end].flip(0) if reverse else x[begin:end]
        if exclusive:
            ray = torch.cat([ray.new_full((1,), nothing), ray])[: end - begin]
        ray = scan(ray, 0)
        rays.append(ray.flip(0) if reverse else ray)
    return torch.cat(rays)


class TestPackedScan(PackedContract):
    op = rayfuse.packed_scan
    # samples of a ray on average, from none to several registers
    sizes = tuple({"P": P} for P in (0, 1, 2, 3, 8, 17, 33, 130))
    typical = {"P": 11}
    gpu_sizes = ({"P": 64}, {"P": 1000})
    gpu_spills = {
        f"packed_scan_bwd_kernel<{T}>": "8 to 24 bytes on sm_100 and sm_120, for a fourth block"
        for T in ("float", "__half", "__nv_bfloat16")
    }
    # products are harder
    variants = (
        {"kind": "prod"},
        {"kind": "prod", "exclusive": True, "reverse": True},
        {"kind": "sum", "reverse": True},
        {"kind": "sum", "exclusive": True},
    )

    @pytest.mark.parametrize("S", [1, 8, 17, 129, 3000])
    def test_every_scan_is_that_of_torch(self, forced_backend, device, S):
        x, offsets = self.inputs((3,), torch.float64, P=S)
        for choice in CHOICES:
            # so long a product neither vanishes nor grows
            values = x if choice["kind"] == "sum" else 1 + x / S
            values = values.detach().requires_grad_()
            want = by_torch(values, offsets, **choice)
            d_y = torch.linspace(-1, 2, len(x), dtype=torch.float64)
            (d_x,) = torch.autograd.grad(want, values, d_y)
            got, (ours,) = self.gradients([values.to(device), offsets.to(device)], [d_y.to(device)],
                                          {k: v if k == "kind" else bool(v)
                                           for k, v in choice.items()})  # fmt: skip
            torch.testing.assert_close(got[0].cpu(), want)
            torch.testing.assert_close(ours.cpu(), d_x)

    @pytest.mark.parametrize("zeros", [[], [3], [0], [8], [2, 3], [0, 4, 8]], ids=str)
    def test_products_have_exact_gradients_wherever_x_is_0(self, forced_backend, device, zeros):
        """Where others divide by x, and leave some of 1e-10 of the truth."""
        x = torch.tensor([2.0, -3.0, 0.5, 4.0, -1.0, 2.0, 0.25, -8.0, 1.5], dtype=torch.float64)
        x[zeros] = 0
        x, d_y = torch.cat([x, x]), torch.arange(1.0, 19, dtype=torch.float64)
        offsets = torch.tensor([0, 9, 9, 18])
        for exclusive, reverse in itertools.product((False, True), (False, True)):
            variant = dict(kind="prod", exclusive=exclusive, reverse=reverse)
            _, (d_x,) = self.gradients(
                [x.to(device), offsets.to(device)], [d_y.to(device)], variant
            )
            # one product after the other: the derivative to a factor is the product of the others
            want = torch.zeros_like(x)
            for begin, end in ((0, 9), (9, 18)):
                for i, j in itertools.product(range(begin, end), range(begin, end)):
                    factors = range(i, end) if reverse else range(begin, i + 1)
                    factors = [k for k in factors if not (exclusive and k == i)]
                    if j in factors:
                        want[j] += d_y[i] * x[[k for k in factors if k != j]].prod()
            assert torch.equal(d_x.cpu(), want)

    def test_a_million_samples_lose_no_more_than_torch_does(self, forced_backend, device):
        P = 20_000 if forced_backend in EMULATED else 1_000_000
        x = torch.rand(P, generator=torch.Generator().manual_seed(0))
        offsets = torch.tensor([0, P])
        for reverse in (False, True):
            exact = by_torch(x.double(), offsets, "sum", False, reverse)
            torch_ = by_torch(x, offsets, "sum", False, reverse)
            got, (d_x,) = self.gradients(
                [x.to(device), offsets.to(device)],
                [x.to(device)],
                {"kind": "sum", "reverse": reverse},
            )
            error, theirs = ((y.cpu().double() - exact).abs().max() for y in (got[0], torch_))
            # four roundings
            assert error <= theirs + exact.max() * 2**-21
            back = by_torch(x.double(), offsets, "sum", False, not reverse)
            assert (d_x.cpu().double() - back).abs().max() <= theirs + back.max() * 2**-21

    def test_conveniences_are_the_scan_of_their_name(self):
        x, offsets = self.inputs()
        ray_indices = torch.arange(7).repeat_interleave(offsets.diff())
        for kind, exclusive in itertools.product(("sum", "prod"), (False, True)):
            scan = getattr(rayfuse, f"{'exclusive' if exclusive else 'inclusive'}_{kind}")
            for reverse in (False, True):
                options = dict(exclusive=exclusive, reverse=reverse)
                want = rayfuse.packed_scan(x, offsets, kind=kind, **options)
                assert torch.equal(scan(x, offsets, reverse=reverse), want)
                named = dict(ray_indices=ray_indices, rays=7, reverse=reverse)
                assert torch.equal(scan(x, **named), want)
        with pytest.raises(TypeError, match="packed_scan: missing a required argument: 'offsets'"):
            rayfuse.inclusive_sum(x)

    @pytest.mark.skipif(simt.reason() is not None, reason=str(simt.reason()))
    @pytest.mark.parametrize("P", [32, 1000])
    @pytest.mark.parametrize("reverse", [False, True])
    def test_one_launch_moves_whole_sectors(self, P, reverse):
        """Of rays that begin at some: lanes that skip a store are counted as if out of step."""
        args = self.inputs((16,), P=P)
        args[-1][:-1] -= args[-1][:-1] % 16
        executor = simt.load()
        for kind, kernels in (("sum", 1), ("prod", 2)):
            executor.reset()
            with rayfuse.use_backend("simt"):
                self.gradients(args, None, {"kind": kind, "reverse": reverse})
            counters = executor.counters()
            executor.reset()
            # the backward of a sum is one the other way
            assert len(counters) == kernels
            for kernel, found in counters.items():
                assert found["launches"] == 2 // kernels
                assert found["sectors"] <= 1.1 * found["ideal_sectors"], kernel
