"""packed_feature_distillation_loss beside what people use: the MSE of nerfacc's rendering."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import harness
import peers
import rayfuse
from bench_packed_render_features import PACKED_FEATURE_WORKLOADS, accumulate


def mse(w: Tensor, f: Tensor, target: Tensor, offsets: Tensor) -> Tensor:
    return F.mse_loss(accumulate(w, f, offsets), target)


class BenchPackedFeatureDistillationLoss(harness.PackedBench):
    op = staticmethod(rayfuse.packed_feature_distillation_loss)
    workloads = PACKED_FEATURE_WORKLOADS
    gpu_times = 4
    directions = ((), ("w", "f"))
    read_again = ("w", "offsets")
    # the mean of one number is that number
    peers = (peers.eager("nerfacc", mse), peers.compiled("nerfacc", mse))
    growth = ("P", (16, 64, 256), (4096,), ("eager nerfacc",))
    page = "features"
