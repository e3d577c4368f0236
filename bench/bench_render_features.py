"""render_features beside what people use: the product and sum of f3rm, a batched matrix product,
and kernels fused by hand in numba."""

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

FEATURE_WORKLOADS = (
    Workload((4096,), dict(S=48, C=64)),
    Workload((4096,), dict(S=48, C=768)),
    Workload((4096,), dict(S=48, C=768), narrow=torch.float16),
    Workload((4096,), dict(S=48, C=3)),
    Workload((4096,), dict(S=48, C=77)),
)


def product_and_sum(w: Tensor, f: Tensor) -> Tensor:
    """As f3rm and nerfstudio's SemanticRenderer have it: the product is stored."""
    return torch.sum(w[..., None] * f, dim=-2)


def matrix_product(w: Tensor, f: Tensor) -> Tensor:
    """A row by a matrix for each ray, which no product of the size of f precedes."""
    return torch.einsum("rs,rsc->rc", w, f)


@functools.cache
def numba_kernels() -> tuple[Callable, Callable]:
    """forward(w, f, features) and the gradients (d_features, w, f, d_w, d_f)."""
    import numba

    jit = numba.njit(parallel=True, fastmath=True, error_model="numpy")

    @jit
    def forward(
        w,  # [R, S]
        f,  # [R, S, C]
        features,  # [R, C]
    ):
        R, S, C = f.shape
        for r in numba.prange(R):
            for c in range(C):
                features[r, c] = 0
            for s in range(S):
                w_s = w[r, s]
                for c in range(C):
                    features[r, c] += w_s * f[r, s, c]

    @jit
    def gradients(
        d_features,  # [R, C]
        w,  # [R, S]
        f,  # [R, S, C]
        d_w,  # [R, S]
        d_f,  # [R, S, C]
    ):
        R, S, C = f.shape
        for r in numba.prange(R):
            for s in range(S):
                w_s, dot = w[r, s], np.float32(0)
                for c in range(C):
                    dot += d_features[r, c] * f[r, s, c]
                    d_f[r, s, c] = w_s * d_features[r, c]
                d_w[r, s] = dot

    return forward, gradients


class NumbaFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, f: Tensor) -> Tensor:
        ctx.save_for_backward(w, f)
        features = np.empty((f.shape[0], f.shape[2]), np.float32)
        numba_kernels()[0](w.detach().numpy(), f.detach().numpy(), features)
        return torch.from_numpy(features)

    @staticmethod
    def backward(ctx: Any, d_features: Tensor) -> tuple[Tensor, ...]:
        w, f = (x.detach().numpy() for x in ctx.saved_tensors)
        d_w, d_f = np.empty_like(w), np.empty_like(f)
        numba_kernels()[1](d_features.numpy(), w, f, d_w, d_f)
        return torch.from_numpy(d_w), torch.from_numpy(d_f)


class BenchRenderFeatures(harness.Bench):
    op = staticmethod(rayfuse.render_features)
    workloads = FEATURE_WORKLOADS
    gpu_times = 4
    directions = ((), ("w", "f"))
    peers = (
        peers.eager("f3rm", product_and_sum, mean=False),
        peers.eager("einsum", matrix_product, mean=False),
        peers.compiled("f3rm", product_and_sum, mean=False),
        peers.Peer(
            "numba op",
            lambda w, f: lambda: NumbaFunction.apply(w, peers.wide(f)),
            module="numba",
        ),
    )
    growth = ("C", (3, 16, 64, 256), (4096,), ("eager f3rm", "eager einsum", "compile f3rm"))
    bound, goal = 1.6, 1.15
    page = "features"
