"""`rayfuse splat`: Gaussians in training, and the whole run around them."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from typing import Any

import torch
from gsplat.strategy import DefaultStrategy, MCMCStrategy
from pytorch_msssim import ssim
from rich.console import Console
from torch import Tensor

from rayfuse.compat import gsplat as compat_gsplat
from rayfuse.splat import cameras as scene_cameras
from rayfuse.splat.config import PRESETS, SplatConfig, check
from rayfuse.splat.gaussians import Gaussians, from_points, read_start, write_ply
from rayfuse.train import run
from rayfuse.train.evaluate import View, evaluate, psnr
from rayfuse.train.options import to_json
from rayfuse.train.run import Terms
from rayfuse.train.scene import Scene, load_scene

FORMAT = "rayfuse.splat/1"
WINDOW = 11  # of the SSIM, in pixels
NAMES = [f.name for f in fields(Gaussians)]


class Trainer:
    """Gaussians in training: everything that a checkpoint holds.

    Args:
        scene: with photographs of pinhole cameras (`cameras.undistorted`).
    """

    def __init__(self, config: SplatConfig, scene: Scene) -> None:
        self.config, self.scene = config, scene
        self.device = torch.device(config.device)
        self.cameras = scene_cameras.cameras(scene)
        self.views = scene.train_views
        # strategies draw from torch's own generator
        torch.manual_seed(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        self._own(self._first())
        self.strategy = _strategy(config)
        self.strategy_state: dict[str, Any] = {}
        if self.strategy is not None:
            # its kernels may be missing where ours are not
            compat_gsplat.install()
            self.strategy_state = self.strategy.initialize_state()
        self.step = 0
        self.seconds = 0.0

    @property
    def gaussians(self) -> Gaussians:
        return Gaussians(**self.parameters)

    @property
    def lr(self) -> dict[str, float]:
        return {name: o.param_groups[0]["lr"] for name, o in self.optimisers.items()}

    def train_step(self) -> Terms:
        """One step on one photograph; returns the step's terms."""
        config, strategy = self.config, self.strategy
        self._set_rates()
        view = self.views[int(torch.randint(len(self.views), (), generator=self.generator))]
        background = torch.full((3,), float(config.background == "white"))
        if config.background == "random":
            background = torch.rand(3, generator=self.generator)
        background = background.to(self.device)
        degree = min(config.sh_degree, self.step // config.sh_every)
        with torch.profiler.record_function("part:picture"):
            picture = self.gaussians.picture(self.cameras[view], background, degree)
        with torch.profiler.record_function("part:loss"):
            terms = self._terms(picture.rgb, self._target(view, background, picture.rgb))
        if isinstance(strategy, DefaultStrategy):
            picture.info["means2d"].retain_grad()
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        terms.total.backward()
        with torch.profiler.record_function("part:optimiser"):
            for optimiser in self.optimisers.values():
                optimiser.step()
        with torch.profiler.record_function("part:densification"):
            if strategy is not None:
                more = {} if isinstance(strategy, DefaultStrategy) else {"lr": self.lr["means"]}
                strategy.step_post_backward(
                    self.parameters,
                    self.optimisers,
                    self.strategy_state,
                    self.step,
                    picture.info,
                    **more,
                )
        self.step += 1
        return terms

    def state(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "config": to_json(self.config),
            "scene": self.scene.fingerprint,
            "step": self.step,
            "seconds": self.seconds,
            "gaussians": {name: p.detach() for name, p in self.parameters.items()},
            "optimisers": {name: o.state_dict() for name, o in self.optimisers.items()},
            "strategy": self.strategy_state,
            "generator": self.generator.get_state(),
            "torch_generator": torch.get_rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continues from `state`, bit for bit as if the run had not stopped."""
        self.scene.check_fingerprint(state["scene"])
        self._own(Gaussians(**state["gaussians"]))
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        self.strategy_state = {
            key: x.to(self.device) if isinstance(x, Tensor) else x
            for key, x in state["strategy"].items()
        }
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_generator"])
        self.step, self.seconds = state["step"], state["seconds"]

    @torch.no_grad()
    def render(self, view: int) -> View:
        """The whole frame of a photograph, as evaluation wants it."""
        white = torch.full((3,), float(self.config.background == "white"), device=self.device)
        picture = self.gaussians.picture(self.cameras[view], white)
        plane = self.scene.plane[self.scene.camera[view]]
        along_ray = (plane.square().sum(-1) + 1).sqrt()
        return View(
            rgb=picture.rgb.clamp(0, 1),
            accumulation=picture.alpha[..., None],
            depth=(picture.depth * along_ray)[..., None],
        )

    def _first(self) -> Gaussians:
        config = self.config
        if config.points is not None:
            return read_start(config.points, config.sh_degree)
        made = scene_cameras.starting_points(self.scene, config.first, self.generator)
        return from_points(*made, config.sh_degree)

    def _own(self, gaussians: Gaussians) -> None:
        self.parameters = {
            name: torch.nn.Parameter(getattr(gaussians, name).to(self.device)) for name in NAMES
        }
        self.optimisers = {
            name: torch.optim.Adam([p], lr=1.0, eps=1e-15, fused=True)
            for name, p in self.parameters.items()
        }

    def _set_rates(self) -> None:
        rates = self.config.rates
        done = min(self.step / self.config.steps, 1.0)
        for name, optimiser in self.optimisers.items():
            share = rates.final_share if name == "means" else rates.final_share_others
            optimiser.param_groups[0]["lr"] = getattr(rates, name) * share**done

    def _target(self, view: int, background: Tensor, rendered: Tensor) -> Tensor:
        """The photograph; what is held out of it is no different from the render."""
        photo = self.scene.rgb[view]
        if self.scene.alpha is not None:
            photo = photo + (1 - self.scene.alpha[view])[..., None] * background
        if self.scene.split == "views":
            return photo
        return torch.where(self.scene.held_out[view][..., None], rendered.detach(), photo)

    def _terms(self, rgb: Tensor, target: Tensor) -> Terms:
        terms, config = Terms(), self.config

        def add(name: str, weight: float, loss: Tensor) -> None:
            if weight:
                terms.losses[name], terms.weights[name] = loss, weight

        share = config.ssim_weight if min(rgb.shape[:2]) >= WINDOW else 0.0
        add("l1", 1 - share, (rgb - target).abs().mean())
        if share:
            a, b = (image.permute(2, 0, 1)[None] for image in (rgb, target))
            add("dssim", share, 1 - ssim(a, b, data_range=1.0, win_size=WINDOW))
        if isinstance(self.strategy, MCMCStrategy):
            densify = config.densify
            add("opacity", densify.opacity_weight, self.parameters["opacities"].sigmoid().mean())
            add("scale", densify.scale_weight, self.parameters["scales"].exp().mean())
        mse = (rgb.detach() - target).square().mean()
        terms.metrics["psnr"] = rgb.new_tensor(psnr(mse.item()))
        terms.metrics["gaussians"] = torch.tensor(float(len(self.parameters["means"])))
        return terms


def _strategy(config: SplatConfig) -> DefaultStrategy | MCMCStrategy | None:
    densify = config.densify
    start, stop = (int(config.steps * share) for share in (densify.start, densify.stop))
    when: dict[str, Any] = dict(
        refine_start_iter=start, refine_stop_iter=stop, refine_every=densify.every
    )
    if densify.strategy == "mcmc":
        return MCMCStrategy(cap_max=densify.most, noise_lr=densify.noise, **when)
    if densify.strategy == "default":
        return DefaultStrategy(grow_grad2d=densify.grow_gradient, **when)
    return None


def splat(config: SplatConfig, console: Console | None = None) -> int:
    """Trains, exports, evaluates and reports; returns the exit code (130 after Ctrl-C)."""
    console = console or Console()
    state = None
    if config.resume is not None:
        config, state = run.resumed_config(config, PRESETS[config.preset][1], FORMAT)
    else:
        # a resumed run must find them from anywhere
        if config.scene is not None:
            config = replace(config, scene=config.scene.resolve())
        if config.points is not None:
            config = replace(config, points=config.points.resolve())
    check(config)
    device = run.find_device(config.device)

    began = time.perf_counter()
    scene = scene_cameras.undistorted(load_scene(config.scene, config.downscale))
    run_dir = config.resume or run.new_folder(config.output, scene.name)
    seconds = {"load": time.perf_counter() - began}
    scene.to(device)
    trainer = Trainer(config, scene)
    if state is not None:
        trainer.load(state)
        state = None
    count = len(trainer.parameters["means"])
    console.print(scene.about)
    console.print(f"{count:,} Gaussians on {device}")
    console.print(f"run folder: {run_dir}", soft_wrap=True)

    run.open_folder(run_dir, config, trainer.step)
    if not run.train_to_end(trainer, run_dir, console, "rayfuse splat"):
        return 130
    exported = run_dir / "splats.ply"
    write_ply(exported, trainer.gaussians)
    scene_cameras.write_cameras(run_dir / "cameras.json", scene.names, trainer.cameras)

    began = time.perf_counter()
    with console.status("Rendering what was held out"):
        result = evaluate(trainer.render, scene, run_dir, {}, config.background == "white")
    seconds |= {"train": trainer.seconds, "evaluate": time.perf_counter() - began}
    result |= {
        "seconds": seconds,
        "steps": trainer.step,
        "parameters": sum(p.numel() for p in trainer.parameters.values()),
        "gaussians": len(trainer.parameters["means"]),
        "peak_memory_mb": run.peak_memory_mb(device),
    }
    run.close(console, run_dir, result)
    console.print(
        f"Gaussians: {exported}; to look at them: rayfuse view {exported}", soft_wrap=True
    )
    return 0
