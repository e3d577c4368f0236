"""distortion_loss beside what people use: nerfstudio's formula, torch_efficient_distloss, and
kernels fused by hand in numba."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import harness
import peers
import rayfuse
import report
from harness import Workload

GIBIBYTE = 1 << 30


def all_pairs(t: Tensor, w: Tensor) -> Tensor:
    """Eq. 15 of mip-NeRF 360 as written, the form of nerfstudio and multinerf: O(S^2)."""
    m = (t[..., 1:] + t[..., :-1]) / 2
    pairs = (m[..., :, None] - m[..., None, :]).abs()
    inter = (w * (w[..., None, :] * pairs).sum(-1)).sum(-1)
    return inter + (w.square() * t.diff(dim=-1)).sum(-1) / 3


def too_big(leading: tuple[int, ...], sizes: dict[str, int], dtype: torch.dtype) -> str | None:
    """All pairs need S^2 values a ray, several times over."""
    gibibytes = 4 * leading[0] * sizes["S"] ** 2 / GIBIBYTE
    return f"{gibibytes:.1f} GiB for each temporary" if gibibytes > 1 else None


def efficient(name: str, gradients: tuple[str, ...]) -> peers.Peer:
    """torch_efficient_distloss takes midpoints and widths; its users have them at hand."""

    def loss(t: Tensor, w: Tensor) -> peers.Loss:
        import torch_efficient_distloss

        function = getattr(torch_efficient_distloss, name)

        def midpoints_and_widths() -> tuple[Tensor, Tensor]:
            edges = peers.wide(t)
            return (edges[..., 1:] + edges[..., :-1]) / 2, edges.diff(dim=-1)

        if t.requires_grad:
            return lambda: function(peers.wide(w), *midpoints_and_widths())
        ready = midpoints_and_widths()
        return lambda: function(peers.wide(w), *ready)

    return peers.Peer(name, loss, gradients, module="torch_efficient_distloss")


@functools.cache
def numba_kernels() -> tuple[Callable, Callable]:
    """forward(t, w, loss), and the gradients, with the loss beside them where it is wanted.

    Only the running sums are serial, two of them side by side, so that all other loops vectorise; a
    transposed block of rays, or four rays at once, came out 1.3 to 2 times slower.
    """
    import numba

    f = np.float32
    jit = numba.njit(parallel=True, fastmath=True, error_model="numpy")

    @jit
    def forward(
        t,  # [R, S+1]
        w,  # [R, S]
        loss,  # [R]
    ):
        R, S = w.shape
        threads = numba.get_num_threads()
        for thread in numba.prange(threads):
            spread = np.empty(S, np.float32)
            for r in range(thread * R // threads, (thread + 1) * R // threads):
                t_r, w_r = t[r], w[r]
                left = w_r[0]
                spread[0] = f(0)
                for k in range(1, S):
                    spread[k] = spread[k - 1] + (t_r[k + 1] - t_r[k - 1]) * left
                    left += w_r[k]
                loss_r = f(0)
                for k in range(S):
                    loss_r += w_r[k] * (spread[k] + w_r[k] * (t_r[k + 1] - t_r[k]) / f(3))
                loss[r] = loss_r

    @jit
    def gradients(
        d_loss,  # float32, the same for all rays
        t,  # [R, S+1]
        w,  # [R, S]
        loss,  # [R] or empty
        d_t,  # [R, S+1] or empty
        d_w,  # [R, S] or empty
    ):
        R, S = w.shape
        threads = numba.get_num_threads()
        for thread in numba.prange(threads):
            left, spread_left, spread_right = np.empty((3, S), np.float32)
            gap = np.zeros(S, np.float32)
            for r in range(thread * R // threads, (thread + 1) * R // threads):
                t_r, w_r = t[r], w[r]
                total = f(0)
                for k in range(S):
                    left[k] = total
                    total += w_r[k]
                for k in range(1, S):
                    gap[k] = t_r[k + 1] - t_r[k - 1]
                for k in range(S):
                    spread_left[k] = gap[k] * left[k]
                    spread_right[k] = gap[k] * (total - left[k])
                from_left, from_right = f(0), f(0)
                for k in range(S):
                    from_left += spread_left[k]
                    spread_left[k] = from_left
                    right = spread_right[S - 1 - k]
                    spread_right[S - 1 - k] = from_right
                    from_right += right
                if loss.size:
                    loss_r = f(0)
                    for k in range(S):
                        loss_r += w_r[k] * (spread_left[k] + w_r[k] * (t_r[k + 1] - t_r[k]) / f(3))
                    loss[r] = loss_r
                if d_w.size:
                    for k in range(S):
                        own = f(2 / 3) * w_r[k] * (t_r[k + 1] - t_r[k])
                        d_w[r, k] = d_loss * (spread_left[k] + spread_right[k] + own)
                if d_t.size:
                    first, last = w_r[0], w_r[S - 1]
                    d_t[r, 0] = d_loss * first * (first * f(2 / 3) - total)
                    for k in range(1, S):
                        pull = f(2) * left[k] - total + (w_r[k] - w_r[k - 1]) * f(2 / 3)
                        d_t[r, k] = d_loss * (w_r[k - 1] + w_r[k]) * pull
                    d_t[r, S] = d_loss * last * (total - last * f(2 / 3))

    return forward, gradients


def numba_gradients(
    d_loss: float, t: Tensor, w: Tensor, needs: Sequence[bool], with_loss: bool
) -> tuple[Tensor, ...]:
    """Loss per ray, d_t and d_w; empty where they are not needed."""
    _, gradients = numba_kernels()
    out = [
        np.empty(shape if need else (0,) * len(shape), np.float32)
        for need, shape in zip((with_loss, *needs), (w.shape[:1], t.shape, w.shape), strict=True)
    ]
    gradients(np.float32(d_loss), t.numpy(), w.numpy(), *out)
    return tuple(map(torch.from_numpy, out))


class NumbaFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(t, w)
        loss = np.empty(len(w), np.float32)
        forward, _ = numba_kernels()
        forward(t.detach().numpy(), w.detach().numpy(), loss)
        return torch.from_numpy(loss).mean()

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor) -> tuple[Tensor | None, ...]:
        t, w = (x.detach() for x in ctx.saved_tensors)
        _, *grads = numba_gradients(d_mean.item() / len(w), t, w, ctx.needs_input_grad, False)
        return tuple(
            grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=True)
        )


class NumbaOnePass(peers.Peer):
    """Loss and gradients in one pass over the inputs. No autograd op can do that: it learns the
    gradient of its loss only after the forward. The least that a loop of one's own could take."""

    def reason(self, workload: Workload, wants: Sequence[str]) -> str | None:
        return super().reason(workload, wants) if wants else "the same as numba"

    def prepare(
        self, inputs: dict[str, Tensor], wants: Sequence[str], d_outputs: None = None
    ) -> peers.Call:
        def call() -> tuple[Tensor, ...]:
            t, w = map(peers.wide, inputs.values())
            needs = [name in wants for name in inputs]
            loss, *grads = numba_gradients(1 / len(w), t, w, needs, True)
            return loss.mean(), *(
                grad.to(x.dtype)
                for grad, x, need in zip(grads, inputs.values(), needs, strict=True)
                if need
            )

        return call


class BenchDistortionLoss(harness.Bench):
    op = staticmethod(rayfuse.distortion_loss)
    workloads = (
        Workload((4096,), dict(S=48)),
        Workload((4096,), dict(S=256)),
        Workload((65536,), dict(S=48)),
        Workload((32768,), dict(S=128)),
        Workload((65536,), dict(S=48), torch.bfloat16),
    )
    directions = ((), ("w",), ("t", "w"))
    peers = (
        peers.eager("O(S²)", all_pairs, refuse=too_big),
        peers.eager("O(S)", rayfuse.distortion_loss.op.reference),
        peers.compiled("O(S²)", all_pairs),
        peers.compiled("O(S)", rayfuse.distortion_loss.op.reference),
        efficient("eff_distloss", ("w",)),
        efficient("eff_distloss_native", ("t", "w")),
        peers.Peer(
            "numba op",
            lambda t, w: lambda: NumbaFunction.apply(peers.wide(t), peers.wide(w)),
            module="numba",
        ),
        NumbaOnePass("numba one pass", None, module="numba"),
    )
    growth = (
        "S",
        (64, 256, 1024, 4096),
        (4096,),
        ("eager O(S²)", "eager O(S)", "numba op"),
    )
    page = "distortion"

    def test_error_far_away(self) -> None:
        """256 rays of 128 random samples in float32, against all pairs in float64."""
        generator = torch.Generator().manual_seed(0)
        places = torch.rand(256, 129, generator=generator, dtype=torch.float64).sort(-1).values
        w = torch.rand(256, 128, generator=generator)
        everybody = {peer.name: peer for peer in self.contenders()}
        for near, far in ((0, 1), (1000, 1000.01)):
            inputs = dict(t=(near + (far - near) * places).float(), w=w / w.sum(-1, keepdim=True))
            exact = {name: x.double() for name, x in inputs.items()}
            truth = everybody["eager O(S²)"].prepare(exact, ("w",))()
            for name in ("rayfuse", "eager O(S²)", "eff_distloss_native"):
                if everybody[name].reason(self.workloads[0], ("w",)):
                    continue
                results = everybody[name].prepare(inputs, ("w",))()
                errors = harness.relative_errors(results, truth)
                for what, error in zip(("loss", "d_w"), errors, strict=True):
                    column = f"{near} .. {far}, {what}"
                    table = "error with t far from 0"
                    report.add(report.Row(self.stem, table, column, name, error=error))
