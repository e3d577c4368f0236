"""Histograms along packed rays, and nerfacc's search in one, for the tests of lookups in them."""

import torch

import rayfuse
from rayfuse.domain import csr_env


def histograms(R, Q, dtype=torch.float32, seed=0):
    """Edges and a cdf of ragged rays, with coincident edges and flat bins; offsets."""
    u = torch.rand(3, Q + R + 1, generator=torch.Generator().manual_seed(seed))
    offsets = csr_env.from_uniform(u[0, : R + 1], Q)
    edges, cdf = torch.empty(Q), torch.empty(Q)
    for begin, end in offsets.unfold(0, 2, 1).tolist():
        for values, steps in ((edges, u[1]), (cdf, u[2])):
            values[begin:end] = ((steps[begin:end] - 0.4).clamp(min=0)).cumsum(0) + steps[begin]
    return edges.to(dtype), cdf.to(dtype), offsets


def spoiled(values, offsets, bad):
    """Some of three rays, of which the longest is one, replaced or out of order."""
    values, rays = values.clone(), offsets.diff().argsort(descending=True)[:3].tolist()
    for r in rays:
        begin, end = offsets[r : r + 2].tolist()
        middle = (begin + end) // 2
        values[middle] = bad
        values[end - 1] = values[begin]
    return values, rays


def sides(values, base, last, x):
    """As nerfacc's CUDA kernels find them, thread by thread."""
    begin, end = base, last
    while begin < end:
        middle = begin + (end - begin) // 2
        if not values[middle] > x:
            begin = middle + 1
        else:
            end = middle
    return max(min(begin - 1, last), base), max(min(begin, last), base)


def by_reference(call):
    with rayfuse.use_backend("ref"):
        return call()


def assert_runs_on(backend):
    """Triton has no lookups: PyTorch stands for it."""
    assert rayfuse.last_backend() == ("ref" if backend == "triton" else backend)


def on_threads(call):
    """Results of a call on one thread, two and three."""
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            yield call()
    finally:
        torch.set_num_threads(threads)
