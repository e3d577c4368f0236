"""A training step of gsplat 1.5.3 on rayfuse, by part: python bench/gsplat_step.py SCENE.npz

SCENE.npz is gsplat's test_garden.npz, or another with means3d, colors, viewmats, Ks, width, height.
Times are of the processor, all threads together, least of some turns: on one thread they are those
of the clock on a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rayfuse.compat import gsplat as compat

PARTS = (
    "fully_fused_projection",
    "spherical_harmonics",
    "isect_tiles",
    "isect_offset_encode",
    "rasterize_to_pixels",
)


def scene(path: str) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    """Gaussians as gsplat's own profile draws them, and one camera."""
    torch.manual_seed(0)
    data = np.load(path)
    means, colors = (torch.from_numpy(data[x]).float() for x in ("means3d", "colors"))
    near = (means.abs() <= 2).all(-1)
    means, colors = means[near], colors[near] / 255
    N = len(means)
    harmonics = torch.zeros(N, 16, 3)
    harmonics[:, 0] = (colors - 0.5) * (4 * torch.pi) ** 0.5
    gaussians = dict(
        means=means,
        quats=F.normalize(torch.randn(N, 4), dim=-1),
        scales=torch.rand(N, 3) * 0.02,
        opacities=torch.rand(N),
        colors=harmonics,
    )
    camera = [torch.from_numpy(data[x]).float()[:1] for x in ("viewmats", "Ks")]
    return gaussians, (*camera, int(data["width"]), int(data["height"]))


def least(call: Callable[[], Any], turns: int) -> float:
    def once() -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    return 1e3 * min(once() for _ in range(turns + 1))


class Recorder:
    """The arguments of the last call."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, *args: Any, **named: Any) -> Any:
        # a leaf of its own where there is a gradient
        self.args, self.named = ([*args], dict(named))
        for of in (self.args, self.named):
            for key, x in [*(enumerate(of) if isinstance(of, list) else of.items())]:
                if isinstance(x, Tensor) and x.requires_grad:
                    of[key] = x.detach().requires_grad_()
        return self.function(*args, **named)

    def leaves(self) -> list[Tensor]:
        given = (*self.args, *self.named.values())
        return [x for x in given if isinstance(x, Tensor) and x.requires_grad]

    def times(self, function: Callable, turns: int) -> tuple[float, float | None]:
        """Forward, and backward where there is one."""
        forward = least(lambda: function(*self.args, **self.named), turns)
        outputs = function(*self.args, **self.named)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [y for y in outputs if isinstance(y, Tensor) and y.requires_grad]
        if not outputs:
            return forward, None
        d, leaves = [torch.ones_like(y) for y in outputs], self.leaves()
        backward = least(
            lambda: torch.autograd.grad(outputs, leaves, d, retain_graph=True, allow_unused=True),
            turns,
        )
        return forward, backward


def as_gsplat(part: str, torch_impl: Any) -> Callable | None:
    """Its own PyTorch, of the parts whose loops end within a minute."""
    if part == "fully_fused_projection":

        def project(means, covars, quats, scales, viewmats, Ks, width, height, **named):  # type: ignore[no-untyped-def]
            covars, _ = torch_impl._quat_scale_to_covar_preci(quats, scales, compute_preci=False)
            kept = {name: named[name] for name in ("eps2d", "near_plane", "far_plane")}
            return torch_impl._fully_fused_projection(
                means, covars, viewmats, Ks, width, height, **kept
            )

        return project
    if part == "spherical_harmonics":
        return lambda degree, dirs, coeffs, masks: torch_impl._spherical_harmonics(
            degree, dirs, coeffs
        )
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scene")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--packed", action="store_true")
    options = parser.parse_args()
    compat.install()
    import gsplat
    from gsplat.cuda import _torch_impl as torch_impl

    gaussians, camera = scene(options.scene)
    leaves = [x.requires_grad_() for x in gaussians.values()]
    recorders = {part: Recorder(getattr(gsplat.rendering, part)) for part in PARTS}
    for part, recorder in recorders.items():
        setattr(gsplat.rendering, part, recorder)

    def render() -> Any:
        return gsplat.rasterization(
            *gaussians.values(), *camera, sh_degree=3, packed=options.packed
        )

    _, _, info = render()
    rows = {}
    for part, recorder in recorders.items():
        theirs = None if options.packed else as_gsplat(part, torch_impl)
        ours = recorder.times(recorder.function, options.turns)
        rows[part] = ours, theirs and recorder.times(theirs, 3)
    target = torch.rand(1, camera[3], camera[2], 3)
    optimizer = torch.optim.Adam(leaves, lr=1e-5)

    def step() -> None:
        F.l1_loss(render()[0], target).backward()
        optimizer.step()
        optimizer.zero_grad()

    whole = least(step, options.turns)
    seen = int((info["radii"] > 0).all(-1).sum())
    width, height = camera[2:]
    threads = torch.get_num_threads()
    print(f"{len(leaves[0])} Gaussians, {seen} seen, {len(info['flatten_ids'])} in lists,", end=" ")
    print(f"{width} x {height}, {threads} thread(s); ms: forward + backward, gsplat's PyTorch")
    for part, (ours, theirs) in rows.items():
        print(f"{part:24}", *(_figures(x) for x in (ours, theirs)), sep="  ")
    print(f"{'the whole step':24}  {whole:16.0f}")


def _figures(times: tuple[float, float | None] | None) -> str:
    if times is None:
        return f"{'—':>16}"
    return f"{times[0]:7.1f}" + (f" +{times[1]:7.1f}" if times[1] is not None else " " * 9)


if __name__ == "__main__":
    main()
