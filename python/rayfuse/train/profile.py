"""Time per step by part and by op, forward and backward, and memory, measured on steps of a run."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import rayfuse

PARTS = "part:"
OPS = "rayfuse::"  # as the engine names them: "rayfuse::<op> on <backend>"


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keeps the profiler's own start and stop lines, written from C++, off the terminal."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class StepProfile:
    """Collects torch's profiler events over steps; ranges of parts and of ops mark the code.

    A backward node belongs to the range in which its forward ran: they share a sequence number.
    """

    def __init__(self) -> None:
        self._profiler = torch.autograd.profiler.profile()
        self.steps = 0

    def __enter__(self) -> StepProfile:
        with _quiet_stderr():
            self._profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        with _quiet_stderr():
            self._profiler.__exit__(*error)

    def summary(self, step_ms: float) -> dict[str, Any]:
        """The content of profile.json.

        Args:
            step_ms: wall time of a step, measured without the profiler.
        """
        forward: dict[str, float] = defaultdict(float)
        backward: dict[str, float] = defaultdict(float)
        events = sorted(self._profiler.function_events or [], key=lambda e: e.time_range.start)
        open_ranges: list[tuple[float, str]] = []
        owners: dict[int, list[str]] = {}
        for event in events:
            start, end = event.time_range.start, event.time_range.end
            open_ranges = [(until, name) for until, name in open_ranges if until > start]
            if event.name.startswith((PARTS, OPS)):
                forward[event.name] += end - start
                open_ranges.append((end, event.name))
            elif event.name.startswith("autograd::engine::evaluate_function"):
                for name in owners.get(event.sequence_nr, ["part:gradients"]):
                    backward[name] += end - start
            elif event.sequence_nr >= 0:
                owners[event.sequence_nr] = [name for _, name in open_ranges]

        def rows(kind: str) -> list[dict[str, Any]]:
            names = dict.fromkeys(name for name in [*forward, *backward] if name.startswith(kind))
            return [
                {
                    "name": name.removeprefix(kind),
                    "forward_ms": forward[name] / 1e3 / max(self.steps, 1),
                    "backward_ms": backward[name] / 1e3 / max(self.steps, 1),
                }
                for name in names
            ]

        ops = rows(OPS)
        for row in ops:
            row["op"], _, row["backend"] = row.pop("name").partition(" on ")
        return {"step_ms": step_ms, "parts": rows(PARTS), "ops": ops}


def peak_extra_megabytes(call: Callable[[], Any], device: torch.device | None = None) -> float:
    """How much memory a call takes at its peak, results included; NaN where nothing tells.

    On a CPU that is the resident memory of the process: the kernel's own high-water mark, reset
    before, sees every allocator: torch's, numpy's and what C++ takes. Free memory is given back
    first, so that none of it is used unseen.
    """
    device = device or torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type != "cpu" or not clear.exists():
        return math.nan

    def kilobytes(key: str) -> int:
        return int(status.read_text().split(f"{key}:")[1].split()[0])

    rayfuse.release_memory()
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")
    before = kilobytes("VmRSS")
    result = call()
    peak = kilobytes("VmHWM")
    del result
    return max(0, peak - before) * 1024 / 1e6
