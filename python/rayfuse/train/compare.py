"""The same steps of training on the reference and on the fused kernels: values, time, memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

import rayfuse
from rayfuse.train.profile import StepProfile, peak_extra_megabytes

if TYPE_CHECKING:
    from rayfuse.train.objective import Terms
    from rayfuse.train.trainer import Trainer

# steps after the compared ones, for what would disturb their time
PROFILED_STEPS = 5
MEMORY_STEPS = 3


def compare(start: Callable[[], Trainer], steps: int) -> dict[str, Any]:
    """Train so many steps twice, in turns.

    Args:
        start: makes a training at its first step, always the same one.

    Returns:
        The content of compare.json: "losses" by term, the "total" among them, a list per side; by
        side "step_ms" (median), "extra_memory_mb" (what a step adds to the memory in use at its
        peak), and "ops" with the time of each.
    """
    sides = {"reference": Side("ref", start()), "fused": Side(None, start())}
    for _ in range(steps):
        for side in sides.values():
            side.step()
    terms = sides["fused"].losses
    return {
        "steps": steps,
        "losses": {
            term: {name: side.losses[term] for name, side in sides.items()} for term in terms
        },
        "step_ms": {name: 1e3 * median(side.seconds) for name, side in sides.items()},
        "ops": {name: side.profile() for name, side in sides.items()},
        "extra_memory_mb": {name: side.extra_memory_mb() for name, side in sides.items()},
    }


class Side:
    """One of the two trainings."""

    def __init__(self, backend: str | None, trainer: Trainer) -> None:
        self.backend, self.trainer = backend, trainer
        self.losses: dict[str, list[float]] = {}
        self.seconds: list[float] = []

    def advance(self) -> Terms:
        with rayfuse.use_backend(self.backend):
            return self.trainer.train_step()

    def step(self) -> None:
        began = time.perf_counter()
        terms = self.advance()
        self.seconds.append(time.perf_counter() - began)
        for name, loss in {**terms.losses, "total": terms.total}.items():
            self.losses.setdefault(name, []).append(float(loss.detach()))

    def profile(self) -> list[dict[str, Any]]:
        profile = StepProfile()
        with profile:
            for _ in range(PROFILED_STEPS):
                self.advance()
                profile.steps += 1
        return profile.summary(0.0)["ops"]

    def extra_memory_mb(self) -> float:
        return max(
            peak_extra_megabytes(self.advance, self.trainer.device) for _ in range(MEMORY_STEPS)
        )
