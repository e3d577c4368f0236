"""What only feature rendering knows: its definition, what weights select, memory, long rays."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rayfuse
from conftest import BACKENDS, device_of
from contract import LINUX, Contract, resident
from rayfuse import backend

# around the 16, 8, 4 and 2 lanes of the registers, where several samples share one, where a block
# takes several rays, and where channels pass in several blocks; samples in fours and not
FEATURE_SIZES = tuple(
    {"S": S, "C": C}
    for S, C in (
        *((0, 3), (5, 2), (3, 3), (1, 1), (2, 5), (9, 4), (17, 7), (6, 8), (7, 9), (33, 3)),
        *((5, 15), (4, 16), (3, 17), (48, 31), (1, 64), (5, 100), (6, 770)),
    )
)


class TestRenderFeatures(Contract):
    op = rayfuse.render_features
    sizes = FEATURE_SIZES
    typical = {"S": 5, "C": 7}
    gpu_sizes = ({"S": 48, "C": 768}, {"S": 48, "C": 64}, {"S": 100, "C": 3})

    def test_reference_is_the_sum_of_f3rm(self):
        w, f = self.inputs(dtype=torch.float64)
        # weights come as [..., S, 1] there
        want = torch.sum(w[..., None] * f, dim=-2)
        assert torch.equal(self.spec.reference(w, f), want)

    def test_one_weight_selects_its_sample(self, forced_backend, device):
        w, f = self.inputs(device=device, S=6, C=37)
        for s in range(6):
            one = torch.zeros_like(w)
            one[:, s] = 2
            assert torch.equal(self.call([one, f]), 2 * f[:, s])

    def test_equal_features_come_out_times_the_sum_of_the_weights(self, forced_backend, device):
        w, f = self.inputs(dtype=torch.float64, device=device, S=9, C=5)
        same = f[:, :1].expand_as(f)
        torch.testing.assert_close(self.call([w, same]), w.sum(-1, keepdim=True) * same[:, 0])

    @pytest.mark.parametrize("S", [5, 300])
    def test_sample_without_weight_is_read_all_the_same(self, forced_backend, device, S):
        """As in torch: 0 * inf is NaN, and an infinite feature is not hidden."""
        w, f = self.inputs((1,), device=device, S=S, C=3)
        w[0, 4], f[0, 4, 1], f[0, 2, 0] = 0, torch.inf, torch.inf
        w[0, 2] = 1
        features = self.call([w, f])[0]
        assert features[0] == torch.inf and features[1].isnan() and features[2].isfinite()

    @pytest.mark.parametrize(("S", "C"), [(5000, 3), (3000, 20), (2, 9000)])
    def test_long_rays_and_many_channels(self, forced_backend, device, S, C):
        self.assert_as_right_as_torch(self.inputs((2,), device=device, S=S, C=C), f"at {S}, {C}")

    @LINUX
    def test_no_temporary_of_the_size_of_the_features(self):
        w, f = self.inputs((1024,), dtype=torch.float32, S=32, C=256)
        f, megabytes = f.half().requires_grad_(), 16
        w.requires_grad_()

        def growth(call):
            call()
            Path("/proc/self/clear_refs").write_text("5")
            before = resident()
            call()
            return resident("VmHWM") - before

        assert growth(lambda: rayfuse.render_features(w, f)) < 4
        features = rayfuse.render_features(w, f)
        d_features = torch.ones_like(features)
        backward = growth(
            lambda: torch.autograd.grad(features, (w, f), d_features, retain_graph=True)
        )
        # d_f itself, as narrow as f
        assert backward < megabytes + 4

    @pytest.mark.parametrize("C", [256, 255])
    @pytest.mark.parametrize("isa", backend.isas())
    def test_large_gradient_is_that_of_its_parts(self, isa, C):
        """From 32 MB on it goes past the cache, to where one was before."""
        w, f = self.leaves(self.inputs((1100,), S=32, C=C))
        d_features = torch.rand(1100, C)

        def gradients(begin, end):
            features = rayfuse.render_features(w[begin:end], f[begin:end])
            return torch.autograd.grad(features, (w, f), d_features[begin:end])

        with rayfuse.use_backend(f"cpu.{isa}"):
            d_w, d_f = gradients(0, 1100)
            parts = [gradients(0, 500), gradients(500, 1100)]
            again = gradients(0, 1100)
        assert d_f.nbytes > 32 << 20
        assert torch.equal(d_w, parts[0][0] + parts[1][0])
        assert torch.equal(d_f, parts[0][1] + parts[1][1])
        assert torch.equal(d_f, again[1]) and d_f.data_ptr() != again[1].data_ptr()

    @LINUX
    def test_large_gradient_that_nobody_holds_makes_room_for_the_next(self):
        w, f = self.inputs((1100,), S=32, C=256)
        d_features, raw = torch.rand(1100, 256), self.spec.kernels.choose("cpu")

        def place():
            return raw.bwd(d_features, w, f, 2)[1].data_ptr()

        assert len({place() for _ in range(4)}) == 1
        before = resident()
        rayfuse.release_memory()
        assert before - resident() > 30

    @LINUX
    def test_system_may_take_large_memory_but_for_what_came_back_last(self):
        w, f = self.inputs((3000,), S=32, C=256)
        d_features, raw = torch.rand(3000, 256), self.spec.kernels.choose("cpu")
        for _ in range(3):  # what was marked and taken again is so once more
            held = [raw.bwd(d_features, w, f, 2)[1] for _ in range(4)]
            megabytes, before = held[0].nbytes / (1 << 20), resident("LazyFree", "smaps_rollup")
            assert 256 / 3 < megabytes < 256 / 2
            held.clear()
            free = resident("LazyFree", "smaps_rollup") - before
            assert 1.5 * megabytes < free < 2.5 * megabytes
        rayfuse.release_memory()

    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(0, 12),
        st.integers(1, 40),
        st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        st.integers(0, 1000),
    )
    def test_any_size_and_type_is_the_sum_of_its_definition(self, S, C, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(3, S, generator=generator)
        f = (100 * torch.randn(3, S, C, generator=generator)).to(dtype)
        terms = w[..., None].double() * f.double()
        for name in BACKENDS:
            if backend.reason(name) is None and device_of(name) == "cpu":
                with rayfuse.use_backend(name):
                    got = rayfuse.render_features(w, f).double()
                bound = 1e-6 * terms.abs().sum(-2) + 1e-30
                assert ((got - terms.sum(-2)).abs() <= bound).all(), name
