from __future__ import annotations

import torch
from torch import Tensor

from ..domain import increasing, nonnegative, positive
from ..op import op


@op(
    "t[..., S+1] w[..., S] t_env[..., E+1] w_env[..., E] -> loss[...]",
    domain=dict(
        t=increasing,
        w=nonnegative,
        t_env=increasing,
        w_env=nonnegative,
        pulse_width=positive,
        eps=positive,
    ),
    constant=("t", "w", "t_env"),
)
def zip_interlevel_loss(
    t: Tensor,
    w: Tensor,
    t_env: Tensor,
    w_env: Tensor,
    *,
    pulse_width: float,
    eps: float = 1e-5,
) -> Tensor:
    """Weight that a proposal lacks to a blurred target: mean_k max(0, w_blur_k - w_env_k)^2 /
    (w_env_k + eps).

    The weights of the final level, spread evenly over their intervals, are blurred by a box that
    reaches `pulse_width` to either side; w_blur_k is what then lies in bin k of the proposal.
    Unlike in `interlevel_loss`, moving an edge a little changes it a little. Samples of width 0
    count as points, the limit of narrow ones (docs/interlevel.md). The mean is over the E bins.

    Args:
        t: [..., S+1] edges of the final level's samples, not decreasing. Constant.
        w: [..., S] weights of the samples. Constant: it gets no gradient.
        t_env: [..., E+1] edges of the proposal's bins, not decreasing, in the unit of t. Constant.
        w_env: [..., E] weights of the proposal's bins.
        pulse_width: half the width of the box, in the unit of t; in Zip-NeRF 0.03 and 0.003 for the
            first and second proposal.
        eps: keeps the division by small weights finite.

    Returns:
        The loss: 0-d, or [...] with `reduction="none"`; 0 for rays without bins. float32 for half
        precision inputs. Differentiable in w_env, twice through the reference.

    Raises:
        ValueError: for shapes, devices, a `pulse_width` or an `eps` that do not fit.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ.

    Source:
        Barron et al., Zip-NeRF (2023), section 4.

    Example:
        >>> import torch, rayfuse
        >>> t, w = torch.tensor([1.0, 1.0]), torch.tensor([1.0])
        >>> t_env, w_env = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 0.25])
        >>> rayfuse.zip_interlevel_loss(t, w, t_env, w_env, pulse_width=0.1)
        tensor(0.1250)
    """
    with torch.no_grad():
        # in float64, as the blur is a small difference of large integrals
        w_blur = _blurred(t.double(), w.double(), t_env.double(), pulse_width).to(w_env.dtype)
    lacking = w_blur - w_env
    enough = lacking <= 0
    lacking = lacking.masked_fill(enough, 0)
    terms = lacking * lacking / (w_env + eps).masked_fill(enough, 1)
    return terms.sum(-1) / max(w_env.shape[-1], 1)


def _blurred(t: Tensor, w: Tensor, t_env: Tensor, pulse_width: float) -> Tensor:
    """The blurred weight in each bin: [..., E]."""
    pad = torch.nn.functional.pad
    # the weight before each edge, and its integral up to there; both are continuous where a sample
    # has a width, and where it has none only the first one jumps
    width = t.diff(dim=-1)
    before = pad(w.cumsum(-1), (1, 0))
    integral = pad(((before[..., :-1] + w / 2) * width).cumsum(-1), (1, 0))
    density = pad(torch.where(width > 0, w / width, 0), (0, 1))

    def integral_until(x: Tensor) -> Tensor:
        last = torch.searchsorted(t.contiguous(), x.contiguous(), right=True)
        last = last.sub(1).clamp(min=0)
        beyond = (x - t.gather(-1, last)).clamp(min=0)
        slope = before.gather(-1, last) + density.gather(-1, last) * beyond / 2
        return integral.gather(-1, last) + slope * beyond

    blurred = integral_until(t_env + pulse_width) - integral_until(t_env - pulse_width)
    return blurred.diff(dim=-1) / (2 * pulse_width)
