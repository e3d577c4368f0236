"""torch_efficient_distloss's functions: the same values, and gradients that it leaves out."""

import pytest
import torch

from rayfuse.compat import torch_efficient_distloss as ours


def pairwise(w, m, interval):
    """The definition of one ray's loss, O(N^2)."""
    inter = (w[..., :, None] * w[..., None, :] * (m[..., :, None] - m[..., None, :]).abs()).sum()
    return inter + (w * w * interval).sum() / 3


def inputs(shape=(5, 12), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    m, w, interval = torch.rand(3, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return [w / shape[-1], m.sort(-1).values, interval / shape[-1]]


def with_gradients(function, *args):
    args = [x.detach().clone().requires_grad_() if torch.is_tensor(x) else x for x in args]
    loss = function(*args)
    leaves = [x for x in args if torch.is_tensor(x)]
    return loss.detach(), torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("name", ["eff_distloss", "eff_distloss_native"])
@pytest.mark.parametrize("of_number", [False, True])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 7), (4, 1)], ids=str)
def test_values_and_gradients_are_those_of_the_package(name, of_number, shape):
    theirs = pytest.importorskip("torch_efficient_distloss")
    w, m, interval = inputs(shape)
    interval = 0.1 if of_number else interval
    functions = getattr(ours, name), getattr(theirs, name)
    of_w = [with_gradients(lambda w, f=f: f(w, m, interval), w) for f in functions]
    torch.testing.assert_close(*of_w)
    native = with_gradients(theirs.eff_distloss_native, w, m, interval)
    torch.testing.assert_close(with_gradients(getattr(ours, name), w, m, interval), native)


def test_value_is_the_definition_and_its_gradients_pass_gradcheck():
    w, m, interval = inputs()
    each = torch.stack([pairwise(*ray) for ray in zip(w, m, interval, strict=True)])
    torch.testing.assert_close(ours.eff_distloss(w, m, interval), each.mean())
    args = [x[:2, :5].clone().requires_grad_() for x in (w, m, interval)]
    assert torch.autograd.gradcheck(ours.eff_distloss, args)


def test_rays_may_share_their_midpoints_and_widths():
    w, m, interval = inputs()
    shared = ours.eff_distloss(w, m[0], interval[0])
    torch.testing.assert_close(
        shared, ours.eff_distloss(w, m[0].expand_as(w), interval[0].expand_as(w))
    )


def test_dtypes_mix_as_in_arithmetic():
    w, m, interval = inputs(dtype=torch.float32)
    want = ours.eff_distloss(w.half().float(), m, interval)
    torch.testing.assert_close(ours.eff_distloss(w.half(), m, interval), want)
    assert ours.eff_distloss(w, m.double(), 0.1).dtype == torch.float64


def test_rays_that_lie_end_to_end_are_divided_by_the_last_id_and_one():
    (w,), (m,), (interval,) = inputs((1, 10))
    # rays 0, 3 and 4 have samples
    ray_id = torch.tensor([0, 0, 0, 3, 3, 3, 3, 3, 4, 4])
    m = torch.cat([m[:3], m[3:8] - 1, m[8:]])
    parts = [slice(0, 3), slice(3, 8), slice(8, 10)]

    def defined(w, m, interval):
        return sum(pairwise(w[p], m[p], interval[p]) for p in parts) / 5

    got = with_gradients(lambda *args: ours.flatten_eff_distloss(*args, ray_id), w, m, interval)
    torch.testing.assert_close(got, with_gradients(defined, w, m, interval))
    of_number = ours.flatten_eff_distloss(w, m, 0.25, ray_id)
    torch.testing.assert_close(of_number, defined(w, m, torch.full_like(w, 0.25)))


def test_flattened_is_dense_where_all_rays_are_as_long():
    w, m, interval = inputs()
    ray_id = torch.arange(5).repeat_interleave(12)
    flat = ours.flatten_eff_distloss(w.flatten(), m.flatten(), interval.flatten(), ray_id)
    torch.testing.assert_close(flat, ours.eff_distloss(w, m, interval))


def test_no_samples_cost_nothing():
    w = torch.zeros(0, requires_grad=True)
    loss = ours.flatten_eff_distloss(w, torch.zeros(0), 0.1, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert w.grad.shape == (0,)
