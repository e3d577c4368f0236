from __future__ import annotations

from torch import Tensor

from ..domain import increasing, nonnegative, positive
from ..op import op
from .outer_bound import Outside, bins_of_edges, outer_bound


def uncovered(w: Tensor, w_outer: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What of the samples is not covered, and its ratio to their weight; exactly 0 where all is."""
    rest = w - w_outer
    covered = rest <= 0
    rest = rest.masked_fill(covered, 0)
    return rest, rest / (w + eps).masked_fill(covered, 1)


def slopes(
    t: Tensor,
    w: Tensor,
    t_env: Tensor,
    w_env: Tensor,
    *,
    outside: Outside = "clamp",
    eps: float = 1e-7,
) -> tuple[Tensor, Tensor]:
    """The gradients of each ray's loss to w and w_env: the bins are not searched again."""
    S, E = w.shape[-1], w_env.shape[-1]
    _, u = uncovered(w, outer_bound.op.reference(t, t_env, w_env, outside=outside), eps)
    d_outer = -2 * u / max(S, 1)
    bins = bins_of_edges(t, t_env, outside)
    steps = d_outer.new_zeros(*w_env.shape[:-1], E + 3)
    steps.scatter_add_(-1, bins[..., :-1], d_outer)
    steps.scatter_add_(-1, bins[..., 1:] + 1, -d_outer)
    return u * (2 - u) / max(S, 1), steps.cumsum(-1)[..., 1:-2].contiguous()


@op(
    "t[..., S+1] w[..., S] t_env[..., E+1] w_env[..., E] -> loss[...] "
    "keeps slope[..., S] slope_env[..., E]",
    domain=dict(t=increasing, w=nonnegative, t_env=increasing, w_env=nonnegative, eps=positive),
    constant=("t", "t_env"),
    keep=slopes,
)
def interlevel_loss(
    t: Tensor,
    w: Tensor,
    t_env: Tensor,
    w_env: Tensor,
    *,
    outside: Outside = "clamp",
    eps: float = 1e-7,
) -> Tensor:
    """Weight that a proposal fails to cover: mean_i max(0, w_i - w_outer_i)^2 / (w_i + eps).

    w_outer is `outer_bound(t, t_env, w_env, outside=outside)`. The mean is over the S samples of a
    ray, so that the mean over rays is the mean over all samples, as in nerfstudio. Where a sample
    is covered its term is exactly 0, also where w + eps is 0 (docs/interlevel.md).

    Args:
        t: [..., S+1] edges of the samples along the ray, not decreasing; normalised distance in
            mip-NeRF 360.
        w: [..., S] weights of the samples; detach them to train the proposal alone.
        t_env: [..., E+1] edges of the proposal's bins, not decreasing, in the unit of t.
        w_env: [..., E] weights of the proposal's bins.
        outside: the bin of an edge of t that no bin contains, as in `outer_bound`.
        eps: keeps the division by small weights finite.

    Returns:
        The loss: 0-d, or [...] with `reduction="none"`; 0 for rays without samples. float32 for
        half precision inputs. Differentiable in w and w_env, twice through the reference;
        piecewise constant in the edges.

    Raises:
        ValueError: for shapes, devices, an `outside` or an `eps` that do not fit.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ.

    Source:
        Barron et al., Mip-NeRF 360 (2022), eq. 13.

    Example:
        >>> import torch, rayfuse
        >>> t_env, w_env = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.25, 0.25])
        >>> t, w = torch.tensor([0.0, 0.5, 0.9]), torch.tensor([0.25, 0.5])
        >>> rayfuse.interlevel_loss(t, w, t_env, w_env)
        tensor(0.0625)
    """
    w_outer = outer_bound.op.reference(t, t_env, w_env, outside=outside)
    rest, u = uncovered(w, w_outer, eps)
    return (rest * u).sum(-1) / max(w.shape[-1], 1)
