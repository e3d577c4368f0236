"""The training loop: steps, schedules, checkpoints, and the run directory."""

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
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import rayfuse
from rayfuse.train import InputError
from rayfuse.train.compare import compare
from rayfuse.train.config import PRESETS, TrainConfig, check, from_json, to_json
from rayfuse.train.evaluate import evaluate
from rayfuse.train.features import FeatureMap, extract
from rayfuse.train.model import FeatureFieldModel
from rayfuse.train.objective import Batch, Objective, Terms
from rayfuse.train.profile import StepProfile
from rayfuse.train.scene import Scene, load_scene

FORMAT = "rayfuse.train/1"
PROFILED_STEPS = 5  # the last of a run


class Trainer:
    """A model in training: everything that a checkpoint holds.

    Args:
        features: the map of each feature head, by name.
    """

    def __init__(self, config: TrainConfig, scene: Scene, features: dict[str, FeatureMap]) -> None:
        self.config, self.scene, self.features = config, scene, features
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)
        channels = {name: feature.channels for name, feature in features.items()}
        model = FeatureFieldModel(config.field, config.sampler, scene.space, channels)
        self.model = model.to(self.device)
        self.objective = Objective(config.objective)
        o = config.optimiser
        grids = [*self.model.field.grids()]
        proposals = [*self.model.proposals.parameters()]
        known = {id(p) for p in (*grids, *proposals)}
        groups = [
            {"name": "grid", "params": grids, "lr": o.grid_lr, "weight_decay": o.grid_decay},
            {"name": "proposal", "params": proposals, "lr": o.proposal_lr},
            {
                "name": "mlp",
                "params": [p for p in self.model.parameters() if id(p) not in known],
                "lr": o.mlp_lr,
            },
        ]
        self._peak = {group["name"]: float(group["lr"]) for group in groups}  # type: ignore[arg-type]
        self.optimiser = torch.optim.AdamW(
            groups, betas=(0.9, 0.99), eps=1e-15, weight_decay=0.0, fused=True
        )
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.step = 0
        self.seconds = 0.0

    @property
    def lr(self) -> dict[str, float]:
        return {group["name"]: group["lr"] for group in self.optimiser.param_groups}

    def _set_rates(self) -> None:
        o = self.config.optimiser
        done = min(self.step / self.config.steps, 1.0)
        share = o.final_share + (1 - o.final_share) * 0.5 * (1 + math.cos(math.pi * done))
        share *= min((self.step + 1) / max(o.warmup_steps, 1), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = self._peak[group["name"]] * share

    def batch(self) -> tuple[torch.Tensor, Batch]:
        """Pixels of the next step [R], flat into the photographs, and their targets."""
        count = self.config.optimiser.rays_per_step
        index = self.scene.draw(count, self.generator)
        colour = self.config.objective.background_color
        background = None
        if colour == "random":
            background = torch.rand((count, 3), generator=self.generator, device=self.device)
        elif colour in ("black", "white"):
            background = torch.full((1, 3), float(colour == "white"), device=self.device)
        scene = self.scene
        return index, Batch(
            rgb=scene.rgb.view(-1, 3)[index],
            alpha=None if scene.alpha is None else scene.alpha.view(-1, 1)[index],
            depth=None if scene.depth is None else scene.depth.view(-1, 1)[index],
            features={name: feature.at(scene, index) for name, feature in self.features.items()},
            background=background,
        )

    def train_step(self) -> Terms:
        """One step of the optimiser; returns the step's terms."""
        self._set_rates()
        o = self.config.objective
        with torch.profiler.record_function("part:rays"):
            index, batch = self.batch()
            rays = self.scene.rays(index)
        normal_rays = o.normal_rays if o.predict_normals else 0
        outputs = self.model(rays, self.generator, normal_rays)
        terms = self.objective(outputs, batch, self.step)
        total = terms.total
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()
        with torch.profiler.record_function("part:optimiser"):
            self.optimiser.step()
        self.step += 1
        return terms

    def state(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "config": to_json(self.config),
            "scene": [self.scene.name, *self.scene.rgb.shape[:3]],
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continues from `state`, bit for bit as if the run had not stopped."""
        fingerprint = [self.scene.name, *self.scene.rgb.shape[:3]]
        if state["scene"] != fingerprint:
            raise InputError(
                f"checkpoint must be of the scene {fingerprint}, got one of {state['scene']}"
            )
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"].cpu())
        self.step, self.seconds = state["step"], state["seconds"]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes state to path; a reader finds the old file or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in the file `path`, on the CPU."""
    if not path.is_file():
        raise InputError(f"checkpoint must exist, got {path}")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"checkpoint {path} must be a whole file, got {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise InputError(f"checkpoint {path} must be of the form {FORMAT}, got {found}")
    return state


def resumed_config(config: TrainConfig, default: TrainConfig) -> tuple[TrainConfig, dict[str, Any]]:
    """The configuration stored with the run at config.resume, and its checkpoint.

    Steps and device are taken from the command line where they differ from the default.
    """
    assert config.resume is not None
    folder = config.resume if config.resume.is_dir() else config.resume.parent
    path = folder / "checkpoint.pt" if config.resume.is_dir() else config.resume
    if not config.resume.exists():
        raise InputError(f"resume must be the folder of a run, got {config.resume}")
    state = read_checkpoint(path)
    try:
        stored = from_json(TrainConfig, state["config"])
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


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
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


def _new_run_dir(config: TrainConfig, scene: Scene) -> Path:
    if config.output is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        run_dir = Path("runs") / f"{scene.name}-{stamp}"
    else:
        run_dir = config.output
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise InputError(f"output must be a new or empty folder, got {run_dir}")
    return run_dir


def _write_json(path: Path, content: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def _numbers(values: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in values.items()}


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


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"device must be available, got {name} ({reason})") from error
    return device


def train(config: TrainConfig, console: Console | None = None) -> int:
    """Trains, evaluates and reports; returns the exit code (130 after Ctrl-C).

    Sets torch to flush denormal numbers, for the whole process.
    """
    # unused grid rows decay to denormals, which slow the optimiser ten times
    torch.set_flush_denormal(True)
    console = console or Console()
    state = None
    if config.resume is not None:
        config, state = resumed_config(config, PRESETS[config.preset][1])
    elif config.scene is not None:
        # a resumed run must find it from anywhere
        config = replace(config, scene=config.scene.resolve())
    check(config)
    device = _device(config.device)

    began = time.perf_counter()
    scene = load_scene(config.scene, config.downscale)
    loaded = time.perf_counter()
    run_dir = config.resume or _new_run_dir(config, scene)
    features = extract(scene, config.features)
    seconds = {"load": loaded - began, "features": time.perf_counter() - loaded}
    scene.to(device)
    for feature in features.values():
        feature.values = feature.values.to(device)

    def start() -> Trainer:
        return Trainer(config, scene, features)

    trainer = start()
    comparison = None
    if state is not None:
        trainer.load(state)
        state = None
    _describe(console, trainer, run_dir)
    if trainer.step == 0 and config.compare_steps:
        began = time.perf_counter()
        with console.status(f"{config.compare_steps} steps on the reference and on the kernels"):
            comparison = compare(start, config.compare_steps)
        seconds["compare"] = time.perf_counter() - began

    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output must be a folder that can be made, got {error}") from error
    _keep_steps(run_dir / "metrics.jsonl", trainer.step)
    versions = {
        "rayfuse": rayfuse.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    }
    command = " ".join(["rayfuse", *map(shlex.quote, sys.argv[1:])])
    _write_json(
        run_dir / "config.json", {**to_json(config), "command": command, "versions": versions}
    )
    if comparison:
        _write_json(run_dir / "compare.json", comparison)
    checkpoint = run_dir / "checkpoint.pt"
    finished = _loop(trainer, run_dir, console)
    save_checkpoint(checkpoint, trainer.state())
    if not finished:
        console.print(
            f"Stopped at step {trainer.step}, saved. Continue with: "
            f"rayfuse train --resume {shlex.quote(str(run_dir))}",
            soft_wrap=True,
        )
        return 130

    began = time.perf_counter()
    with console.status("Rendering what was held out"):
        result = evaluate(trainer.model, scene, features, run_dir, config.objective)
    seconds |= {"train": trainer.seconds, "evaluate": time.perf_counter() - began}
    result |= {
        "seconds": seconds,
        "steps": trainer.step,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "peak_memory_mb": _peak_memory_mb(device),
    }
    _write_json(run_dir / "evaluation.json", result)

    from rayfuse.train.report import write_report

    report = write_report(run_dir)
    _close(console, result, report)
    return 0


def _loop(trainer: Trainer, run_dir: Path, console: Console) -> bool:
    """Trains to the last step; False where Ctrl-C stopped it earlier."""
    config = trainer.config
    progress = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        console=console,
    )
    profile = StepProfile()
    first, before = trainer.step, trainer.seconds
    profile_from = config.steps - min(PROFILED_STEPS, config.steps - first)
    step_ms = 0.0
    began = time.perf_counter()
    with (
        _interruptible() as asked,
        progress,
        open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as log,
    ):
        task = progress.add_task("", total=config.steps, completed=first, state="")
        while trainer.step < config.steps and not asked.is_set():
            if trainer.step == profile_from:
                step_ms = 1e3 * (time.perf_counter() - began) / max(trainer.step - first, 1)
                profile.__enter__()
            terms = trainer.train_step()
            if trainer.step > profile_from:
                profile.steps += 1
            trainer.seconds = before + time.perf_counter() - began
            if trainer.step % config.log_every == 0 or trainer.step == config.steps:
                record = _record(trainer, terms)
                log.write(json.dumps(record) + "\n")
                if not math.isfinite(record["total"]):
                    raise FloatingPointError(
                        f"the loss is {record['total']} at step {trainer.step}; lower the rates "
                        f"(--optimiser.grid-lr, --optimiser.mlp-lr) and start again"
                    )
                rate = (trainer.step - first) / (trainer.seconds - before)
                state = (
                    f"loss {record['total']:.4f}  psnr {record['metrics']['psnr']:.2f} dB  "
                    f"{rate:.1f} it/s"
                )
                progress.update(task, completed=trainer.step, state=state)
            if trainer.step % config.checkpoint_every == 0 and trainer.step < config.steps:
                log.flush()
                save_checkpoint(run_dir / "checkpoint.pt", trainer.state())
        if trainer.step > profile_from:
            profile.__exit__(None, None, None)
    if trainer.step < config.steps:
        return False
    if profile.steps:
        _write_json(run_dir / "profile.json", profile.summary(step_ms))
    return True


def _record(trainer: Trainer, terms: Terms) -> dict[str, Any]:
    return {
        "step": trainer.step,
        "seconds": trainer.seconds,
        "lr": trainer.lr,
        "losses": _numbers(terms.losses),
        "weighted": _numbers(terms.weighted),
        "weights": terms.weights,
        "total": float(terms.total.detach()),
        "metrics": _numbers(terms.metrics),
    }


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _describe(console: Console, trainer: Trainer, run_dir: Path) -> None:
    scene = trainer.scene
    n, h, w = scene.rgb.shape[:3]
    share = (
        f"{scene.held_out.float().mean().item():.0%} of the pixels held out"
        if scene.split == "pixels"
        else f"{len(scene.test_views)} held out"
    )
    heads = ", ".join(f"{k} ({f.channels} channels)" for k, f in trainer.features.items()) or "none"
    parameters = sum(p.numel() for p in trainer.model.parameters())
    console.print(f"[bold]{scene.name}[/bold]: {n} photographs of {w} x {h}, {share}")
    console.print(f"features: {heads}; {parameters / 1e6:.1f} M parameters on {trainer.device}")
    console.print(f"run folder: {run_dir}", soft_wrap=True)


def _close(console: Console, result: dict[str, Any], report: Path) -> None:
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
