"""composite_tiles beside a scalar loop in C++ and one in numba, as multiples of the time that
torch.exp takes for as many values as there are pairs of a pixel and a splat in its tile's list.

RAYFUSE_GARDEN=test_garden.npz, of gsplat's assets, adds the points of a real garden.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gsplat_step
import harness
import peers
import rayfuse
import report
from harness import Turns, Workload

TILE = 16
# so many that all threads take part, and few enough for the second-level cache
EXP_VALUES, GPU_EXP_VALUES = 1 << 16, 1 << 22
EXP = "torch.exp of all pairs"
NAMES = ("means2d", "conics", "colors", "opacities", "tile_offsets", "flatten_ids")
GARDEN = os.environ.get("RAYFUSE_GARDEN")


def scene(width: int, height: int, per_tile: int, sigma: float, D: int) -> dict[str, Tensor]:
    """Random splats, about `per_tile` of them in a list, `sigma` pixels wide in the median; lists
    by bounding boxes of 3 sigma, in the order of the splats."""
    generator = torch.Generator().manual_seed(0)
    X, Y = -(-width // TILE), -(-height // TILE)
    P = int(per_tile * X * Y / (6 * sigma / TILE + 1) ** 2)
    means2d = torch.rand(P, 2, generator=generator) * torch.tensor([width, height])
    s = sigma * torch.exp(0.3 * torch.randn(P, 2, generator=generator))
    angle = math.pi * torch.rand(P, generator=generator)
    cos, sin, (u, v) = angle.cos(), angle.sin(), (1 / s**2).unbind(1)
    conics = [cos**2 * u + sin**2 * v, cos * sin * (u - v), sin**2 * u + cos**2 * v]
    u, v = (s**2).unbind(1)
    sigmas = torch.stack([cos**2 * u + sin**2 * v, sin**2 * u + cos**2 * v], 1).sqrt()
    lists = rayfuse.intersect_tiles(
        *(means2d[None], 3 * sigmas[None], torch.arange(P)[None], TILE, X, Y)
    )
    values = (
        means2d,
        torch.stack(conics, 1),
        torch.rand(P, D, generator=generator),
        0.02 + 0.5 * torch.rand(P, generator=generator),
        lists.tile_offsets,
        lists.flatten_ids,
    )
    return dict(zip(NAMES, values, strict=True))


@functools.cache
def garden() -> dict[str, Tensor]:
    """gsplat's garden as its first camera sees it, with colours of the harmonic of degree 0."""
    gaussians, (viewmats, Ks, width, height) = gsplat_step.scene(GARDEN or "")
    colors, opacities = gaussians.pop("colors"), gaussians["opacities"]
    splats = rayfuse.project_gaussians(
        gaussians.pop("means"), viewmats, Ks, **gaussians, image_width=width, image_height=height
    )
    lists = rayfuse.intersect_tiles(
        *(splats.means2d, splats.radii, splats.depths, TILE, -(-width // TILE), -(-height // TILE))
    )
    colors = rayfuse.spherical_harmonics(torch.ones(len(colors), 3), colors, degree=0) + 0.5
    values = splats.means2d[0], splats.conics[0], colors, opacities
    return dict(zip(NAMES, (*values, lists.tile_offsets, lists.flatten_ids), strict=True))


def on_triton(call: Callable[[], Any]) -> Any:
    with rayfuse.use_backend("triton"):
        return call()


class _Tiles(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in NAMES),
        *((name, ctypes.c_int64) for name in ("W", "H", "X", "tiles", "M")),
    )


@functools.cache
def scalar_kernels() -> ctypes.CDLL:
    source = Path(__file__).parent / "composite_tiles_scalar.cpp"
    library = Path(tempfile.mkdtemp()) / "scalar.so"
    subprocess.run(["g++", "-O3", "-shared", "-fPIC", source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


@functools.cache
def numba_kernels() -> tuple[Callable, Callable]:
    import numba

    f = np.float32
    jit = numba.njit(parallel=True, fastmath=True, error_model="numpy")

    @jit
    def forward(
        means2d, conics, colors, opacities, offsets, ids, W, H, image, alpha, passing, last
    ):
        Y, X = offsets.shape[1:]
        for t in numba.prange(Y * X):
            begin = offsets[0, t // X, t % X]
            end = len(ids) if t + 1 == Y * X else offsets[0, (t + 1) // X, (t + 1) % X]
            for y in range(t // X * 16, min(t // X * 16 + 16, H)):
                for x in range(t % X * 16, min(t % X * 16 + 16, W)):
                    T, r, g, b, stop = f(1), f(0), f(0), f(0), begin
                    for k in range(begin, end):
                        i = ids[k]
                        dx, dy = means2d[i, 0] - f(x + 0.5), means2d[i, 1] - f(y + 0.5)
                        sigma = f(0.5) * (conics[i, 0] * dx * dx + conics[i, 2] * dy * dy)
                        sigma += conics[i, 1] * dx * dy
                        if sigma < 0 or sigma > f(5.55):
                            continue
                        own = min(opacities[i] * np.exp(-sigma), f(0.999))
                        if own < f(1 / 255):
                            continue
                        after = T * (f(1) - own)
                        if after <= f(1e-4):
                            break
                        r += own * T * colors[i, 0]
                        g += own * T * colors[i, 1]
                        b += own * T * colors[i, 2]
                        T, stop = after, k + 1
                    image[y, x, 0], image[y, x, 1], image[y, x, 2] = r, g, b
                    alpha[y, x], passing[y, x], last[y, x] = f(1) - T, T, stop

    @jit
    def gradients(
        means2d, conics, colors, opacities, offsets, ids, W, H, passing, last, d_image, d_alpha,
        partial,
    ):  # fmt: skip
        Y, X = offsets.shape[1:]
        for t in numba.prange(Y * X):
            begin = offsets[0, t // X, t % X]
            for y in range(t // X * 16, min(t // X * 16 + 16, H)):
                for x in range(t % X * 16, min(t % X * 16 + 16, W)):
                    T, behind = passing[y, x], f(0)
                    d_passing = -d_alpha[y, x] * T
                    for k in range(last[y, x] - 1, begin - 1, -1):
                        i = ids[k]
                        dx, dy = means2d[i, 0] - f(x + 0.5), means2d[i, 1] - f(y + 0.5)
                        sigma = f(0.5) * (conics[i, 0] * dx * dx + conics[i, 2] * dy * dy)
                        sigma += conics[i, 1] * dx * dy
                        if sigma < 0 or sigma > f(5.55):
                            continue
                        bell = np.exp(-sigma)
                        most = opacities[i] * bell
                        own = min(most, f(0.999))
                        if own < f(1 / 255):
                            continue
                        again = f(1) / (f(1) - own)
                        T *= again
                        shade = f(0)
                        for c in range(3):
                            partial[k, 6 + c] += own * T * d_image[y, x, c]
                            shade += colors[i, c] * d_image[y, x, c]
                        d_own = shade * T - (behind + d_passing) * again
                        behind += own * T * shade
                        if most > f(0.999):
                            continue
                        h = most * d_own
                        partial[k, 0] += bell * d_own
                        partial[k, 1] -= h * dx
                        partial[k, 2] -= h * dy
                        partial[k, 3] -= f(0.5) * h * dx * dx
                        partial[k, 4] -= h * dx * dy
                        partial[k, 5] -= f(0.5) * h * dy * dy

    return forward, gradients


class ScalarFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, width: int, height: int, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        offsets, ids = inputs[4:]
        sizes = width, height, offsets.shape[2], offsets.numel(), len(ids)
        tiles = _Tiles(*(x.data_ptr() for x in inputs), *sizes)
        image, alpha = torch.empty(1, height, width, 3), torch.empty(1, height, width)
        passing, last = torch.empty_like(alpha), torch.empty(height, width, dtype=torch.int64)
        out = [ctypes.c_void_p(x.data_ptr()) for x in (image, alpha, passing, last)]
        scalar_kernels().forward(ctypes.byref(tiles), *out)
        ctx.tiles, ctx.kept = tiles, (passing, last)
        ctx.save_for_backward(*inputs)
        return image, alpha

    @staticmethod
    def backward(ctx: Any, d_image: Tensor, d_alpha: Tensor) -> tuple[Tensor | None, ...]:
        grads = [torch.zeros_like(x) for x in ctx.saved_tensors[:4]]
        given = (*ctx.kept, d_image, d_alpha, *grads)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in given]
        scalar_kernels().backward(ctypes.byref(ctx.tiles), *pointers)
        return None, None, *grads, None, None


class NumbaFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, width: int, height: int, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        arrays = [x.detach().numpy() for x in inputs]
        image, alpha = (
            np.empty((height, width, 3), np.float32),
            np.empty((height, width), np.float32),
        )
        passing, last = np.empty_like(alpha), np.empty((height, width), np.int64)
        numba_kernels()[0](*arrays, width, height, image, alpha, passing, last)
        ctx.arguments = (*arrays, width, height, passing, last)
        return torch.from_numpy(image)[None], torch.from_numpy(alpha)[None]

    @staticmethod
    def backward(ctx: Any, d_image: Tensor, d_alpha: Tensor) -> tuple[Tensor | None, ...]:
        ids, conics = torch.from_numpy(ctx.arguments[5]), torch.from_numpy(ctx.arguments[1])
        partial = np.zeros((len(ids), 9), np.float32)
        numba_kernels()[1](*ctx.arguments, d_image[0].numpy(), d_alpha[0].numpy(), partial)
        sums = torch.zeros(len(conics), 9).index_add_(0, ids, torch.from_numpy(partial))
        (o, x, y), (a, b, c) = sums[:, :3].unbind(1), conics.unbind(1)
        d_means2d = torch.stack([a * x + b * y, b * x + c * y], 1)
        return None, None, d_means2d, sums[:, 3:6], sums[:, 6:], o, None, None


class BenchCompositeTiles(harness.Bench):
    op = staticmethod(rayfuse.composite_tiles)
    # of a picture of these leading sizes: splats of a list, and their width in pixels
    workloads = (
        Workload((640, 480), dict(N=64, S=3, D=3)),
        Workload((640, 480), dict(N=200, S=3, D=3)),
        Workload((640, 480), dict(N=200, S=8, D=3)),
        Workload((640, 480), dict(N=59, S=40, D=3)),
        Workload((640, 480), dict(N=64, S=3, D=64)),
        *([Workload((648, 420), dict(D=3))] if GARDEN else []),
    )
    gpu_times = 1
    directions = ((), NAMES[:4])
    title = ""
    maps = 1  # beside the colours
    page = "splats"

    test_growth = None
    test_call_overhead = None

    def inputs(self, workload: Workload) -> dict[str, Tensor]:
        inputs = (
            scene(*workload.leading, *workload.sizes.values())
            if "N" in workload.sizes
            else garden()
        )
        return {name: x.to(peers.device) for name, x in inputs.items()}

    def bytes_moved(self, workload: Workload, wants: Sequence[str]) -> int:
        inputs = {name: x.nbytes for name, x in self.inputs(workload).items()}
        outputs = 4 * math.prod(workload.leading) * (workload.sizes["D"] + 2)
        forward = sum(inputs.values()) + outputs
        return 2 * forward + sum(inputs[name] for name in wants) if wants else forward

    def images(self, width: int, height: int, *inputs: Tensor, **named: Any) -> tuple[Tensor, ...]:
        """Ours: colours and opacity."""
        return rayfuse.composite_tiles(*inputs, image_width=width, image_height=height, **named)[:2]

    def contenders_of(self, workload: Workload) -> dict[str, Callable[..., Any]]:
        width, height = workload.leading

        calls: dict[str, Callable[..., Any]] = {
            "rayfuse": lambda *x: self.images(width, height, *x)
        }
        if peers.device.type != "cpu":
            calls["rayfuse triton"] = lambda *x: on_triton(lambda: calls["rayfuse"](*x))
        elif workload.sizes["D"] == 3:
            if shutil.which("g++"):
                calls["scalar C++, 1 thread"] = functools.partial(
                    ScalarFunction.apply, width, height
                )
            calls["numba"] = functools.partial(NumbaFunction.apply, width, height)
        return calls

    def test_speed(self, benchmark: Any, workload: Workload, wants: Sequence[str]) -> None:
        inputs = self.inputs(workload)
        (width, height), D = workload.leading, workload.sizes["D"]
        pairs = len(inputs["flatten_ids"]) * TILE * TILE
        d_outputs = [torch.rand(1, height, width, D), *torch.rand(self.maps, 1, height, width)]
        d_outputs = [x.to(peers.device) for x in d_outputs]
        exp_values = EXP_VALUES if peers.device.type == "cpu" else GPU_EXP_VALUES
        values = torch.rand(exp_values, device=peers.device)
        turns = {
            "streaming": Turns(harness.Streaming()),
            EXP: Turns(functools.partial(torch.exp, values, out=values.clone())),
        }
        table = self.title + harness.direction_name(["all"] if wants else [])
        results = {}
        for name, call in reversed(self.contenders_of(workload).items()):
            peer = peers.Peer(name, lambda *x, call=call: lambda: call(*x))
            prepared = peer.prepare(inputs, wants, d_outputs)
            results[name] = prepared()
            turns[name] = Turns(prepared)
        for name, others in results.items():
            # a pixel whose alpha is at the threshold takes a splat or leaves it
            for x, y in zip(others, results["rayfuse"], strict=True):
                near = (x - y).abs() <= 1e-3 * y.abs().max()
                assert near.float().mean() > 0.9999, f"{name} is something else"
        harness.take_turns([*turns.values()], benchmark)
        seconds = {name: turn.median for name, turn in turns.items()}
        seconds[EXP] *= pairs / exp_values
        bandwidth = harness.STREAM_BYTES / seconds.pop("streaming")
        moved = self.bytes_moved(workload, wants)
        rows = []
        for name in ("rayfuse", EXP, *list(results)[-2::-1]):
            row = report.Row(self.stem, table, str(workload), name, ms=seconds[name] * 1e3)
            row.agrees, row.streaming_gb_per_s = True, bandwidth / 1e9
            row.gb_per_s = moved / seconds[name] / 1e9
            row.times_limit = seconds[name] / (moved / bandwidth)
            row.memory_mb = harness.extra_megabytes(turns[name].call)
            rows.append(row)
            report.add(row)
        benchmark.extra_info |= dict(
            calls_per_round=turns["rayfuse"].calls, rows=[row.as_dict() for row in rows]
        )


class BenchCompositeTilesInOnePass(BenchCompositeTiles):
    """Colours, opacity and depth at once, beside a pass for each."""

    workloads = (Workload((640, 480), dict(N=64, S=3, D=3)),)
    directions = ((), (*NAMES[:4], "depths"))
    title = "with depth, "
    maps = 2

    def inputs(self, workload: Workload) -> dict[str, Tensor]:
        inputs = super().inputs(workload)
        P = len(inputs["means2d"])
        return inputs | dict(depths=1 + torch.arange(P, device=peers.device) / P)

    def contenders_of(self, workload: Workload) -> dict[str, Callable[..., Any]]:
        width, height = workload.leading

        def one_pass(*inputs: Tensor) -> tuple[Tensor, ...]:
            *given, depths = inputs
            return rayfuse.composite_tiles(
                *given, depths=depths, image_width=width, image_height=height
            )[:3]

        def three_passes(*inputs: Tensor) -> tuple[Tensor, ...]:
            means2d, conics, colors, opacities, *lists, depths = inputs
            image, opacity, distance = (
                self.images(width, height, means2d, conics, channels, opacities, *lists)
                for channels in (colors, torch.ones_like(depths)[:, None], depths[:, None])
            )
            alpha = opacity[1]
            return image[0], alpha, distance[0][..., 0] / alpha.clamp(min=1e-10)

        return {"rayfuse": one_pass, "three passes": three_passes}
