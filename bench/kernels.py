"""The kernels of all ops without the engine around them, on a GPU or a CPU: `python
bench/kernels.py cuda` (or triton, or cpu) writes a table of the times of each direction and their
multiples of what memory allows, in ten seconds on a GPU."""

from __future__ import annotations

import importlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import harness
import peers
import report
from rayfuse.ops import STEMS

# which of a bench's workloads; the last where it has fewer
WORKLOADS = {
    "composite_tiles": 1,
    "feature_distillation_loss": 0,
    "interlevel_loss": 3,
    "outer_bound": 3,
    "packed_composite_rays": 1,
    "packed_depth_loss": 1,
    "packed_feature_distillation_loss": 1,
    "packed_normal_losses": 1,
    "packed_render_features": 1,
    "project_gaussians": 1,
    "render_features": 0,
    "spherical_harmonics": 1,
    "splat_covariances": 1,
}
# dense rays of a workload, so many times over: enough to keep a GPU busy
TIMES = 4
CALLS, ROUNDS = 10, 3


def benches(stem: str) -> Iterator[harness.Bench]:
    module = importlib.import_module(f"bench_{stem}")
    for name, bench in inspect.getmembers(module, inspect.isclass):
        if name.startswith("Bench") and bench.__module__ == module.__name__:
            yield bench()


def milliseconds(call: Callable[[], Any]) -> float:
    synchronize = torch.get_device_module(peers.device).synchronize
    for _ in range(2):
        call()
    synchronize()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        synchronize()
        times.append(time.perf_counter() - start)
    # a host that paused once made a kernel look six times as slow
    return min(times) / CALLS * 1e3


def nbytes(tensors: Any) -> int:
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor))


class Kernels:
    """Those of an op with their arguments, all gradients wanted."""

    def __init__(
        self, bench: harness.Bench, named: dict[str, Tensor], backend: str, **options: Any
    ) -> None:
        spec = bench.op.op
        inputs = [named.get(name) for name in spec.inputs]
        args = [
            x.contiguous() if isinstance(x, Tensor) else x
            for x in spec.raw_arguments(inputs, **bench.options, **options)
        ]
        needs = spec.needs([i for i in spec.differentiable if inputs[i] is not None])
        kernels = spec.kernels.choose(peers.device.type, backend)
        self.out = peers.as_tuple(kernels.fwd(*args))
        results, self.kept = self.out[: len(spec.outputs)], self.out[len(spec.outputs) :]
        self.d_results = [torch.rand_like(x) for x in results]
        backward = [*self.d_results, *self.kept, *args, needs]
        self.forward = lambda: kernels.fwd(*args)
        self.backward = lambda: kernels.bwd(*backward)
        both, numbers = kernels.fwd_bwd, [1.0] * len(results)
        self.at_once = both and (lambda: both(*numbers, *args, needs))
        self.grads = peers.as_tuple(self.backward())


def title(bench: harness.Bench) -> str:
    name, of_bench = bench.op.op.name, bench.title.strip(" ,")
    return f"`{name}`" + (f" {of_bench}" if of_bench not in ("", name) else "")


def row(bench: harness.Bench, backend: str, bytes_per_ms: float) -> list[str]:
    spec = bench.op.op
    workload = bench.workloads[min(WORKLOADS.get(spec.name, 2), len(bench.workloads) - 1)]
    named, times = bench.inputs(workload), 1
    if workload.leading[0] >= 1 << 16 and not spec.name.startswith("packed"):
        times = TIMES
        named = {name: torch.cat([x] * times) for name, x in named.items()}
    options = {}
    if spec.name == "composite_tiles":
        options = dict(zip(("image_width", "image_height"), workload.leading, strict=True))
    kernels = Kernels(bench, named, backend, **options)
    again = named if bench.read_again is None else {n: named[n] for n in bench.read_again}
    cells = []
    for call, moved in (
        (kernels.forward, nbytes((*named.values(), *kernels.out))),
        (
            kernels.backward,
            nbytes((*again.values(), *kernels.d_results, *kernels.kept, *kernels.grads)),
        ),
    ):
        ms = milliseconds(call)
        cells += [f"{ms:.3f}", f"{ms * bytes_per_ms / moved:.2f}"]
    return [title(bench), f"{workload}" + (f", {times} times" if times > 1 else ""), *cells]


def main() -> None:
    backend = sys.argv[1]
    if backend != "cpu":
        peers.device = torch.device("cuda")
        harness.for_gpu()
    bytes_per_ms = harness.STREAM_BYTES / milliseconds(harness.Streaming())
    environment = report.environment()
    where = environment.get("gpu") or environment["cpu"]
    print(f"Backend {backend} on {where}, streaming {bytes_per_ms / 1e6:.0f} GB/s.\n")
    print("| op | workload | forward, ms | × limit | backward, ms | × limit |")
    print("|---|---|--:|--:|--:|--:|")
    for stem in STEMS:
        for bench in benches(stem):
            print("| " + " | ".join(row(bench, backend, bytes_per_ms)) + " |", flush=True)


if __name__ == "__main__":
    main()
