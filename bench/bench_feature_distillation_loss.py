"""feature_distillation_loss beside what people use: the MSE of f3rm's rendering, and that of a
batched matrix product."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import harness
import peers
import rayfuse
from bench_render_features import FEATURE_WORKLOADS, matrix_product, product_and_sum


def mse(w: Tensor, f: Tensor, target: Tensor) -> Tensor:
    """As f3rm has it."""
    return F.mse_loss(product_and_sum(w, f), target)


def mse_of_matrix_product(w: Tensor, f: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(matrix_product(w, f), target)


class BenchFeatureDistillationLoss(harness.Bench):
    op = staticmethod(rayfuse.feature_distillation_loss)
    workloads = FEATURE_WORKLOADS
    gpu_times = 4
    directions = ((), ("w", "f"))
    read_again = ("w",)
    # the mean of one number is that number
    peers = (
        peers.eager("f3rm", mse),
        peers.eager("einsum", mse_of_matrix_product),
        peers.compiled("f3rm", mse),
    )
    growth = ("C", (3, 16, 64, 256), (4096,), ("eager f3rm", "eager einsum", "compile f3rm"))
    bound, goal = 1.6, 1.15
    page = "features"
