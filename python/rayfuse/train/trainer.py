"""`rayfuse train`: a model in training, and the whole run around it."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rayfuse.train import run
from rayfuse.train.compare import compare
from rayfuse.train.config import PRESETS, TrainConfig, check
from rayfuse.train.evaluate import View, evaluate, render_view
from rayfuse.train.features import FeatureMap, extract
from rayfuse.train.model import make_model
from rayfuse.train.objective import Batch, Objective
from rayfuse.train.options import to_json
from rayfuse.train.run import Terms
from rayfuse.train.scene import Scene, load_scene

FORMAT = "rayfuse.train/1"


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
        model = make_model(config.field, config.sampler, scene.space, channels)
        self.model = model.to(self.device)
        self.objective = Objective(config.objective)
        o = config.optimiser
        grids = [*self.model.field.grids()]
        proposals = [p for n, p in self.model.named_parameters() if n.startswith("proposals.")]
        known = {id(p) for p in (*grids, *proposals)}
        mlps = [p for p in self.model.parameters() if id(p) not in known]
        groups = [
            {"name": "grid", "params": grids, "lr": o.grid_lr, "weight_decay": o.grid_decay},
            {"name": "proposal", "params": proposals, "lr": o.proposal_lr},
            {"name": "mlp", "params": mlps, "lr": o.mlp_lr},
        ]
        groups = [group for group in groups if group["params"]]
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
        count = self.model.rays_per_step(self.config.optimiser.rays_per_step)
        index = self.scene.draw(count, self.generator)
        background = None
        if self.config.objective.background_color == "random":
            background = torch.rand((count, 3), generator=self.generator, device=self.device)
        scene = self.scene
        return index, Batch(
            rgb=scene.rgb.view(-1, 3)[index],
            alpha=None if scene.alpha is None else scene.alpha.view(-1, 1)[index],
            depth=None if scene.depth is None else scene.depth.view(-1)[index],
            features={name: feature.at(scene, index) for name, feature in self.features.items()},
            background=background,
        )

    def train_step(self) -> Terms:
        """One step of the optimiser; returns the step's terms."""
        self._set_rates()
        o = self.config.objective
        self.model.prepare(self.step, self.generator)
        with torch.profiler.record_function("part:rays"):
            index, batch = self.batch()
            rays = self.scene.rays(index)
        normal_rays = o.normal_rays if o.predict_normals else 0
        samples = self.model(rays, self.generator, normal_rays)
        rendered = self.objective.render(samples, batch)
        features = self.model.features(samples, rendered, self.generator)
        terms = self.objective(samples, rendered, features, batch, self.step)
        terms.metrics |= self.model.metrics()
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
            "scene": self.scene.fingerprint,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continues from `state`, bit for bit as if the run had not stopped."""
        self.scene.check_fingerprint(state["scene"])
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"].cpu())
        self.step, self.seconds = state["step"], state["seconds"]


def train(config: TrainConfig, console: Console | None = None) -> int:
    """Trains, evaluates and reports; returns the exit code (130 after Ctrl-C).

    Sets torch to flush denormal numbers, for the whole process.
    """
    # unused grid rows decay to denormals, which slow the optimiser ten times
    torch.set_flush_denormal(True)
    console = console or Console()
    state = None
    if config.resume is not None:
        config, state = run.resumed_config(config, PRESETS[config.preset][1], FORMAT)
    elif config.scene is not None:
        # a resumed run must find it from anywhere
        config = replace(config, scene=config.scene.resolve())
    check(config)
    device = run.find_device(config.device)

    began = time.perf_counter()
    scene = load_scene(config.scene, config.downscale)
    loaded = time.perf_counter()
    run_dir = config.resume or run.new_folder(config.output, scene.name)
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

    run.open_folder(run_dir, config, trainer.step)
    if comparison:
        run.write_json(run_dir / "compare.json", comparison)
    if not run.train_to_end(trainer, run_dir, console, "rayfuse train"):
        return 130

    def render(view: int) -> View:
        return render_view(trainer.model, trainer.objective, scene, view)

    began = time.perf_counter()
    white = config.objective.background_color == "white"
    with console.status("Rendering what was held out"):
        result = evaluate(render, scene, run_dir, features, white)
    seconds |= {"train": trainer.seconds, "evaluate": time.perf_counter() - began}
    result |= {
        "seconds": seconds,
        "steps": trainer.step,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "peak_memory_mb": run.peak_memory_mb(device),
    }
    run.close(console, run_dir, result)
    return 0


def _describe(console: Console, trainer: Trainer, run_dir: Path) -> None:
    heads = ", ".join(f"{k} ({f.channels} channels)" for k, f in trainer.features.items()) or "none"
    parameters = sum(p.numel() for p in trainer.model.parameters())
    console.print(trainer.scene.about)
    console.print(f"features: {heads}; {parameters / 1e6:.1f} M parameters on {trainer.device}")
    console.print(f"run folder: {run_dir}", soft_wrap=True)
