"""F3RM's renderer, losses and metrics, against its formulas."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from rayfuse.compat.f3rm import FeatureLosses, FeatureRenderer


class Nerfacto:
    """What F3RM's model derives from, as far as its losses go."""

    device = torch.device("cpu")

    def __init__(self, feature_type):
        self.kwargs = {"metadata": {"feature_type": feature_type}}
        self.config = SimpleNamespace(feat_loss_weight=1e-3)

    def get_metrics_dict(self, outputs, batch):
        return {"psnr": torch.tensor(20.0)}

    def get_loss_dict(self, outputs, batch, metrics_dict=None):
        return {"rgb_loss": torch.tensor(0.5)}


class Model(FeatureLosses, Nerfacto):
    pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_features_are_the_weighted_sum(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    w = torch.rand(2, 3, 8, 1, dtype=wide, requires_grad=True)
    f = torch.randn(2, 3, 8, 5).to(dtype).requires_grad_()
    ours, theirs = FeatureRenderer()(features=f, weights=w), (w * f).sum(-2)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)
    d = torch.randn_like(ours)
    torch.testing.assert_close(
        *[torch.autograd.grad(y, (w, f), d, retain_graph=True) for y in (ours, theirs)]
    )


@pytest.mark.parametrize(
    "kind, names", [("CLIP", ["feature"]), ("DINOCLIP", ["feature_dino", "feature_clip"])]
)
def test_losses_and_metrics_are_those_of_f3rm(kind, names):
    model = Model(kind)
    outputs = {name: torch.randn(6, 4, requires_grad=True) for name in names}
    batch = {name: torch.randn(6, 4) for name in names}
    metrics = model.get_metrics_dict(outputs, batch)
    assert metrics.keys() == {"psnr", *(f"{name}_error" for name in names)}
    for given in (metrics, None):
        losses = model.get_loss_dict(outputs, batch, given)
        assert losses.keys() == {"rgb_loss", *(f"{name}_loss" for name in names)}
        for name in names:
            error = F.mse_loss(outputs[name], batch[name])
            torch.testing.assert_close(metrics[f"{name}_error"], error)
            torch.testing.assert_close(losses[f"{name}_loss"], 1e-3 * error)
            (d,) = torch.autograd.grad(losses[f"{name}_loss"], outputs[name], retain_graph=True)
            torch.testing.assert_close(d, 2e-3 * (outputs[name] - batch[name]).detach() / 24)


def test_error_that_is_a_metric_is_not_computed_again():
    outputs = {"feature": torch.randn(6, 4)}
    losses = Model("CLIP").get_loss_dict(outputs, {}, {"feature_error": torch.tensor(2.0)})
    assert losses["feature_loss"].item() == pytest.approx(2e-3)
