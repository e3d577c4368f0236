"""nerfacc.estimators.prop_net: samples where proposal networks say that something is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .... import ops
from ... import promoted
from ..data_specs import RayIntervals
from ..pdf import importance_sampling
from ..volrend import render_transmittance_from_density

__all__ = ["PropNetEstimator", "get_proposal_requires_grad_fn"]


class PropNetEstimator(nn.Module):
    """Samples along rays from the densities of proposal networks, and the networks' training.

    Args:
        optimizer: of the proposal networks' parameters.
        scheduler: of its learning rate.

    Source:
        Barron et al., Mip-NeRF 360 (2022); Li et al., NerfAcc (2023).

    Example:
        >>> import torch
        >>> from rayfuse.compat import nerfacc
        >>> def wall(t_starts, t_ends):
        ...     return torch.where(t_starts > 3, 1e4, 0.0)
        >>> sampling = nerfacc.PropNetEstimator().sampling
        >>> sampling([wall], [64], 4, n_rays=1, near_plane=1, far_plane=5, sampling_type="uniform")
        (tensor([[3.0625, 3.0781, 3.0938, 3.1094]]), tensor([[3.0781, 3.0938, 3.1094, 3.1250]]))
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> None:
        super().__init__()
        self.optimizer, self.scheduler = optimizer, scheduler
        self.prop_cache: list[tuple[RayIntervals, Tensor | None]] = []
        self.register_buffer("_dummy", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        return self._buffers["_dummy"].device  # type: ignore[union-attr]

    @torch.no_grad()
    def sampling(
        self,
        prop_sigma_fns: Sequence[Callable[[Tensor, Tensor], Tensor]],
        prop_samples: Sequence[int],
        num_samples: int,
        n_rays: int,
        near_plane: float,
        far_plane: float,
        sampling_type: Literal["uniform", "lindisp"] = "lindisp",
        stratified: bool = False,
        requires_grad: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Samples of rays, from one proposal network to the next.

        Args:
            prop_sigma_fns: of each network (t_starts, t_ends) [R, S] -> densities [R, S].
            prop_samples: how many samples each network gets.
            num_samples: how many samples to return.
            n_rays: R.
            near_plane, far_plane: where rays begin and end; numbers, or tensors [R, 1].
            sampling_type: even steps in distance, or in its reciprocal.
            stratified: see `importance_sampling`.
            requires_grad: keep what the networks' loss needs.

        Returns:
            t_starts, t_ends: [R, num_samples].
        """
        if len(prop_sigma_fns) != len(prop_samples):
            got = f"{len(prop_sigma_fns)} and {len(prop_samples)}"
            raise ValueError(f"prop_sigma_fns must be as many as prop_samples, got {got}")
        cdfs = torch.tensor([0.0, 1.0], device=self.device).repeat(n_rays, 1)
        intervals = RayIntervals(cdfs)
        for sigma_fn, samples in zip(prop_sigma_fns, prop_samples, strict=True):
            intervals, _ = importance_sampling(intervals, cdfs, samples, stratified)
            t = _distance(sampling_type, intervals.vals, near_plane, far_plane)
            t_starts, t_ends = t[:, :-1], t[:, 1:]
            with torch.set_grad_enabled(requires_grad):
                trans, _ = render_transmittance_from_density(
                    t_starts, t_ends, sigma_fn(t_starts, t_ends)
                )
                cdfs = _cdf(trans)
            if requires_grad:
                self.prop_cache.append((intervals, cdfs))
        intervals, _ = importance_sampling(intervals, cdfs, num_samples, stratified)
        if requires_grad:
            self.prop_cache.append((intervals, None))
        t = _distance(sampling_type, intervals.vals, near_plane, far_plane)
        return t[:, :-1], t[:, 1:]

    @torch.enable_grad()
    def compute_loss(self, trans: Tensor, loss_scaler: float = 1.0) -> Tensor:
        """What the proposal networks miss of the field's weights, in the last `sampling`.

        Args:
            trans: [R, S] the light that reaches the field's samples; it gets no gradient.
            loss_scaler: a factor.

        Returns:
            0-d: the sum over networks of the mean over samples.
        """
        if not self.prop_cache:
            return torch.zeros((), device=self.device)
        intervals, _ = self.prop_cache.pop()
        w = _cdf(trans.detach()).diff(dim=-1)
        loss = torch.zeros((), device=self.device)
        while self.prop_cache:
            proposed, cdfs = self.prop_cache.pop()
            assert cdfs is not None
            edges, weights = proposed.vals, cdfs.diff(dim=-1)
            args = promoted(intervals.vals, w, edges, weights)
            loss = loss + ops.interlevel_loss(*args, outside="below_zero")
        return loss * loss_scaler

    @torch.enable_grad()
    def update_every_n_steps(
        self, trans: Tensor, requires_grad: bool = False, loss_scaler: float = 1.0
    ) -> float:
        """A step of the optimizer, where the last `sampling` had requires_grad, and the scheduler.

        Args:
            trans, loss_scaler: see `compute_loss`.

        Returns:
            The loss, 0 without a step.
        """
        if requires_grad:
            return self._update(trans, loss_scaler)
        if self.scheduler is not None:
            self.scheduler.step()
        return 0.0

    @torch.enable_grad()
    def _update(self, trans: Tensor, loss_scaler: float = 1.0) -> float:
        if self.optimizer is None or not self.prop_cache:
            got = f"{self.optimizer} and {len(self.prop_cache)} levels"
            rule = "an optimizer, and sampling with requires_grad must come before"
            raise ValueError(f"the estimator must have {rule}, got {got}")
        loss = self.compute_loss(trans, loss_scaler)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return loss.item()


def get_proposal_requires_grad_fn(
    target: float = 5.0, num_steps: int = 1000
) -> Callable[[int], bool]:
    """In which steps to train proposal networks: all at first, later one in more than `target`.

    Args:
        target: the steps between two such steps, from step num_steps on; fewer before.
    """
    since = 0

    def requires_grad(step: int) -> bool:
        nonlocal since
        wanted = since > min(step / num_steps, 1.0) * target
        since = 1 if wanted else since + 1
        return wanted

    return requires_grad


def _cdf(trans: Tensor) -> Tensor:
    """1 - trans at the edges; what is left of the light ends in the last interval."""
    return 1 - torch.cat([trans, torch.zeros_like(trans[..., :1])], -1)


def _distance(sampling_type: str, s: Tensor, near: float | Tensor, far: float | Tensor) -> Tensor:
    if sampling_type == "uniform":
        return s * far + (1 - s) * near
    if sampling_type == "lindisp":
        return 1 / (s * (1 / far) + (1 - s) * (1 / near))
    raise ValueError(f"sampling_type must be 'uniform' or 'lindisp', got {sampling_type!r}")
