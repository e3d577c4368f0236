"""packed_distortion_loss beside what people use: nerfacc's prefix sums, and kernels fused by hand
in numba."""

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


def prefix_sums(t_starts: Tensor, t_ends: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Eq. 15 of mip-NeRF 360 in sums of w and w m from the left, the form of nerfacc.

    Its running sums along rays need a GPU: here they are of all rays, less what lies before each.
    """
    lengths = offsets.diff()
    ray = torch.repeat_interleave(lengths, output_size=len(w))
    first = offsets[ray]
    m = (t_starts + t_ends) / 2

    def before(x: Tensor) -> Tensor:
        total = torch.cat([x.new_zeros(1), x.cumsum(0)])
        return total[:-1] - total[first]

    each = 2 * w * (m * before(w) - before(w * m)) + w * w * (t_ends - t_starts) / 3
    return each.new_zeros(len(lengths)).index_add(0, ray, each)


@functools.cache
def numba_kernels() -> tuple[Callable, Callable]:
    """forward(t_starts, t_ends, w, offsets, loss), and the gradients; threads share the rays."""
    import numba

    f = np.float32
    jit = numba.njit(parallel=True, fastmath=True, error_model="numpy")

    @jit
    def forward(
        t_starts,  # [P]
        t_ends,  # [P]
        w,  # [P]
        offsets,  # [R+1]
        loss,  # [R]
    ):
        for r in numba.prange(len(loss)):
            left, spread, loss_r = f(0), f(0), f(0)
            for k in range(offsets[r], offsets[r + 1]):
                if k > offsets[r]:
                    gap = t_starts[k] - t_starts[k - 1] + t_ends[k] - t_ends[k - 1]
                    spread += gap * left
                left += w[k]
                loss_r += w[k] * (spread + w[k] * (t_ends[k] - t_starts[k]) / f(3))
            loss[r] = loss_r

    @jit
    def gradients(
        d_loss,  # float32, the same for all rays
        t_starts,  # [P]
        t_ends,  # [P]
        w,  # [P]
        offsets,  # [R+1]
        d_t_starts,  # [P] or empty
        d_t_ends,  # [P] or empty
        d_w,  # [P] or empty
    ):
        for r in numba.prange(len(offsets) - 1):
            first, last = offsets[r], offsets[r + 1]
            total = f(0)
            for k in range(first, last):
                total += w[k]
            left, spread, beyond = f(0), f(0), f(0)
            if d_w.size:
                for k in range(first, last):
                    if k > first:
                        gap = t_starts[k] - t_starts[k - 1] + t_ends[k] - t_ends[k - 1]
                        spread += gap * left
                    d_w[k] = spread + f(2 / 3) * w[k] * (t_ends[k] - t_starts[k])
                    left += w[k]
                right = f(0)
                for k in range(last - 1, first - 1, -1):
                    d_w[k] = d_loss * (d_w[k] + beyond)
                    right += w[k]
                    if k > first:
                        gap = t_starts[k] - t_starts[k - 1] + t_ends[k] - t_ends[k - 1]
                        beyond += gap * right
            if d_t_starts.size:
                left = f(0)
                for k in range(first, last):
                    balance = f(2) * left + w[k] - total
                    d_t_starts[k] = d_loss * w[k] * (balance - w[k] / f(3))
                    d_t_ends[k] = d_loss * w[k] * (balance + w[k] / f(3))
                    left += w[k]

    return forward, gradients


class NumbaFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        forward, _ = numba_kernels()
        loss = np.empty(len(inputs[-1]) - 1, np.float32)
        forward(*(x.detach().numpy() for x in inputs), loss)
        return torch.from_numpy(loss).mean()

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().numpy() for x in ctx.saved_tensors]
        needs = ctx.needs_input_grad
        found = [
            np.empty(x.size if need else 0, np.float32)
            for x, need in zip(inputs, needs, strict=True)
        ]
        _, gradients = numba_kernels()
        gradients(np.float32(d_mean.item() / (len(inputs[-1]) - 1)), *inputs, *found[:3])
        return tuple(
            torch.from_numpy(x) if need else None for x, need in zip(found, needs, strict=True)
        )


class BenchPackedDistortionLoss(harness.PackedBench):
    op = staticmethod(rayfuse.packed_distortion_loss)
    workloads = (
        # what instant-ngp aims at: 2^18 samples in all
        Workload((4096,), dict(P=64)),
        Workload((8192,), dict(P=32)),
        Workload((65536,), dict(P=48)),
        Workload((1_000_000,), dict(P=1)),
        Workload((65536,), dict(P=48), torch.bfloat16),
    )
    directions = ((), ("w",), ("t_starts", "t_ends", "w"))
    peers = (
        peers.eager("prefix sums", prefix_sums),
        peers.eager("reference", rayfuse.packed_distortion_loss.op.reference),
        peers.compiled("prefix sums", prefix_sums),
        peers.Peer(
            "numba op",
            lambda *inputs: lambda: NumbaFunction.apply(*map(peers.wide, inputs)),
            module="numba",
        ),
    )
    growth = ("P", (16, 64, 256, 1024), (4096,), ("eager prefix sums", "numba op"))
    page = "distortion"
