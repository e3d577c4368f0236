"""The distortion loss of torch_efficient_distloss 0.1.3, for any device.

Gradients to `m` and `interval`, which the original leaves out, are given where they are wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from . import packed, promoted

__all__ = ["eff_distloss", "eff_distloss_native", "flatten_eff_distloss"]


def eff_distloss(w: Tensor, m: Tensor, interval: float | Tensor) -> Tensor:
    """Distortion loss of dense rays: sum_ij w_i w_j |m_i - m_j| + 1/3 sum_i w_i^2 dt_i.

    Args:
        w: [..., N] weights.
        m: [..., N] midpoints, not decreasing along a ray; any unit. [N] if rays share them.
        interval: width of the intervals in the unit of m, a number or anything that broadcasts with
            w. Intervals need not touch.

    Returns:
        The mean over rays, 0-d. Differentiable in w, m and interval, twice through the reference.

    Source:
        Sun et al., Improved direct voxel grid optimization (2022); torch_efficient_distloss.

    Example:
        >>> import torch
        >>> from rayfuse.compat.torch_efficient_distloss import eff_distloss
        >>> eff_distloss(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 3.0]]), 0.5)
        tensor(1.0833)
    """
    t_starts, t_ends = (torch.broadcast_to(t, w.shape) for t in _edges(m, interval))
    return ops.packed_distortion_loss(*packed(*promoted(t_starts, t_ends, w)))


eff_distloss_native = eff_distloss


def flatten_eff_distloss(w: Tensor, m: Tensor, interval: float | Tensor, ray_id: Tensor) -> Tensor:
    """`eff_distloss` of rays with any numbers of samples, which lie end to end.

    Args:
        w: [P] weights.
        m: [P] midpoints, not decreasing along a ray.
        interval: width of the intervals, a number or [P].
        ray_id: [P] int64, the ray of each sample, not decreasing.

    Returns:
        The sum over rays by `ray_id[-1] + 1`, 0-d: rays without samples count, but for those after
        the last one that has any. 0 if there are no samples.
    """
    rays = int(ray_id[-1]) + 1 if len(ray_id) else 0
    ids = torch.arange(rays + 1, device=ray_id.device)
    offsets = torch.searchsorted(ray_id.contiguous(), ids)
    t_starts, t_ends = (torch.broadcast_to(t, w.shape) for t in _edges(m, interval))
    return ops.packed_distortion_loss(*promoted(t_starts, t_ends, w), offsets)


def _edges(m: Tensor, interval: float | Tensor) -> tuple[Tensor, Tensor]:
    return m - interval / 2, m + interval / 2
