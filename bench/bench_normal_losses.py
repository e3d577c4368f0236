"""normal_losses beside what people use: the two losses as nerfstudio writes them, eager and
compiled, and a loop fused by hand in numba."""

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


def two_losses(w: Tensor, n: Tensor, n_pred: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """One after the other, as models of nerfstudio call them."""
    towards = (n * -d[..., None, :]).sum(-1)
    orientation = (w * torch.fmin(torch.zeros_like(towards), towards) ** 2).sum(-1)
    return orientation, (w * (1 - (n * n_pred).sum(-1))).sum(-1)


@functools.cache
def numba_kernels() -> tuple[Callable, Callable]:
    import numba

    f = np.float32
    jit = numba.njit(parallel=True, fastmath=True, error_model="numpy")

    @jit
    def forward(
        w,  # [R, S]
        n,  # [R, S, 3]
        p,  # [R, S, 3]
        d,  # [R, 3]
        losses,  # [2, R]
    ):
        R, S = w.shape
        for r in numba.prange(R):
            x, y, z = d[r, 0], d[r, 1], d[r, 2]
            orientation, predicted = f(0), f(0)
            for i in range(S):
                a, b, c = n[r, i, 0], n[r, i, 1], n[r, i, 2]
                away = max(f(0), a * x + b * y + c * z)
                orientation += w[r, i] * away * away
                predicted += w[r, i] * (f(1) - (a * p[r, i, 0] + b * p[r, i, 1] + c * p[r, i, 2]))
            losses[0, r], losses[1, r] = orientation, predicted

    @jit
    def backward(
        g_o,  # float32, the same for all rays
        g_p,  # float32, likewise
        w,  # [R, S]
        n,  # [R, S, 3]
        p,  # [R, S, 3]
        d,  # [R, 3]
        d_w,  # [R, S]
        d_n,  # [R, S, 3]
        d_p,  # [R, S, 3]
    ):
        R, S = w.shape
        for r in numba.prange(R):
            x, y, z = d[r, 0], d[r, 1], d[r, 2]
            for i in range(S):
                a, b, c = n[r, i, 0], n[r, i, 1], n[r, i, 2]
                away = max(f(0), a * x + b * y + c * z)
                apart = f(1) - (a * p[r, i, 0] + b * p[r, i, 1] + c * p[r, i, 2])
                d_w[r, i] = g_o * away * away + g_p * apart
                turn, pull = f(2) * g_o * w[r, i] * away, -g_p * w[r, i]
                d_n[r, i, 0] = turn * x + pull * p[r, i, 0]
                d_n[r, i, 1] = turn * y + pull * p[r, i, 1]
                d_n[r, i, 2] = turn * z + pull * p[r, i, 2]
                d_p[r, i, 0], d_p[r, i, 1], d_p[r, i, 2] = pull * a, pull * b, pull * c

    return forward, backward


class NumbaFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        losses = np.empty((2, len(inputs[0])), np.float32)
        numba_kernels()[0](*(x.detach().numpy() for x in inputs), losses)
        orientation, predicted = torch.from_numpy(losses).mean(1)
        return orientation, predicted

    @staticmethod
    def backward(ctx: Any, *d_means: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach() for x in ctx.saved_tensors]
        grads = [torch.empty_like(x) for x in inputs[:3]]
        scales = [np.float32(d_mean.item() / len(inputs[0])) for d_mean in d_means]
        numba_kernels()[1](*scales, *(x.numpy() for x in (*inputs, *grads)))
        return *grads, None


class BenchNormalLosses(harness.Bench):
    op = staticmethod(rayfuse.normal_losses)
    workloads = (
        Workload((4096,), dict(S=48)),
        Workload((65536,), dict(S=48)),
        Workload((32768,), dict(S=128)),
        Workload((65536,), dict(S=48), torch.bfloat16),
    )
    directions = ((), ("w", "n", "n_pred"), ("w", "n", "n_pred", "d"))
    peers = (
        peers.eager("", two_losses),
        peers.compiled("", two_losses),
        peers.Peer(
            "numba op",
            lambda *inputs: lambda: NumbaFunction.apply(*map(peers.wide, inputs)),
            gradients=("w", "n", "n_pred"),
            module="numba",
        ),
    )
    growth = ("S", (64, 256, 1024, 4096), (1024,), ("eager", "numba op"))
    bound, goal = 1.5, 1.0
    page = "normals"
