"""composite_rays beside what people use: nerfstudio's renderers in PyTorch, and kernels fused by
hand in numba."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import harness
import peers
import rayfuse
from harness import Workload


def renderers(t: Tensor, w: Tensor, f: Tensor, background: Tensor) -> tuple[Tensor, ...]:
    """`RGBRenderer`, `DepthRenderer` with each ray's own limits, and `AccumulationRenderer`."""
    accumulation = w.sum(-1)
    features = (w[..., None] * f).sum(-2) + background * (1 - accumulation)[..., None]
    steps = (t[..., 1:] + t[..., :-1]) / 2
    depth = (w * steps).sum(-1) / (accumulation + 1e-10)
    return features, torch.clip(depth, steps[..., 0], steps[..., -1]), accumulation


def from_densities(t: Tensor, sigma: Tensor, f: Tensor, background: Tensor) -> tuple[Tensor, ...]:
    """The same, with `RaySamples.get_weights` before."""
    x = sigma * t.diff(dim=-1)
    before = torch.cat([x.new_zeros((*x.shape[:-1], 1)), x[..., :-1].cumsum(-1)], -1)
    w = torch.nan_to_num((1 - torch.exp(-x)) * torch.exp(-before))
    return renderers(t, w, f, background)


@functools.cache
def numba_kernels() -> tuple[Callable, Callable]:
    """Densities to features, depth and accumulation, and their gradients to densities and features.

    Only the running sums are serial, so that all other loops vectorise.
    """
    import numba

    f32 = np.float32
    jit = numba.njit(parallel=True, fastmath=True, error_model="numpy")

    @numba.njit(fastmath=True, error_model="numpy", inline="always")
    def weigh(t, sigma, before, w):
        S = len(w)
        total = f32(0)
        for k in range(S):
            before[k] = total
            total += sigma[k] * (t[k + 1] - t[k])
        accumulation = moment = f32(0)
        for k in range(S):
            w[k] = np.exp(-before[k]) * (f32(1) - np.exp(-sigma[k] * (t[k + 1] - t[k])))
            accumulation += w[k]
            moment += w[k] * (t[k] + t[k + 1]) * f32(0.5)
        return accumulation, moment / (accumulation + f32(1e-10))

    @jit
    def forward(t, sigma, f, background, features, depth, accumulation):
        R, S, C = f.shape
        threads = numba.get_num_threads()
        for thread in numba.prange(threads):
            before, w = np.empty((2, S), np.float32)
            for r in range(thread * R // threads, (thread + 1) * R // threads):
                total, mean = weigh(t[r], sigma[r], before, w)
                accumulation[r] = total
                first, last = t[r, 0] + t[r, 1], t[r, S - 1] + t[r, S]
                depth[r] = min(max(mean, f32(0.5) * first), f32(0.5) * last)
                for c in range(C):
                    features[r, c] = (f32(1) - total) * background[r, c]
                for k in range(S):
                    for c in range(C):
                        features[r, c] += w[k] * f[r, k, c]

    @jit
    def gradients(
        d_features, d_depth, d_accumulation, t, sigma, f, background, d_sigma, d_f, d_background
    ):
        R, S, C = f.shape
        threads = numba.get_num_threads()
        for thread in numba.prange(threads):
            before, w, g = np.empty((3, S), np.float32)
            for r in range(thread * R // threads, (thread + 1) * R // threads):
                total, mean = weigh(t[r], sigma[r], before, w)
                first, last = t[r, 0] + t[r, 1], t[r, S - 1] + t[r, S]
                inside = first <= f32(2) * mean <= last
                slope = d_depth[r] / (total + f32(1e-10)) if inside else f32(0)
                common = d_accumulation[r] - slope * mean
                for c in range(C):
                    common -= d_features[r, c] * background[r, c]
                    d_background[r, c] = (f32(1) - total) * d_features[r, c]
                for k in range(S):
                    g[k] = common + slope * f32(0.5) * (t[r, k] + t[r, k + 1])
                    for c in range(C):
                        g[k] += d_features[r, c] * f[r, k, c]
                        d_f[r, k, c] = w[k] * d_features[r, c]
                later = f32(0)
                for i in range(S):
                    k = S - 1 - i
                    width = t[r, k + 1] - t[r, k]
                    passed = np.exp(-before[k] - sigma[r, k] * width)
                    d_sigma[r, k] = (g[k] * passed - later) * width
                    later += g[k] * w[k]

    return forward, gradients


class NumbaFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        R, C = inputs[3].shape
        out = [np.empty(shape, np.float32) for shape in ((R, C), (R,), (R,))]
        numba_kernels()[0](*(x.detach().numpy() for x in inputs), *out)
        return tuple(map(torch.from_numpy, out))

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().numpy() for x in ctx.saved_tensors]
        grads = [np.empty_like(x) for x in inputs[1:]]
        numba_kernels()[1](*(x.numpy() for x in d_outputs), *inputs, *grads)
        needs = ctx.needs_input_grad[1:]
        return None, *(
            torch.from_numpy(grad) if need else None
            for grad, need in zip(grads, needs, strict=True)
        )


class BenchCompositeRays(harness.Bench):
    """Densities to colour, depth and accumulation."""

    op = staticmethod(rayfuse.composite_rays)
    options = dict(density=True)
    title = "from densities,"
    workloads = (
        Workload((4096,), dict(S=48, C=3)),
        Workload((4096,), dict(S=256, C=3)),
        Workload((65536,), dict(S=48, C=3)),
        Workload((65536,), dict(S=48, C=3), narrow=torch.float16),
        Workload((4096,), dict(S=48, C=16)),
    )
    directions = ((), ("w", "f"))
    peers = (
        peers.eager("", from_densities, mean=False),
        peers.compiled("", from_densities, mean=False),
        peers.Peer(
            "numba op",
            lambda *inputs: lambda: NumbaFunction.apply(*map(peers.wide, inputs)),
            ("w", "f", "background"),
            module="numba",
        ),
    )
    growth = ("S", (64, 256, 1024, 4096), (4096,), ("eager", "compile", "numba op"))
    goal = 1.1
    page = "compositing"


class BenchCompositeRaysFromWeights(BenchCompositeRays):
    """Weights to colour, depth and accumulation."""

    options = dict(density=False)
    title = "from weights,"
    peers = (
        peers.eager("", renderers, mean=False),
        peers.compiled("", renderers, mean=False),
    )
    growth = ("S", (64, 256, 1024, 4096), (4096,), ("eager", "compile"))
