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

import harness
import peers
import rayfuse
import report
from harness import Turns, Workload

TILE = 16
# so many that all threads take part, and few enough for the second-level cache
EXP_VALUES = 1 << 16
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
    values = (
        means2d,
        torch.stack(conics, 1),
        torch.rand(P, D, generator=generator),
        0.02 + 0.5 * torch.rand(P, generator=generator),
        *lists(means2d, sigmas, X, Y),
    )
    return dict(zip(NAMES, values, strict=True))


def lists(means2d: Tensor, sigmas: Tensor, X: int, Y: int) -> tuple[Tensor, Tensor]:
    """Where the lists of tiles begin, and splats in their order in all tiles within 3 sigma."""
    first = ((means2d - 3 * sigmas) / TILE).floor().long().clamp(min=0)
    last = torch.minimum(((means2d + 3 * sigmas) / TILE).ceil().long(), torch.tensor([X, Y]))
    size = (last - first).clamp(min=0)
    count = size.prod(1)
    ids = torch.arange(len(count)).repeat_interleave(count)
    place = torch.arange(len(ids)) - (count.cumsum(0) - count)[ids]
    column, row = place % size[ids, 0], place // size[ids, 0]
    tile, order = ((first[ids, 1] + row) * X + first[ids, 0] + column).sort(stable=True)
    lengths = torch.bincount(tile, minlength=X * Y)
    return (lengths.cumsum(0) - lengths).view(1, Y, X), ids[order]


@functools.cache
def garden(width: int, height: int) -> dict[str, Tensor]:
    """The points within 2 units of the table with gsplat's random shapes and opacities, as the
    first camera sees them."""
    data = {name: torch.from_numpy(x) for name, x in np.load(GARDEN or "").items()}
    means = data["means3d"]
    inside = (means.abs() <= 2).all(1)
    generator = torch.Generator().manual_seed(0)
    P = int(inside.sum())
    scales = 0.02 * torch.rand(P, 3, generator=generator)
    axes = torch.linalg.qr(torch.randn(P, 3, 3, generator=generator)).Q * scales[:, None]
    opacities = torch.rand(P, generator=generator)
    view = data["viewmats"][0]
    means = means[inside] @ view[:3, :3].T + view[:3, 3]
    front = means[:, 2].sort(stable=True).indices
    front = front[means[front, 2] > 0.01]
    z, axes = means[front, 2], axes[front]
    zoom = torch.tensor([width, height]) / torch.stack([data["width"], data["height"]])
    K = data["Ks"][0][:2] * zoom[:, None]
    means2d = means[front, :2] / z[:, None] * K.diagonal() + K[:, 2]
    # far beside the image the projection is not linear in anything that is seen
    most = 0.65 * torch.tensor([width, height]) / K.diagonal()
    x, y = (means[front, :2] / z[:, None]).clamp(-most, most).unbind(1)
    (f_x, f_y), zero = K.diagonal(), torch.zeros_like(z)
    jacobian = torch.stack([f_x / z, zero, -f_x * x / z, zero, f_y / z, -f_y * y / z], 1)
    jacobian = jacobian.view(-1, 2, 3)
    projected = jacobian @ view[:3, :3] @ axes
    covariance = projected @ projected.mT + 0.3 * torch.eye(2)
    a, b, c = covariance.inverse().flatten(1)[:, [0, 1, 3]].unbind(1)
    values = (
        means2d,
        torch.stack([a, b, c], 1),
        (data["colors"][inside] / 255)[front],
        opacities[front],
        *lists(means2d, covariance.diagonal(0, 1, 2).sqrt(), -(-width // TILE), -(-height // TILE)),
    )
    return dict(zip(NAMES, values, strict=True))


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
    directions = ((), NAMES[:4])
    page = "splats"

    test_growth = None
    test_call_overhead = None

    def inputs(self, workload: Workload) -> dict[str, Tensor]:
        inputs = (
            scene(*workload.leading, *workload.sizes.values())
            if "N" in workload.sizes
            else garden(*workload.leading)
        )
        return {name: x.to(peers.device) for name, x in inputs.items()}

    def bytes_moved(self, workload: Workload, wants: Sequence[str]) -> int:
        inputs = {name: x.nbytes for name, x in self.inputs(workload).items()}
        outputs = 4 * math.prod(workload.leading) * (workload.sizes["D"] + 2)
        forward = sum(inputs.values()) + outputs
        return 2 * forward + sum(inputs[name] for name in wants) if wants else forward

    def contenders_of(self, workload: Workload) -> dict[str, Callable[..., Any]]:
        width, height = workload.leading

        def ours(*inputs: Tensor) -> tuple[Tensor, ...]:
            return rayfuse.composite_tiles(*inputs, image_width=width, image_height=height)[:2]

        calls: dict[str, Callable[..., Any]] = {"rayfuse": ours}
        if workload.sizes["D"] == 3 and peers.device.type == "cpu":
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
        d_outputs = [torch.rand(1, height, width, D), torch.rand(1, height, width)]
        d_outputs = [x.to(peers.device) for x in d_outputs]
        values = torch.rand(EXP_VALUES, device=peers.device)
        turns = {
            "streaming": Turns(harness.Streaming()),
            EXP: Turns(functools.partial(torch.exp, values, out=values.clone())),
        }
        table = harness.direction_name(["all"] if wants else [])
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
        seconds[EXP] *= pairs / EXP_VALUES
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
