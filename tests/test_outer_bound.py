"""What only the outer bound knows: its three rules outside, torch.searchsorted to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rayfuse
from conftest import BACKENDS, device_of
from contract import Contract
from rayfuse import backend


def as_nerfstudio(t, t_env, w_env):
    """The first or the last bin, restated from the definition."""
    last = w_env.shape[-1] - 1
    starts, ends = t_env[..., :-1].contiguous(), t_env[..., 1:].contiguous()
    below = torch.searchsorted(starts, t[..., :-1].contiguous(), side="right") - 1
    above = torch.searchsorted(ends, t[..., 1:].contiguous(), side="right")
    return between(below.clamp(0, last), above.clamp(0, last) + 1, w_env)


def as_multinerf(t, t_env, w_env):
    """The largest edge that is not beyond, and the smallest one that is: both the same outside."""
    beyond = t[..., None] < t_env[..., None, :]
    k = torch.arange(t_env.shape[-1]).expand(beyond.shape)
    below = torch.where(beyond, 0, k).amax(-1)
    above = torch.where(beyond, k, t_env.shape[-1] - 1).amin(-1)
    return between(below[..., :-1], above[..., 1:], w_env)


def as_nerfacc(t, t_env, w_env):
    """Edge 0 below; above the last bin."""
    E = w_env.shape[-1]
    until = torch.searchsorted(t_env, t, side="right")
    return between((until - 1).clamp(0, E - 1)[..., :-1], until.clamp(0, E)[..., 1:], w_env)


def between(below, above, w_env):
    """The weight of the bins from edge `below` to edge `above`."""
    k = torch.arange(w_env.shape[-1])
    inside = (k >= below[..., None]) & (k < above[..., None])
    return (inside * w_env[..., None, :]).sum(-1)


RULES = {"clamp": as_nerfstudio, "zero": as_multinerf, "below_zero": as_nerfacc}


class TestOuterBound(Contract):
    op = rayfuse.outer_bound
    # around the registers' lanes and the nodes of 16 edges, and triton's blocks of 128
    sizes = tuple(
        {"S": S, "E": E}
        for S, E in ((1, 1), (3, 5), (4, 9), (16, 16), (17, 33), (64, 15), (128, 31), (65, 130))
    )
    typical = {"S": 6, "E": 19}
    variants = ({}, {"outside": "zero"}, {"outside": "below_zero"})
    gpu_sizes = ({"S": 48, "E": 96}, {"S": 48, "E": 256}, {"S": 4096, "E": 4096})

    def test_bins_are_those_of_searchsorted_to_the_bit(self, forced_backend, device):
        """Weights 1, 2, 4, ... tell which bins were added up; edges coincide with each other."""
        generator = torch.Generator().manual_seed(0)
        for S, E in ((9, 20), (40, 17), (50, 33)):
            t = (torch.rand(40, S + 1, generator=generator) * 12).floor().sort(-1).values
            t_env = (torch.rand(40, E + 1, generator=generator) * 8 + 2).floor().sort(-1).values
            # neighbours in float32 are told apart
            t[20:] = torch.nextafter(t[20:], torch.tensor(torch.inf))
            w_env = 2.0 ** torch.arange(E, dtype=torch.float64).expand(40, E)
            args = [x.double().to(device) for x in (t, t_env, w_env)]
            for outside, rule in RULES.items():
                got = self.call(args, outside=outside).cpu()
                assert torch.equal(got, rule(t.double(), t_env.double(), w_env)), outside

    def test_three_rules_outside(self, forced_backend, device):
        t = torch.tensor([-2.0, -1.0, 0.5, 2.5, 3.0], dtype=torch.float64, device=device)
        t_env = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64, device=device)
        w_env = torch.tensor([1.0, 10.0], dtype=torch.float64, device=device)
        for outside, want in (
            ("clamp", [1, 1, 11, 10]),
            ("zero", [0, 1, 11, 0]),
            ("below_zero", [0, 1, 11, 10]),
        ):
            assert self.call([t, t_env, w_env], outside=outside).tolist() == want, outside

    def test_nan_edge_lies_beyond_all_others(self, forced_backend, device):
        t_env = torch.tensor([0.0, 1.0, 2.0], device=device)
        w_env = torch.tensor([1.0, 10.0], device=device)
        for bad in (torch.nan, torch.inf):
            t = torch.tensor([0.5, 0.75, bad], device=device)
            assert self.call([t, t_env, w_env]).tolist() == [1, 11]

    def test_no_bins_bound_everything_by_zero(self, forced_backend, device):
        args = [
            x.requires_grad_(i == 2) for i, x in enumerate(self.inputs(device=device, S=3, E=0))
        ]
        for outside in RULES:
            w_outer = self.call(args, outside=outside)
            assert torch.equal(w_outer, torch.zeros_like(w_outer))
            (d_w_env,) = torch.autograd.grad(w_outer.sum(), args[2])
            assert d_w_env.shape == (7, 0)

    def test_edges_get_no_gradient(self, forced_backend, device):
        t, t_env, w_env = (x.requires_grad_() for x in self.inputs(device=device))
        self.call([t, t_env, w_env]).sum().backward()
        assert t.grad is None and t_env.grad is None and w_env.grad is not None

    @pytest.mark.parametrize(
        "dtype, sizes",
        [(torch.float32, {"S": 200, "E": 3200}), (torch.float64, {"S": 2000, "E": 300})],
        ids=str,
    )
    def test_long_rays(self, forced_backend, device, dtype, sizes):
        self.assert_as_right_as_torch(self.inputs((2,), dtype, device, **sizes), f"at {sizes}")

    # no edge is worse than torch's own way with it: the result is that of searchsorted
    test_nan_comes_out_as_nan = None

    def test_nan_weight_reaches_the_samples_that_touch_it(self, forced_backend, device):
        t = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.0], device=device)
        t_env = torch.tensor([0.0, 1.0, 2.0, 3.0], device=device)
        w_env = torch.tensor([1.0, torch.nan, 1.0], device=device)
        assert self.call([t, t_env, w_env]).isnan()[:3].tolist() == [False, True, True]

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.floats(-2, 2, width=16), min_size=2, max_size=30),
        st.lists(st.floats(-1, 1, width=16), min_size=2, max_size=40),
        st.sampled_from(["clamp", "zero", "below_zero"]),
    )
    def test_whatever_is_sorted_comes_out_as_defined(self, edges, env_edges, outside):
        t, t_env = torch.tensor(sorted(edges)), torch.tensor(sorted(env_edges))
        w_env = torch.linspace(0, 1, len(t_env) - 1) ** 2
        want = RULES[outside](t, t_env, w_env.double())
        for name in BACKENDS:
            if backend.reason(name) is None and device_of(name) == "cpu" and name != "triton":
                with rayfuse.use_backend(name):
                    got = rayfuse.outer_bound(t, t_env, w_env, outside=outside).double()
                assert (got - want).abs().max() <= 1e-5, name

    @pytest.mark.parametrize("envelope_too", [False, True])
    def test_edges_that_decrease_come_out_as_searchsorted_has_them(self, envelope_too):
        """Nothing is promised, but nothing is read or written elsewhere, and nothing hangs; of an
        envelope out of order CUDA, which goes on from edge to edge, makes something else."""
        generator = torch.Generator().manual_seed(0)
        t = torch.rand(30, 12, generator=generator, dtype=torch.float64)
        t_env = torch.rand(30, 25, generator=generator, dtype=torch.float64)
        t[5, 4] = torch.nan
        if envelope_too:
            t_env[3, 7] = torch.nan
        else:
            t_env = t_env.sort(-1).values
        w_env = torch.rand(30, 24, generator=generator, dtype=torch.float64)
        with rayfuse.use_backend("ref"):
            want = self.gradients([t, t_env, w_env])
        for name in BACKENDS:
            if backend.reason(name) is None and device_of(name) == "cpu" and name != "triton":
                with rayfuse.use_backend(name):
                    got = self.gradients([t, t_env, w_env])
                for ours, right in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
                    if envelope_too and name == "simt":
                        assert ours.isfinite().all()
                    else:
                        torch.testing.assert_close(ours, right)
