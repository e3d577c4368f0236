"""nerfacc's containers of values along rays: batched, or all rays end to end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RaySamples:
    """Values along rays.

    Args:
        vals: [..., S], or [P] with all rays end to end.
        packed_info: [R, 2] int64, where the values of each ray begin in [P], and how many it has.
        ray_indices: [P] int64, the ray of each value.
        is_valid: [P] bool, which values count.
    """

    vals: Tensor
    packed_info: Tensor | None = None
    ray_indices: Tensor | None = None
    is_valid: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.vals.device


@dataclass
class RayIntervals:
    """Edges of intervals along rays; those that touch share an edge.

    Args:
        vals: [..., S+1] where all intervals of a ray touch, or [Q] with all rays end to end.
        packed_info: [R, 2] int64, where the edges of each ray begin in [Q], and how many it has.
        ray_indices: [Q] int64, the ray of each edge.
        is_left, is_right: [Q] bool, whether an interval begins or ends at the edge.
    """

    vals: Tensor
    packed_info: Tensor | None = None
    ray_indices: Tensor | None = None
    is_left: Tensor | None = None
    is_right: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.vals.device
