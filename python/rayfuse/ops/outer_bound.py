from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..domain import increasing, nonnegative
from ..op import op

Outside = Literal["clamp", "zero", "below_zero"]


@op(
    "t[..., S+1] t_env[..., E+1] w_env[..., E] -> w_outer[..., S]",
    domain=dict(t=increasing, t_env=increasing, w_env=nonnegative),
    constant=("t", "t_env"),
)
def outer_bound(t: Tensor, t_env: Tensor, w_env: Tensor, *, outside: Outside = "clamp") -> Tensor:
    """Weight of all envelope bins that an interval touches: the most it may weigh itself.

    w_outer_i = sum_k w_env_k over the bins from that of edge t_i to that of edge t_{i+1}, where an
    edge lies in the last bin that does not start beyond it, to the bit as
    `torch.searchsorted(t_env, t, right=True)` has it, coincident edges included. A NaN edge of t
    lies beyond all others (docs/interlevel.md).

    Args:
        t: [..., S+1] edges of the intervals along the ray, not decreasing.
        t_env: [..., E+1] edges of the envelope's bins, not decreasing, in the unit of t.
        w_env: [..., E] weights of the bins.
        outside: the bin of an edge that no bin contains. `"clamp"`: the first or last one
            (nerfstudio). `"zero"`: none (multinerf). `"below_zero"`: none before the first, the
            last one behind it (nerfacc).

    Returns:
        [..., S] the bounds. float32 for half precision inputs. Differentiable in w_env; piecewise
        constant in the edges.

    Raises:
        ValueError: for shapes, devices or an `outside` that do not fit.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ.

    Source:
        Barron et al., Mip-NeRF 360 (2022), eq. 12.

    Example:
        >>> import torch, rayfuse
        >>> t_env = torch.tensor([0.0, 1.0, 2.0, 3.0])
        >>> w_env = torch.tensor([0.5, 0.25, 0.125])
        >>> rayfuse.outer_bound(torch.tensor([0.2, 0.8, 1.5, 2.5]), t_env, w_env)
        tensor([0.5000, 0.7500, 0.3750])
    """
    # a bin without weight on either side holds the edges that are outside
    until = torch.nn.functional.pad(w_env, (2, 1)).cumsum(-1)
    bins = bins_of_edges(t, t_env, outside)
    return until.gather(-1, bins[..., 1:] + 1) - until.gather(-1, bins[..., :-1])


def bins_of_edges(t: Tensor, t_env: Tensor, outside: Outside) -> Tensor:
    """[..., S+1] the bin of each edge, counted from 1: 0 and E + 1 are what lies outside."""
    E = t_env.shape[-1] - 1
    first, last = {"clamp": (1, E), "zero": (0, E + 1), "below_zero": (0, E)}[outside]
    edges, env_edges = t.detach().contiguous(), t_env.detach().contiguous()
    bins = torch.searchsorted(env_edges, edges, right=True)
    return bins.clamp(max=last).clamp(min=first)
