"""A run of any job: its folder, its checkpoints, its steps, and Ctrl-C.

A job is something to train (`Job`) with a configuration (`options.RunConfig`). Its folder holds
config.json, metrics.jsonl, checkpoint.pt and profile.json, written here, then what it measures,
evaluation.json, and the page that `report.write_report` makes of them.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import rayfuse
from rayfuse.train import InputError
from rayfuse.train.options import AnyConfig, RunConfig, from_json, to_json
from rayfuse.train.profile import StepProfile
from rayfuse.train.report import write_report

PROFILED_STEPS = 5  # the last of a run


@dataclass
class Terms:
    """Every term unweighted, its weight, their weighted sum, and the metrics."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def weighted(self) -> dict[str, Tensor]:
        return {name: self.weights[name] * loss for name, loss in self.losses.items()}

    @property
    def total(self) -> Tensor:
        return torch.stack(list(self.weighted.values())).sum()


class Job(Protocol):
    """What is trained: everything that a checkpoint holds."""

    step: int
    """Steps made."""
    seconds: float
    """Time that they took."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def lr(self) -> dict[str, float]:
        """The learning rate of each group of parameters."""

    def train_step(self) -> Terms:
        """One step of the optimiser; "psnr" is among the metrics."""

    def state(self) -> dict[str, Any]:
        """A checkpoint: "format", "config" (`to_json`), "step", and whatever else goes on from."""


# ---- checkpoints


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes state to path; a reader finds the old file or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_checkpoint(path: Path, form: str) -> dict[str, Any]:
    """The state in the file `path`, whose "format" must be `form`, on the CPU."""
    if not path.is_file():
        raise InputError(f"checkpoint must exist, got {path}")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"checkpoint {path} must be a whole file, got {reason}") from error
    if not isinstance(state, dict) or state.get("format") != form:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise InputError(f"checkpoint {path} must be of the form {form}, got {found}")
    return state


def resumed_config(
    config: AnyConfig, default: AnyConfig, form: str
) -> tuple[AnyConfig, dict[str, Any]]:
    """The configuration stored with the run at config.resume, and its checkpoint.

    Steps and device are taken from the command line where they differ from the default.
    """
    assert config.resume is not None
    folder = config.resume if config.resume.is_dir() else config.resume.parent
    path = folder / "checkpoint.pt" if config.resume.is_dir() else config.resume
    if not config.resume.exists():
        raise InputError(f"resume must be the folder of a run, got {config.resume}")
    state = read_checkpoint(path, form)
    try:
        stored = from_json(type(config), state["config"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"checkpoint {path} must hold this version's settings, got {error}"
        ) from error
    stored = replace(stored, resume=folder)
    if config.steps != default.steps:
        stored = replace(stored, steps=config.steps)
    if config.device != default.device:
        stored = replace(stored, device=config.device)
    if stored.steps < state["step"]:
        raise InputError(f"--steps must be at least the {state['step']} made, got {stored.steps}")
    return stored, state


# ---- the folder of a run


def new_folder(output: Path | None, name: str) -> Path:
    """Where a run of a scene of this name goes, not made yet."""
    if output is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        run_dir = Path("runs") / f"{name}-{stamp}"
    else:
        run_dir = output
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise InputError(f"output must be a new or empty folder, got {run_dir}")
    return run_dir


def write_json(path: Path, content: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def open_folder(run_dir: Path, config: RunConfig, step: int) -> None:
    """Makes the folder of a run that goes on from `step`, with config.json."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output must be a folder that can be made, got {error}") from error
    _keep_steps(run_dir / "metrics.jsonl", step)
    versions = {
        "rayfuse": rayfuse.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, threads: {torch.get_num_threads()}",
    }
    command = " ".join(["rayfuse", *map(shlex.quote, sys.argv[1:])])
    write_json(
        run_dir / "config.json", {**to_json(config), "command": command, "versions": versions}
    )


def _keep_steps(path: Path, last: int) -> None:
    """Drops the lines of metrics.jsonl after step `last`, which a resumed run makes anew."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= last:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


# ---- steps


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event; a second one interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = signal.getsignal(signal.SIGINT)

    def ask(*_: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


def train_to_end(job: Job, run_dir: Path, console: Console, command: str) -> bool:
    """Trains to the last step and saves; False where Ctrl-C stopped it earlier, which is said.

    Args:
        command: what resumes it, `rayfuse train` or another.
    """
    finished = _loop(job, run_dir, console)
    save_checkpoint(run_dir / "checkpoint.pt", job.state())
    if not finished:
        console.print(
            f"Stopped at step {job.step}, saved. Continue with: "
            f"{command} --resume {shlex.quote(str(run_dir))}",
            soft_wrap=True,
        )
    return finished


def _loop(job: Job, run_dir: Path, console: Console) -> bool:
    """Trains to the last step; False where Ctrl-C stopped it earlier."""
    config = job.config
    progress = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        console=console,
    )
    profile = StepProfile()
    first, before = job.step, job.seconds
    profile_from = config.steps - min(PROFILED_STEPS, config.steps - first)
    step_ms = 0.0
    began = time.perf_counter()
    with (
        interruptible() as asked,
        progress,
        open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as log,
    ):
        task = progress.add_task("", total=config.steps, completed=first, state="")
        while job.step < config.steps and not asked.is_set():
            if job.step == profile_from:
                step_ms = 1e3 * (time.perf_counter() - began) / max(job.step - first, 1)
                profile.__enter__()
            terms = job.train_step()
            if job.step > profile_from:
                profile.steps += 1
            job.seconds = before + time.perf_counter() - began
            if job.step % config.log_every == 0 or job.step == config.steps:
                record = _record(job, terms)
                log.write(json.dumps(record) + "\n")
                if not math.isfinite(record["total"]):
                    raise FloatingPointError(
                        f"the loss is {record['total']} at step {job.step}; lower the learning "
                        "rates and start again"
                    )
                rate = (job.step - first) / (job.seconds - before)
                state = (
                    f"loss {record['total']:.4f}  psnr {record['metrics']['psnr']:.2f} dB  "
                    f"{rate:.1f} it/s"
                )
                progress.update(task, completed=job.step, state=state)
            if job.step % config.checkpoint_every == 0 and job.step < config.steps:
                log.flush()
                save_checkpoint(run_dir / "checkpoint.pt", job.state())
        if job.step > profile_from:
            profile.__exit__(None, None, None)
    if job.step < config.steps:
        return False
    if profile.steps:
        write_json(run_dir / "profile.json", profile.summary(step_ms))
    return True


def _record(job: Job, terms: Terms) -> dict[str, Any]:
    return {
        "step": job.step,
        "seconds": job.seconds,
        "lr": job.lr,
        "losses": _numbers(terms.losses),
        "weighted": _numbers(terms.weighted),
        "weights": terms.weights,
        "total": float(terms.total.detach()),
        "metrics": _numbers(terms.metrics),
    }


def _numbers(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in values.items()}


# ---- around them


def find_device(name: str) -> torch.device:
    """The device of this name; InputError where it is not there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"device must be available, got {name} ({reason})") from error
    return device


def peak_memory_mb(device: torch.device) -> float:
    """The most that this process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def close(console: Console, run_dir: Path, result: dict[str, Any]) -> None:
    """Writes evaluation.json and the page of a run that has ended, and says what it reached.

    Args:
        result: what `evaluate` returns, with "seconds" by stage, "steps", "parameters" and
            "peak_memory_mb".
    """
    write_json(run_dir / "evaluation.json", result)
    report = write_report(run_dir)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row(f"held-out {result['held_out']}", f"[bold]{result['psnr']:.2f} dB[/bold] PSNR")
    if result["ssim"] is not None:
        table.add_row("", f"{result['ssim']:.3f} SSIM")
    if result["baseline"] is not None:
        table.add_row(
            "baseline", f"{result['baseline']['psnr']:.2f} dB, {result['baseline']['name']}"
        )
    for name, value in result["seconds"].items():
        table.add_row(f"{name} time", f"{value:.1f} s")
    table.add_row("peak memory", f"{result['peak_memory_mb']:.0f} MiB")
    console.print(table)
    console.print(f"report: {report}", soft_wrap=True)
