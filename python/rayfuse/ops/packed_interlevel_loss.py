from __future__ import annotations

import torch
from torch import Tensor

from ..domain import csr, csr_env, nonnegative, positive
from ..op import op
from ..packed import PackedOp, PackedRays, upper_bound
from .interlevel_loss import uncovered
from .outer_bound import Outside

__all__ = ["packed_interlevel_loss"]


def bounds(
    t_starts: Tensor,
    t_ends: Tensor,
    ray: Tensor,
    t_env_starts: Tensor,
    t_env_ends: Tensor,
    w_env: Tensor,
    offsets_env: Tensor,
    outside: Outside,
) -> tuple[Tensor, Tensor, Tensor]:
    """[P] of each sample the first bin that bounds it, the one behind the last, their weight."""
    first, last = offsets_env[:-1][ray], offsets_env[1:][ray]
    if len(ray) == 0 or len(w_env) == 0:
        return first, first, torch.zeros_like(t_starts) + w_env.sum()
    begin = upper_bound(t_env_starts, first, last, t_starts) - 1
    end = upper_bound(t_env_ends, first, last, t_ends) + 1
    begin, end = torch.maximum(begin, first), torch.minimum(end, last)
    if outside != "clamp":
        before = t_env_starts[first.clamp(max=len(w_env) - 1)] > t_ends
        end = torch.where(before, first, end)
    if outside == "zero":
        behind = ~(t_env_ends[(last - 1).clamp(min=0)] > t_starts)
        begin = torch.where(behind, last, begin)
    # what is rounded off in float32 is no small part of a sample that weighs nothing
    until = PackedRays(offsets_env, len(w_env)).running_sum(w_env.double())
    w_outer = torch.where(end > first, until[(end - 1).clamp(min=0)], 0)
    w_outer = w_outer - torch.where(begin > first, until[(begin - 1).clamp(min=0)], 0)
    return begin, end, w_outer.to(w_env.dtype)


def slopes(
    t_starts: Tensor,
    t_ends: Tensor,
    w: Tensor,
    offsets: Tensor,
    t_env_starts: Tensor,
    t_env_ends: Tensor,
    w_env: Tensor,
    offsets_env: Tensor,
    *,
    outside: Outside = "clamp",
    eps: float = 1e-7,
) -> tuple[Tensor, Tensor]:
    """The gradients of each ray's loss to w and w_env: the bins are not searched again."""
    ray = PackedRays(offsets, len(w)).ray
    bins = t_env_starts, t_env_ends, w_env, offsets_env
    begin, end, w_outer = bounds(t_starts, t_ends, ray, *bins, outside)
    _, u = uncovered(w, w_outer, eps)
    n, last = offsets.diff()[ray], offsets_env[1:][ray]
    d_outer, steps = -2 * u / n, w_env.new_zeros(len(w_env) + 1)
    # what is behind its ray's last bin would be in the next ray
    steps.index_add_(0, begin, torch.where(begin < last, d_outer, 0))
    steps.index_add_(0, end, torch.where(end < last, -d_outer, 0))
    return u * (2 - u) / n, PackedRays(offsets_env, len(w_env)).running_sum(steps[:-1])


@op(
    "t_starts[P] t_ends[P] w[P] offsets[R+1] "
    "t_env_starts[Q] t_env_ends[Q] w_env[Q] offsets_env[R+1] -> loss[R] "
    "keeps slope[P] slope_env[Q]",
    domain=dict(w=nonnegative, offsets=csr, w_env=nonnegative, offsets_env=csr_env, eps=positive),
    constant=("t_starts", "t_ends", "t_env_starts", "t_env_ends"),
    keep=slopes,
    base=PackedOp,
)
def packed_interlevel_loss(
    t_starts: Tensor,
    t_ends: Tensor,
    w: Tensor,
    offsets: Tensor,
    t_env_starts: Tensor,
    t_env_ends: Tensor,
    w_env: Tensor,
    offsets_env: Tensor,
    *,
    outside: Outside = "clamp",
    eps: float = 1e-7,
) -> Tensor:
    """Weight that a proposal fails to cover along packed rays:
    mean_i max(0, w_i - w_outer_i)^2 / (w_i + eps).

    `interlevel_loss` for rays with any numbers of samples and bins, none included, and intervals
    that need not touch. w_outer_i is the weight of the bins from the last one that does not start
    beyond t_starts_i to the first one that ends beyond t_ends_i: of a sample in a gap between two
    bins both of them. A ray without bins has bounds of 0 (docs/interlevel.md).

    Args:
        t_starts: [P] where the samples' intervals begin, those of a ray in order.
        t_ends: [P] where they end, not after the next one begins.
        w: [P] weights of the samples; detach them to train the proposal alone.
        offsets: [R+1] int64: ray r has samples offsets[r] up to offsets[r + 1]. They rise from 0
            to P. On a GPU, where a look at them would synchronise, others give wrong values in
            silence unless in debug mode.
        t_env_starts: [Q] where the proposal's bins begin, likewise, in the unit of t_starts.
        t_env_ends: [Q] where they end.
        w_env: [Q] weights of the bins.
        offsets_env: [R+1] int64: ray r has bins offsets_env[r] up to offsets_env[r + 1].
        outside: the bins of a sample that lies before or behind all of them, as in `outer_bound`.
        eps: keeps the division by small weights finite.

    Returns:
        The loss: 0-d, or [R] with `reduction="none"`; exactly 0 for a ray without samples, which
        counts in the mean. It is the mean over the samples of each ray: for that over all samples
        weight the rays by `offsets.diff()`. float32 for half precision inputs. Differentiable in w
        and w_env, twice through the reference; piecewise constant in the intervals.

    Raises:
        ValueError: for shapes, devices, an `outside` or an `eps` that do not fit, and for offsets
            on the CPU that do not rise from 0 to the number of samples or bins.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ, and
            for offsets that are not int64.
        NotImplementedError: under vmap: concatenate the batch instead.

    Source:
        Barron et al., Mip-NeRF 360 (2022), eq. 13; the search as in nerfstudio's `outer`.

    Example:
        >>> import torch, rayfuse
        >>> offsets = torch.tensor([0, 2])
        >>> t, w = torch.tensor([0.0, 0.5]), torch.tensor([0.25, 0.5])
        >>> t_env, w_env = torch.tensor([0.0, 1.0]), torch.tensor([0.25, 0.25])
        >>> rayfuse.packed_interlevel_loss(
        ...     t, t + 0.4, w, offsets, t_env, t_env + 1.0, w_env, offsets
        ... )
        tensor(0.0625)
    """
    rays = PackedRays(offsets, len(w))
    bins = t_env_starts, t_env_ends, w_env, offsets_env
    _, _, w_outer = bounds(t_starts, t_ends, rays.ray, *bins, outside)
    rest, u = uncovered(w, w_outer, eps)
    return rays.total(rest * u) / offsets.diff().clamp(min=1)
