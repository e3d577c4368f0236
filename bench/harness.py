"""Timing of an op beside its peers, on this machine, as multiples of what memory allows.

All contenders of one workload take turns, so that what disturbs the machine disturbs all of them
alike; medians count. One more contender is torch.add over arrays far larger than the cache: its
bandwidth is the limit of the same run. Nothing of ours is timed before it agrees with the float64
reference.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

import peers
import rayfuse
import report
from rayfuse import backend
from rayfuse.train.profile import peak_extra_megabytes

STREAM_VALUES = 1 << 24
STREAM_BYTES = 12 * STREAM_VALUES
# long enough that code and allocator are warm: what one op finds cold is the other's doing
TURN_SECONDS = 1e-2
TEST_SECONDS = 2
SLOW_SECONDS = 0.25
SLOW_TURNS = 3
# how names of contenders begin that are not wanted (`--without`)
left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Workload:
    leading: tuple[int, ...]
    sizes: dict[str, int]
    dtype: torch.dtype = torch.float32
    # of the inputs that may be narrower than the others
    narrow: torch.dtype | None = None

    def with_rays(self, times: int) -> Workload:
        """With so many times the rays."""
        return replace(self, leading=(self.leading[0] * times, *self.leading[1:]))

    def __str__(self) -> str:
        shape = "x".join(map(str, (*self.leading, *self.sizes.values())))
        short = {torch.bfloat16: " bf16", torch.float16: " f16", torch.float64: " f64"}
        return shape + short.get(self.narrow or self.dtype, "")


def for_gpu() -> None:
    """Time as a GPU's caches and speed want it, from here on."""
    global STREAM_VALUES, STREAM_BYTES
    STREAM_VALUES, STREAM_BYTES = 1 << 27, 12 << 27


@dataclass
class Turns:
    """A contender and the time per call in each of its turns, in seconds."""

    call: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        # what compiles, loads or grows on the first calls must not count
        self.call()
        self.calls = 1
        estimate = self._timed()
        self.calls = max(1, int(TURN_SECONDS / estimate))
        self.turn_seconds = self.calls * estimate

    def _timed(self) -> float:
        call, synchronize = self.call, torch.get_device_module(peers.device).synchronize
        synchronize()
        start = time.perf_counter()
        for _ in range(self.calls):
            call()
        synchronize()
        return (time.perf_counter() - start) / self.calls

    @property
    def is_slow(self) -> bool:
        return self.turn_seconds > SLOW_SECONDS

    def run(self) -> None:
        if not (self.is_slow and len(self.seconds) == SLOW_TURNS):
            self.seconds.append(self._timed())

    @property
    def median(self) -> float:
        return median(self.seconds)


def take_turns(turns: Sequence[Turns], benchmark: Any = None, seconds: float | None = None) -> None:
    """Time everybody in turn; the last one is what pytest-benchmark records."""
    one_round = sum(turn.turn_seconds for turn in turns if not turn.is_slow)
    rounds = min(40, max(7, int((seconds or TEST_SECONDS) / one_round)))

    def others() -> None:
        for turn in turns[:-1]:
            turn.run()

    if benchmark:
        benchmark.pedantic(turns[-1].run, setup=others, rounds=rounds)
    else:
        for _ in range(rounds):
            others()
            turns[-1].run()


class Streaming:
    """torch.add over three arrays, of 64 MB each on a CPU and of 512 MB on a GPU."""

    def __init__(self) -> None:
        ones = functools.partial(torch.ones, STREAM_VALUES, device=peers.device)
        self.a, self.b, self.out = ones(), ones(), ones()

    def __call__(self) -> None:
        torch.add(self.a, self.b, out=self.out)


def extra_megabytes(call: Callable[[], Any]) -> float:
    """What a call takes beyond what is there, results included."""
    memory = torch.get_device_module(peers.device)
    if not hasattr(memory, "max_memory_allocated"):
        return peak_extra_megabytes(call)
    before = memory.memory_allocated()
    memory.reset_peak_memory_stats()
    call()
    return (memory.max_memory_allocated() - before) / 1e6


def relative_errors(results: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """The largest difference of each result, as a part of its largest true value."""
    errors = (
        (x.double() - y).abs().max() / y.abs().max() for x, y in zip(results, truth, strict=True)
    )
    return [float(error.nan_to_num(math.inf)) for error in errors]


def direction_name(wants: Sequence[str]) -> str:
    return f"forward + backward to {' and '.join(wants)}" if wants else "forward"


class StandIn:
    """What is asked of torch.cuda, answered where there is no GPU."""

    def __getattr__(self, name: str) -> Callable[[], Any]:
        answers = dict(get_device_name="none: a rehearsal", synchronize=None)
        memory = dict(memory_allocated=0, max_memory_allocated=1 << 20)
        answer = {**answers, **memory, "reset_peak_memory_stats": None}[name]
        return lambda: answer


def rehearse(bench: type[Bench]) -> None:
    """Make a bench so short that its numbers mean nothing, on a GPU that is not there."""
    torch.get_device_module = lambda device: StandIn()
    global TURN_SECONDS, TEST_SECONDS, STREAM_VALUES, STREAM_BYTES
    TURN_SECONDS, TEST_SECONDS, STREAM_VALUES = 1e-4, 1e-2, 1 << 10
    STREAM_BYTES = 12 * STREAM_VALUES
    first = bench.workloads[0]
    sizes = {name: min(size, 256) for name, size in first.sizes.items()}
    bench.workloads = [replace(first, leading=(16,) * len(first.leading), sizes=sizes)]
    bench.peers = [peer for peer in bench.peers if not peer.name.startswith("compile")]
    if bench.growth:
        letter, values, _, along = bench.growth
        bench.growth = letter, values[:2], (16,), along


class Bench:
    """The bench of one op: derive, name the op and its workloads, add its own peers."""

    op: Callable[..., Any]
    # the keywords of every call, None for an optional tensor that is absent
    options: dict[str, Any] = {}
    # what the tables call this bench, where an op has several
    title = ""
    workloads: Sequence[Workload]
    # on a GPU, how many times the rays: enough to keep it busy, and more than its cache holds
    gpu_times = 16
    # gradients wanted, for each table
    directions: Sequence[tuple[str, ...]] = ((),)
    # the inputs that the backward reads, where what the forward kept spares it some
    read_again: Sequence[str] | None = None
    peers: Sequence[peers.Peer] = ()
    # the letter that grows, its values, the leading shape, and the peers that grow along; None for
    # what is put together of ops, whose growth and overhead their own benches show
    growth: tuple[str, Sequence[int], tuple[int, ...], Sequence[str]] | None = None
    # times the streaming limit: what must be reached, and what is wanted
    bound, goal = 1.8, 1.2
    # the page under docs/ that shows the tables
    page: str

    @property
    def stem(self) -> str:
        return self.op.op.name

    def inputs(self, workload: Workload) -> dict[str, Tensor]:
        spec = self.op.op
        samples = spec.sample(workload.leading, workload.dtype, **workload.sizes)
        moved = [x.to(peers.device) for x in samples]
        inputs = dict(zip(spec.inputs, moved, strict=True))
        if workload.narrow:
            inputs |= {name: inputs[name].to(workload.narrow) for name in spec.narrow}
        return {name: x for name, x in inputs.items() if self.options.get(name, x) is not None}

    def d_outputs(self, workload: Workload) -> list[Tensor] | None:
        """Gradients of outputs that are no losses: those of losses are that of their mean."""
        spec = self.op.op
        if spec.is_loss:
            return None
        dtype, sizes = torch.promote_types(workload.dtype, torch.float32), self._sizes(workload)
        return [
            torch.rand(array.shape(workload.leading, sizes), dtype=dtype, device=peers.device)
            for array in spec.signature.outputs
        ]

    def _sizes(self, workload: Workload) -> dict[str, int]:
        """Without those of absent inputs."""
        shapes = self.inputs(Workload((1,), workload.sizes))
        spec = self.op.op
        present = [shapes[name].shape if name in shapes else None for name in spec.inputs]
        return spec.signature.bind(present)[1]

    def closed(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """The op or its reference as a function of the tensors that are present."""
        spec, named = self.op.op, {**self.options, **options}
        present = [array for array in spec.signature.inputs if named.get(array.name, 0) is not None]
        if not (named or any(array.optional for array in present)):
            return function

        def call(*tensors: Tensor) -> Any:
            pairs = [*zip(present, tensors, strict=True)]
            required = [x for array, x in pairs if not array.optional]
            return function(*required, **{a.name: x for a, x in pairs if a.optional}, **named)

        return call

    def bytes_moved(self, workload: Workload, wants: Sequence[str]) -> int:
        """What must cross the memory bus: forward reads inputs, and writes outputs and what it
        keeps; backward reads the outputs' gradients, what was kept and inputs again, and writes
        the gradients that are wanted."""
        inputs = {name: x.nbytes for name, x in self.inputs(workload).items()}
        sums, signature = max(4, workload.dtype.itemsize), self.op.op.signature
        results = sum(
            math.prod(array.shape(workload.leading, self._sizes(workload))) * sums
            for array in (*signature.outputs, *signature.kept)
        )
        forward = sum(inputs.values()) + results
        if not wants:
            return forward
        again = inputs if self.read_again is None else self.read_again
        return forward + results + sum(inputs[name] for name in (*again, *wants))

    def contenders(self) -> list[peers.Peer]:
        call, device = self.closed(self.op), peers.device.type
        others = {isa: f"cpu.{isa}" for isa in backend.isas()[:-1]}
        if device != "cpu":
            # the best one is the default; what is put together of ops has none of its own
            spec = getattr(self.op, "op", rayfuse.distortion_loss.op)
            names = spec.kernels.available(device)[1:]
            others = {name: name for name in names if name != "ref"}
        slower = [peers.ours(call, f"rayfuse {what}", name) for what, name in others.items()]
        return [peers.ours(call), *slower, *self.peers]

    def truth(
        self,
        inputs: dict[str, Tensor],
        wants: Sequence[str],
        d_outputs: Sequence[Tensor] | None,
        dtype: torch.dtype | None,
    ) -> Any:
        """The reference in a precision: mean loss, or outputs, and gradients."""

        def cast(x: Tensor) -> Tensor:
            return x.to(dtype) if dtype and x.is_floating_point() else x

        reference = peers.eager("", self.closed(self.op.op.reference), mean=self.op.op.is_loss)
        wide = {name: cast(x) for name, x in inputs.items()}
        return reference.prepare(wide, wants, d_outputs and [cast(x) for x in d_outputs])()

    def errors(
        self,
        results: Sequence[Tensor],
        inputs: dict[str, Tensor],
        wants: Sequence[str],
        d_outputs: Sequence[Tensor] | None,
    ) -> tuple[float, bool]:
        """The worst error, and whether it is no worse than torch's own and a few roundings."""
        truth = self.truth(inputs, wants, d_outputs, torch.float64)
        torch_errors = relative_errors(self.truth(inputs, wants, d_outputs, None), truth)
        errors = relative_errors(results, truth)
        return max(errors), all(
            error <= torch_error + 16 * torch.finfo(x.dtype).eps
            for x, error, torch_error in zip(results, errors, torch_errors, strict=True)
        )

    def test_speed(self, benchmark: Any, workload: Workload, wants: tuple[str, ...]) -> None:
        torch._dynamo.reset()
        inputs, d_outputs = self.inputs(workload), self.d_outputs(workload)
        turns: dict[str, Turns] = {"streaming": Turns(Streaming())}
        rows = []
        for peer in reversed(self.contenders()):
            if peer.name.startswith(left_out):
                continue
            table = f"{self.title} {direction_name(wants)}".strip()
            row = report.Row(self.stem, table, str(workload), peer.name)
            rows.insert(0, row)
            row.note = peer.reason(workload, wants)
            if row.note:
                continue
            call = peer.prepare(inputs, wants, d_outputs)
            start = time.perf_counter()
            results = call()
            row.first_call_s = time.perf_counter() - start
            ran = rayfuse.last_backend()
            row.error, row.agrees = self.errors(results, inputs, wants, d_outputs)
            if peer.name.startswith("rayfuse"):
                assert ran != "ref", f"{peer.name} fell back on the reference"
                assert row.agrees, f"{peer.name} is off by {row.error:.1e}: not timed"
            del results
            turns[peer.name] = Turns(call)

        take_turns([*turns.values()], benchmark)
        # memory last: it gives free pages back, which the next call would have to fault in again
        bandwidth = STREAM_BYTES / turns["streaming"].median
        moved = self.bytes_moved(workload, wants)
        for row in rows:
            if row.contender in turns:
                row.ms = turns[row.contender].median * 1e3
                row.gb_per_s = moved / row.ms / 1e6
                row.times_limit = row.ms / 1e3 / (moved / bandwidth)
                row.memory_mb = extra_megabytes(turns[row.contender].call)
            row.streaming_gb_per_s = bandwidth / 1e9
            report.add(row)
        benchmark.extra_info |= dict(
            calls_per_round=turns["rayfuse"].calls, rows=[row.as_dict() for row in rows]
        )

    def test_growth(self) -> None:
        letter, values, leading, along = self.growth
        wants = self.directions[1]
        for value in values:
            workload = Workload(leading, {**self.workloads[0].sizes, letter: value})
            inputs = self.inputs(workload)
            turns = {}
            for peer in reversed(self.contenders()):
                if peer.name not in ("rayfuse", *along) or peer.reason(workload, wants):
                    continue
                turns[peer.name] = Turns(peer.prepare(inputs, wants, self.d_outputs(workload)))
            take_turns([*turns.values()], seconds=TEST_SECONDS / 2)
            for name, turn in reversed(turns.items()):
                table = f"growth with {letter}, {direction_name(wants)}, {leading[0]} rays"
                row = report.Row(self.stem, table, str(value), name, ms=turn.median * 1e3)
                row.memory_mb = extra_megabytes(turn.call)
                report.add(row)

    def test_call_overhead(self) -> None:
        """A tiny call less the raw kernel, and beside it the least that an autograd.Function costs:
        one that does nothing but call the same kernels."""
        spec = self.op.op
        workload = Workload((1,), dict.fromkeys(self.workloads[0].sizes, 2))
        named = self.inputs(workload)
        for name in self.directions[1]:
            named[name].requires_grad_()
        inputs = [*named.values()]
        wanted = [x for x in inputs if x.requires_grad]
        needs = spec.needs([i for i, name in enumerate(spec.inputs) if name in self.directions[1]])
        raw = spec.kernels.choose(peers.device.type)

        def arguments(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
            given = dict(zip(named, tensors, strict=True))
            return spec.raw_arguments([given.get(name) for name in spec.inputs], **self.options)

        plain = arguments([x.detach() for x in inputs])
        outputs = len(spec.outputs)
        out = peers.as_tuple(raw.fwd(*plain))
        d_out, kept = [*map(torch.ones_like, out[:outputs])], out[outputs:]
        gets = [named.get(spec.inputs[i]) for i in spec.differentiable]

        class Least(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Tensor) -> Any:
                out = peers.as_tuple(raw.fwd(*arguments(inputs)))
                ctx.save_for_backward(*inputs, *out[outputs:])
                return out[0] if outputs == 1 else out[:outputs]

            @staticmethod
            def backward(ctx: Any, *d_out: Tensor) -> tuple[Tensor | None, ...]:
                saved, kept = ctx.saved_tensors[: len(named)], ctx.saved_tensors[len(named) :]
                grads = peers.as_tuple(raw.bwd(*d_out, *kept, *arguments(saved), needs))
                found = {id(x): g for x, g in zip(gets, grads, strict=True)}
                return tuple([found.get(id(x)) if x.requires_grad else None for x in inputs])

        def backward_of(outputs: Any) -> Callable[[], Any]:
            outputs = peers.as_tuple(outputs)
            d_outputs = [torch.ones_like(x) for x in outputs]
            return lambda: torch.autograd.grad(outputs, wanted, d_outputs, retain_graph=True)

        call = self.closed(self.op)
        forward = {"rayfuse": lambda: call(*inputs)}
        if spec.is_loss:
            each, mean = (self.closed(self.op, reduction=name) for name in ("none", "mean"))
            forward = {
                'reduction="none"': lambda: each(*inputs),
                'reduction="mean"': lambda: mean(*inputs),
            }
        forward["least autograd.Function"] = lambda: Least.apply(*inputs)
        backward = {name: backward_of(call()) for name, call in forward.items()}
        forward["raw kernel"] = lambda: raw.fwd(*plain)
        backward["raw kernel"] = lambda: raw.bwd(*d_out, *kept, *plain, needs)
        for direction, calls in (("forward", forward), ("backward", backward)):
            turns = {name: Turns(call) for name, call in calls.items()}
            for turn in turns.values():
                turn.calls = 500
            take_turns([*turns.values()], seconds=2)
            kernel = turns.pop("raw kernel").median
            table = "call overhead"
            report.add(report.Row(self.stem, table, direction, "raw kernel", ms=kernel * 1e3))
            for name, turn in turns.items():
                over = (turn.median - kernel) * 1e3
                report.add(report.Row(self.stem, table, direction, name, ms=over))


class PackedBench(Bench):
    """The bench of an op on packed rays: the leading dimension of a workload is a number of rays,
    and a size P the samples of each on average."""

    def inputs(self, workload: Workload) -> dict[str, Tensor]:
        return super().inputs(replace(workload, leading=(), sizes=self._sizes(workload)))

    def _sizes(self, workload: Workload) -> dict[str, int]:
        R = math.prod(workload.leading)
        return {**workload.sizes, "R": R, "P": R * workload.sizes["P"]}
