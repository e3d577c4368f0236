from __future__ import annotations

from torch import Tensor

from ..domain import increasing, nonnegative
from ..op import op


@op("t[..., S+1] w[..., S] -> loss[...]", domain=dict(t=increasing, w=nonnegative))
def distortion_loss(t: Tensor, w: Tensor) -> Tensor:
    """Spread of the weights along each ray: sum_ij w_i w_j |m_i - m_j| + 1/3 sum_i w_i^2 dt_i.

    m are the midpoints and dt the widths of the intervals. O(S) in time and memory, without
    cancellation however far away t lies (docs/distortion.md).

    Args:
        t: [..., S+1] edges of the intervals along the ray, not decreasing; any unit (normalised
            distance in mip-NeRF 360).
        w: [..., S] weights of the intervals, dimensionless.

    Returns:
        The loss, in the unit of t: 0-d, or [...] with `reduction="none"`. float32 for half
        precision inputs. Differentiable in t and w, twice through the reference.

    Raises:
        ValueError: for shapes or devices that do not match.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ.

    Source:
        Barron et al., Mip-NeRF 360 (2022), eq. 15.

    Example:
        >>> import torch, rayfuse
        >>> t = torch.linspace(0, 1, 5)
        >>> rayfuse.distortion_loss(t, torch.tensor([0.0, 0.5, 0.5, 0.0]))
        tensor(0.1667)
    """
    # w_j sees every gap to its left: spread_j = sum_{i<j} w_i (m_j - m_i) = sum_{k<j} gap_k W_k
    # with W the running sum of w. All terms are >= 0, so nothing cancels.
    gap = (t[..., 2:] - t[..., :-2]) / 2
    spread = (gap * w[..., :-1].cumsum(-1)).cumsum(-1)
    inter = 2 * (w[..., 1:] * spread).sum(-1)
    intra = (w * w * t.diff(dim=-1)).sum(-1) / 3
    return inter + intra
