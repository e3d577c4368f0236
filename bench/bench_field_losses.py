"""field_objective beside the objective as F3RM on nerfacto computes it, at nerfacto's sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
import peers
import rayfuse
from bench_composite_rays import renderers
from bench_distortion_loss import all_pairs
from bench_interlevel_loss import as_nerfstudio as interlevel
from bench_render_features import product_and_sum
from harness import Workload

# nerfacto's and F3RM's weights of the terms
MULTIPLIERS = dict(
    rgb_loss=1.0,
    feature_loss=1e-3,
    orientation_loss=1e-4,
    predicted_normal_loss=1e-3,
    distortion_loss=0.002,
    interlevel_loss=1.0,
)


def arguments(
    sigma: Tensor,
    t: Tensor,
    rgb: Tensor,
    rgb_target: Tensor,
    features: Tensor,
    features_target: Tensor,
    n: Tensor,
    d: Tensor,
    n_pred: Tensor,
    s: Tensor,
    *levels: Tensor,
) -> dict[str, Any]:
    """Those of `field_losses`; levels are s_env and w_env in turn."""
    return dict(
        sigma=sigma,
        t=t,
        rgb=rgb,
        rgb_target=rgb_target,
        features=features,
        features_target=features_target,
        n=n,
        d=d,
        n_pred=n_pred,
        s=s,
        proposals=[*zip(levels[::2], levels[1::2], strict=True)],
    )


def total(*inputs: Tensor) -> Tensor:
    """Ours."""
    return rayfuse.field_objective(MULTIPLIERS, **arguments(*inputs))[0]


def sum_of_losses(*inputs: Tensor) -> Tensor:
    """The same, weighted and added up outside."""
    losses = rayfuse.field_losses(**arguments(*inputs))
    return sum(x * getattr(losses, name) for name, x in MULTIPLIERS.items())


def as_f3rm(
    sigma: Tensor,
    t: Tensor,
    rgb: Tensor,
    rgb_target: Tensor,
    features: Tensor,
    features_target: Tensor,
    n: Tensor,
    d: Tensor,
    n_pred: Tensor,
    s: Tensor,
    *levels: Tensor,
) -> Tensor:
    """`NerfactoModel.get_loss_dict` with F3RM's term, and what it renders for it."""
    x = sigma * t.diff(dim=-1)
    before = torch.cat([x.new_zeros((*x.shape[:-1], 1)), x[..., :-1].cumsum(-1)], -1)
    w = torch.nan_to_num((1 - torch.exp(-x)) * torch.exp(-before))
    image, _, _ = renderers(t, w, rgb, rgb.new_zeros(3))
    fixed = w.detach()
    towards = (n * -d[..., None, :]).sum(-1)
    losses = (
        F.mse_loss(image, rgb_target),
        F.mse_loss(product_and_sum(w, features), features_target),
        (fixed * torch.fmin(torch.zeros_like(towards), towards) ** 2).sum(-1).mean(),
        (fixed * (1 - (n.detach() * n_pred).sum(-1))).sum(-1).mean(),
        all_pairs(s, w).mean(),
        sum(
            interlevel(s, fixed, *level).mean()
            for level in zip(levels[::2], levels[1::2], strict=True)
        ),
    )
    return sum(x * loss for x, loss in zip(MULTIPLIERS.values(), losses, strict=True))


class BenchFieldLosses(harness.Bench):
    op = staticmethod(rayfuse.field_losses)
    workloads = (
        Workload((4096,), dict(S=48, C=64, E=256, F=96)),
        Workload((1024,), dict(S=48, C=64, E=256, F=96)),
    )
    gpu_times = 4
    # normals are derivatives of the density, and carry no graph in nerfstudio
    directions = ((), ("sigma", "rgb", "features", "n_pred", "w_env_0", "w_env_1"))
    peers = (
        peers.ours(sum_of_losses, "sum of field_losses"),
        peers.eager("", as_f3rm),
        peers.compiled("", as_f3rm),
    )
    page = "objective"
    growth = test_growth = test_call_overhead = None

    @property
    def stem(self) -> str:
        return "field_losses"

    def inputs(self, workload: Workload) -> dict[str, Tensor]:
        R, (S, C, *bins) = workload.leading, workload.sizes.values()

        def sample(op: Any, seed: int = 0, **sizes: int) -> list[Tensor]:
            return [x.to(peers.device) for x in op.op.sample(R, workload.dtype, seed, **sizes)]

        sigma, t = sample(rayfuse.ray_weights, S=S)
        _, rgb, rgb_target = sample(rayfuse.feature_distillation_loss, S=S, C=3)
        _, features, features_target = sample(rayfuse.feature_distillation_loss, S=S, C=C)
        _, n, n_pred, d = (F.normalize(x, dim=-1) for x in sample(rayfuse.normal_losses, S=S))
        s, _ = sample(rayfuse.distortion_loss, S=S)
        named = dict(
            sigma=sigma,
            t=t,
            rgb=rgb,
            rgb_target=rgb_target,
            features=features,
            features_target=features_target,
            n=n,
            d=d,
            n_pred=n_pred,
            s=s,
        )
        for i, E in enumerate(bins):
            _, _, s_env, w_env = sample(rayfuse.interlevel_loss, i, S=S, E=E)
            # of a level that covers about half of the weight
            named |= {f"s_env_{i}": s_env, f"w_env_{i}": w_env / E}
        return named

    def d_outputs(self, workload: Workload) -> None:
        return None

    def closed(self, function: Any, **options: Any) -> Any:
        return total

    def bytes_moved(self, workload: Workload, wants: Sequence[str]) -> int:
        """Everything read once, gradients written, and what lies between on chip."""
        inputs = {name: x.nbytes for name, x in self.inputs(workload).items()}
        return sum(inputs.values()) + sum(inputs[name] for name in wants)

    def truth(
        self,
        inputs: dict[str, Tensor],
        wants: Sequence[str],
        d_outputs: Sequence[Tensor] | None,
        dtype: torch.dtype | None,
    ) -> Any:
        cast = {name: x.to(dtype) if dtype else x for name, x in inputs.items()}
        return peers.ours(total, backend="ref").prepare(cast, wants)()
