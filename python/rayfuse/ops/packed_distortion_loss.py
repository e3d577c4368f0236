from __future__ import annotations

from torch import Tensor

from ..domain import csr, nonnegative
from ..op import op
from ..packed import PackedOp, PackedRays

__all__ = ["packed_distortion_loss"]


@op(
    "t_starts[P] t_ends[P] w[P] offsets[R+1] -> loss[R]",
    domain=dict(w=nonnegative, offsets=csr),
    base=PackedOp,
)
def packed_distortion_loss(t_starts: Tensor, t_ends: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Spread of the weights along packed rays: sum_ij w_i w_j |m_i - m_j| + 1/3 sum_i w_i^2 dt_i.

    m are the midpoints and dt the widths of the intervals. `distortion_loss` for rays with any
    numbers of samples, empty rays included, and intervals that need not touch: O(P) in time and
    memory, without cancellation however far away t lies (docs/distortion.md).

    Args:
        t_starts: [P] where the intervals begin, those of a ray in order; any unit.
        t_ends: [P] where they end, not after the next one begins.
        w: [P] weights of the intervals, dimensionless.
        offsets: [R+1] int64: ray r has samples offsets[r] up to offsets[r + 1]. They rise from 0
            to P. On a GPU, where a look at them would synchronise, others give wrong values in
            silence unless in debug mode.

    Returns:
        The loss, in the unit of t: 0-d, or [R] with `reduction="none"`; exactly 0 for an empty ray,
        which counts in the mean. float32 for half precision inputs. Differentiable in t_starts,
        t_ends and w, twice through the reference.

    Raises:
        ValueError: for shapes or devices that do not match, and for offsets on the CPU that do not
            rise from 0 to P.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ, and
            for offsets that are not int64.
        NotImplementedError: under vmap: concatenate the batch instead.

    Source:
        Barron et al., Mip-NeRF 360 (2022), eq. 15.

    Example:
        >>> import torch, rayfuse
        >>> t = torch.tensor([0.0, 0.5, 0.0])
        >>> offsets = torch.tensor([0, 2, 2, 3])
        >>> rayfuse.packed_distortion_loss(t, t + 0.5, torch.ones(3), offsets, reduction="none")
        tensor([1.3333, 0.0000, 0.1667])
    """
    rays = PackedRays(offsets, len(w))
    # the gap form of distortion_loss, with 0 for a ray's first sample
    gap = (t_starts - rays.before(t_starts, t_starts)) + (t_ends - rays.before(t_ends, t_ends))
    left = rays.before(rays.running_sum(w), 0.0)
    spread = rays.running_sum(gap * left)
    return rays.total(w * (spread + w * (t_ends - t_starts) / 3))
