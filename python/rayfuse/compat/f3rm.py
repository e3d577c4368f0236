"""The feature renderer, losses and metrics of F3RM, for one kind of features or two (DINOCLIP)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from . import weighted

__all__ = ["FeatureLosses", "FeatureRenderer"]


class FeatureRenderer(nn.Module):
    """Features [..., C] of rays: the weighted sum of those of samples, in half precision or not."""

    @classmethod
    def forward(cls, features: Tensor, weights: Tensor) -> Tensor:
        """Of features [..., S, C] and weights [..., S, 1]."""
        return ops.render_features(*weighted(weights[..., 0], features))


class FeatureLosses:
    """Adds F3RM's terms to a model: `class FeatureFieldModel(FeatureLosses, NerfactoModel)`.

    The model has `device`, `kwargs["metadata"]["feature_type"]` and `config.feat_loss_weight`.
    Outputs and batch hold `feature`; or, of type DINOCLIP, `feature_dino` and `feature_clip`. The
    errors among the metrics are computed once, and serve as the losses.
    """

    device: Any
    kwargs: dict[str, Any]
    config: Any

    def get_metrics_dict(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict:
        """The model's metrics, and `<feature>_error`: the mean squared error, with its graph."""
        metrics = super().get_metrics_dict(outputs, batch)  # type: ignore[misc]
        for name in self._names():
            metrics[f"{name}_error"] = self._error(name, outputs, batch)
        return metrics

    def get_loss_dict(
        self,
        outputs: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        metrics_dict: Mapping[str, Tensor] | None = None,
    ) -> dict:
        """The model's losses, and `<feature>_loss`: the error by `feat_loss_weight`."""
        losses = super().get_loss_dict(outputs, batch, metrics_dict)  # type: ignore[misc]
        metrics = metrics_dict or {}
        weight = self.config.feat_loss_weight
        for name in self._names():
            error = metrics.get(f"{name}_error")
            error = self._error(name, outputs, batch) if error is None else error
            losses[f"{name}_loss"] = weight * error
        return losses

    def _names(self) -> list[str]:
        two = self.kwargs["metadata"]["feature_type"] == "DINOCLIP"
        return ["feature_dino", "feature_clip"] if two else ["feature"]

    def _error(
        self, name: str, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> Tensor:
        return F.mse_loss(outputs[name], batch[name].to(self.device))
