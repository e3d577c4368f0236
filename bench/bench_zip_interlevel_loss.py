"""zip_interlevel_loss beside the published form, at the sizes of Zip-NeRF and nerfacto."""

from __future__ import annotations

import torch
from torch import Tensor

import harness
import peers
import rayfuse
from harness import Workload

PULSE_WIDTH = 0.03


def published(t: Tensor, w: Tensor, t_env: Tensor, w_env: Tensor) -> Tensor:
    """The loss of each ray by a sort, running sums of slopes and densities, and interpolation."""
    r, zero = PULSE_WIDTH, torch.zeros_like(t[..., :1])
    density = torch.cat([zero, w / t.diff(dim=-1), zero], -1)
    steps = density.diff(dim=-1) / (2 * r)
    ends, order = torch.cat([t - r, t + r], -1).sort(-1)
    slope = torch.cat([steps, -steps], -1).gather(-1, order).cumsum(-1)[..., :-1]
    width = ends.diff(dim=-1)
    blurred = torch.cat([zero, (slope * width).cumsum(-1)], -1)
    until = (blurred[..., 1:] + blurred[..., :-1]) / 2 * width
    until = torch.cat([zero, until.cumsum(-1)], -1)
    k = (torch.searchsorted(ends, t_env.contiguous(), right=True) - 1).clamp(0, width.shape[-1] - 1)
    d = (torch.minimum(t_env, ends[..., -1:]) - ends.gather(-1, k)).clamp(min=0)
    cdf = until.gather(-1, k) + d * (blurred.gather(-1, k) + d / 2 * slope.gather(-1, k))
    return ((cdf.diff(dim=-1) - w_env).clamp(min=0) ** 2 / (w_env + 1e-5)).mean(-1)


class BenchZipInterlevelLoss(harness.Bench):
    op = staticmethod(rayfuse.zip_interlevel_loss)
    options = {"pulse_width": PULSE_WIDTH}
    workloads = (
        Workload((4096,), dict(S=48, E=256)),
        Workload((65536,), dict(S=32, E=64)),
        Workload((65536,), dict(S=48, E=96)),
    )
    directions = ((), ("w_env",))
    peers = (peers.eager("published", published), peers.compiled("published", published))
    growth = ("E", (64, 256, 1024, 4096), (4096,), ("eager published",))
    bound, goal = 2.5, 1.5
    page = "interlevel"
