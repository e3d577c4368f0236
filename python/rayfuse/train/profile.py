"""Time per step by part and by op, forward and backward, measured on steps of a run."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PARTS = "part:"
OPS = "op:"


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
    """Collects torch's profiler events over steps; ranges named part:* and op:* mark the code.

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

    def summary(self, step_ms: float, backends: dict[str, str]) -> dict[str, Any]:
        """The content of profile.json.

        Args:
            step_ms: wall time of a step, measured without the profiler.
            backends: which backend ran an op; the others are plain torch.
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

        def rows(kind: str, key: str) -> list[dict[str, Any]]:
            names = dict.fromkeys(name for name in [*forward, *backward] if name.startswith(kind))
            return [
                {
                    key: name.removeprefix(kind),
                    "forward_ms": forward[name] / 1e3 / max(self.steps, 1),
                    "backward_ms": backward[name] / 1e3 / max(self.steps, 1),
                }
                for name in names
            ]

        ops = [{**row, "backend": backends.get(row["op"], "torch")} for row in rows(OPS, "op")]
        return {"step_ms": step_ms, "parts": rows(PARTS, "name"), "ops": ops}
