"""What only the packed interlevel loss knows: the published search, the dense loss, gaps, closed
forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rayfuse
import simt
from conftest import BACKENDS, EMULATED, device_of
from contract import PackedContract
from rayfuse import backend

EPS = 1e-7


def as_nerfstudio(t_starts, t_ends, w, t_env_starts, t_env_ends, w_env):
    """The loss of one ray, restated: starts and ends are searched for among their own."""
    E = len(w_env)
    if E == 0:
        w_outer = torch.zeros_like(w)
    else:
        until = torch.cat([w_env.new_zeros(1), w_env.cumsum(0)])
        first = (torch.searchsorted(t_env_starts, t_starts, right=True) - 1).clamp(0, E - 1)
        last = torch.searchsorted(t_env_ends, t_ends, right=True).clamp(0, E - 1)
        w_outer = until[last + 1] - until[first]
    terms = (w - w_outer).clip(min=0) ** 2 / (w + EPS)
    return terms.sum() / max(len(w), 1)


def ray_by_ray(t_starts, t_ends, w, offsets, t_env_starts, t_env_ends, w_env, offsets_env):
    losses = []
    for r in range(len(offsets) - 1):
        own, bins = slice(*offsets[r : r + 2].tolist()), slice(*offsets_env[r : r + 2].tolist())
        samples = (x[own] for x in (t_starts, t_ends, w))
        losses.append(
            as_nerfstudio(*samples, *(x[bins] for x in (t_env_starts, t_env_ends, w_env)))
        )
    return torch.stack(losses)


class TestPackedInterlevelLoss(PackedContract):
    op = rayfuse.packed_interlevel_loss
    # samples and bins of a ray on average: around the registers' lanes and the nodes of 16 edges
    sizes = tuple({"P": P, "Q": Q} for P, Q in ((1, 1), (4, 9), (2, 0), (0, 3), (17, 33), (40, 15)))
    gpu_spills = {
        f"packed_interlevel_loss_fwd_kernel<{dtype}>": "48 bytes on sm_80, 24 on sm_100, 140 to 180"
        " on sm_120, for a fourth block: 0.38 instead of 0.43 ms on an H100"
        for dtype in ("float", "__half", "__nv_bfloat16")
    }
    typical = {"P": 9, "Q": 7}
    variants = ({}, {"outside": "zero"}, {"outside": "below_zero"}, {"eps": 1e-3})
    gpu_sizes = ({"P": 48, "Q": 96}, {"P": 1000, "Q": 1000})

    def test_values_are_those_of_the_published_search(self, forced_backend, device):
        for sizes in ({"P": 12, "Q": 4}, {"P": 5, "Q": 20}, {"P": 3, "Q": 1}):
            args = self.inputs((9,), torch.float64, **sizes)
            # so coarse that edges of both coincide
            for i in (0, 1, 4, 5):
                args[i] = (8 * args[i]).round() / 8
            want = ray_by_ray(*args)
            assert want.sum() > 0
            got = self.call([x.to(device) for x in args], reduction="none")
            torch.testing.assert_close(got.cpu(), want)

    @pytest.mark.parametrize("outside", ["clamp", "zero", "below_zero"])
    @pytest.mark.parametrize("S, E", [(1, 1), (9, 5), (16, 33), (40, 80)])
    def test_intervals_that_touch_are_the_dense_loss(self, forced_backend, device, S, E, outside):
        dense = rayfuse.interlevel_loss.op
        t, w, t_env, w_env = (x.to(device) for x in dense.sample((3,), torch.float64, S=S, E=E))
        # below, inside and behind the envelope
        t = t * 1.4 - 0.2
        d_loss = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, device=device)
        w.requires_grad_(), w_env.requires_grad_()
        count = torch.arange(4, device=device)
        packed = []
        for edges, weights, n in ((t, w, S), (t_env, w_env, E)):
            packed += [
                edges[:, :-1].flatten(),
                edges[:, 1:].flatten(),
                weights.flatten(),
                n * count,
            ]
        ours = self.call(packed, reduction="none", outside=outside)
        grads = torch.autograd.grad(ours, [w, w_env], d_loss)
        with rayfuse.use_backend("ref"):
            want = rayfuse.interlevel_loss(t, w, t_env, w_env, outside=outside, reduction="none")
            torch.testing.assert_close(ours, want)
            torch.testing.assert_close(grads, torch.autograd.grad(want, [w, w_env], d_loss))

    def test_what_is_kept_are_the_gradients_of_each_rays_loss(self, forced_backend, device):
        args = self.inputs(dtype=torch.float64, device=device, **self.sizes[4])
        ones = [torch.ones(self.leading, dtype=torch.float64, device=device)]
        for variant in self.variants:
            _, *kept = self.spec.run_fwd(*self.spec.raw_arguments(args, **variant))
            with rayfuse.use_backend("ref"):
                _, want = self.gradients(args, ones, variant)
            torch.testing.assert_close(tuple(kept), want)

    def test_what_is_in_no_ray_gets_zeros_and_changes_nothing(self, forced_backend, device):
        if forced_backend == "ref" or forced_backend.startswith("cpu"):
            pytest.skip("offsets are looked at there, and must leave nothing out")
        args = self.inputs(device=device)
        own, inner = list(args), list(args)
        stray = []
        for first in (0, 4):
            starts, ends, w, offsets = args[first : first + 4]
            mine = slice(3, len(w) - 4)
            args[first + 3] = offsets = offsets.clamp(mine.start, mine.stop)
            own[first : first + 4] = *(x[mine] for x in (starts, ends, w)), offsets - mine.start
            inner[first + 2] = mine
            stray.append(torch.ones(len(w), dtype=torch.bool, device=device))
            stray[-1][mine] = False
        losses, grads = self.gradients(args)
        right, want = self.gradients(own)
        torch.testing.assert_close(losses, right)
        kept = self.kept(self.spec.raw_arguments(args))
        for at, some, d_x, d_own, slope in zip((2, 6), stray, grads, want, kept, strict=True):
            torch.testing.assert_close(d_x[inner[at]], d_own)
            assert not d_x[some].any() and not slope[some].any()

    def one_ray(self, device, *values):
        """Starts, ends and weights of samples, then of bins."""
        values = [torch.tensor(x, dtype=torch.float64, device=device) for x in values]
        offsets, offsets_env = (torch.tensor([0, len(values[i])], device=device) for i in (2, 5))
        return [*values[:3], offsets, *values[3:], offsets_env]

    def test_sample_in_a_gap_gets_the_bins_around_it(self, forced_backend, device):
        # bins 0..1 and 2..3: of the samples the first has bin 0, the second both, the last bin 1
        args = self.one_ray(
            device, [0.2, 1.2, 2.5], [0.8, 1.8, 2.6], [0.5, 0.5, 0.5], [0, 2], [1, 3], [0.1, 0.2]
        )
        args[6].requires_grad_()
        loss = self.call(args)
        want = (0.4**2 + 0.2**2 + 0.3**2) / (0.5 + EPS) / 3
        torch.testing.assert_close(loss.item(), want)
        (d_w_env,) = torch.autograd.grad(loss, args[6])
        slope = -2 / (0.5 + EPS) / 3
        want = [slope * (0.4 + 0.2), slope * (0.2 + 0.3)]
        torch.testing.assert_close(d_w_env.tolist(), want)

    def test_edges_that_coincide_reach_the_next_bin(self, forced_backend, device):
        """An end at the end of a bin also gets the next one, as torch.searchsorted has it."""
        bins = [0.0, 1.0, 2.0], [1.0, 2.0, 3.0], [0.25, 0.125, 0.5]
        for start, end, bound in ((0, 0.5, 0.25), (0, 1, 0.375), (1, 1.5, 0.125), (1, 2, 0.625)):
            args = self.one_ray(device, [start], [end], [1.0], *bins)
            torch.testing.assert_close(self.call(args).item(), (1 - bound) ** 2 / (1 + EPS))

    def test_a_ray_without_bins_is_bounded_by_nothing(self, forced_backend, device):
        w = torch.tensor([0.25, 0.5, 1.0, 0.125], dtype=torch.float64, device=device)
        w.requires_grad_()
        t = torch.arange(4.0, dtype=torch.float64, device=device)
        offsets = torch.tensor([0, 2, 3, 4], device=device)
        bins = torch.tensor([0.0], dtype=torch.float64, device=device)
        offsets_env = torch.tensor([0, 0, 1, 1], device=device)
        args = [t, t + 0.5, w, offsets, bins, bins + 9, bins + 4, offsets_env]
        losses = self.call(args, reduction="none")
        want = w * w / (w + EPS)
        torch.testing.assert_close(losses, torch.stack([want[:2].mean(), 0 * w[2], want[3]]))
        (d_w,) = torch.autograd.grad(losses.sum(), w)
        assert d_w[2] == 0 and (d_w[[0, 1, 3]] > 0).all()

    def test_weights_around_minus_eps_are_no_nan(self, forced_backend, device):
        t = [0.0, 1.0, 2.0, 3.0]
        ends = [1.0, 2.0, 3.0, 4.0]
        args = self.one_ray(device, t, ends, [-1e-7, 0.0, -2e-7, 1e-7], t, ends, [0.0] * 4)
        args[2].requires_grad_(), args[6].requires_grad_()
        loss = self.call(args)
        torch.testing.assert_close(loss.item(), 1.25e-8)
        d_w, d_w_env = torch.autograd.grad(loss, [args[2], args[6]])
        assert d_w.isfinite().all() and d_w_env.isfinite().all()
        assert d_w[:3].tolist() == [0, 0, 0]

    @pytest.mark.parametrize("P, Q", [(3000, 200), (200, 3000)])
    def test_long_rays(self, forced_backend, device, P, Q):
        if forced_backend in EMULATED:
            P, Q = P // 2, Q // 2
        self.assert_as_right_as_torch(self.inputs((3,), device=device, P=P, Q=Q))

    def test_one_sample_over_many_bins_and_one_bin_under_many_samples(self, forced_backend, device):
        many = 2_000 if forced_backend in EMULATED else 20_000
        t = torch.arange(many, dtype=torch.float32) / many
        small = torch.rand(many, generator=torch.Generator().manual_seed(0))
        one = torch.zeros(1), torch.ones(1)
        offsets, offsets_env = torch.tensor([0, 1, many + 1]), torch.tensor([0, many, many + 1])
        args = [
            *(torch.cat([x, y]) for x, y in ((one[0], t), (one[1], t + 1 / many))),
            torch.cat([many * one[1], small]),
            offsets,
            *(torch.cat([x, y]) for x, y in ((t, one[0]), (t + 1 / many, one[1]))),
            torch.cat([small, 0.1 * one[1]]),
            offsets_env,
        ]
        self.assert_as_right_as_torch([x.to(device) for x in args])

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(
            st.tuples(*[st.lists(st.tuples(st.integers(0, 6), st.floats(0, 1, width=32)))] * 2),
            min_size=1,
            max_size=4,
        ),
        st.sampled_from(["clamp", "zero", "below_zero"]),
    )
    def test_indices_are_the_same_to_the_bit(self, rays, outside):
        """Coincident edges, intervals without width, gaps, rays without anything included."""
        columns = []
        for part in range(2):
            edges = [sorted(t for t, _ in ray[part]) for ray in rays]
            columns += [
                torch.tensor([float(t) for ray in edges for t in ray]),
                torch.tensor([float(t) for ray in edges for t in [*ray[1:], *ray[-1:]]]),
                torch.tensor([w for ray in rays for _, w in ray[part]]),
                torch.tensor([0, *(len(ray[part]) for ray in rays)]).cumsum(0),
            ]
        variant = {"outside": outside}
        d_loss = [torch.ones(len(rays))]
        with rayfuse.use_backend("ref"):
            wide = [x.double() if x.is_floating_point() else x for x in columns]
            want = self.gradients(wide, [d_loss[0].double()], variant)
        for name in BACKENDS:
            if backend.reason(name) is None and device_of(name) == "cpu":
                with rayfuse.use_backend(name):
                    got = self.gradients(columns, d_loss, variant)
                for ours, right in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
                    torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-6)

    @pytest.mark.skipif(simt.reason() is not None, reason=str(simt.reason()))
    def test_one_launch_each_way(self):
        executor = simt.load()
        executor.reset()
        with rayfuse.use_backend("simt"):
            self.gradients(self.inputs((16,), P=30, Q=40))
        counters = executor.counters()
        executor.reset()
        assert len(counters) == 2
        assert all(found["launches"] == 1 for found in counters.values())

    def test_options_are_checked(self):
        args = self.inputs()
        with pytest.raises(ValueError, match="outside must be 'clamp', 'zero' or 'below_zero'"):
            self.call(args, outside="ignore")
        with pytest.raises(ValueError, match="eps must be finite and > 0, got 0"):
            self.call(args, eps=0.0)
