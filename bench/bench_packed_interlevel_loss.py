"""packed_interlevel_loss beside the same formula in PyTorch, with one search for all samples of all
rays at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import harness
import peers
import rayfuse
from harness import Workload


def one_search(
    t_starts: Tensor,
    t_ends: Tensor,
    w: Tensor,
    offsets: Tensor,
    t_env_starts: Tensor,
    t_env_ends: Tensor,
    w_env: Tensor,
    offsets_env: Tensor,
) -> Tensor:
    """The loss of each ray. Rays lie one behind the other on one axis, so that a single sorted
    search serves them; their weights are summed up together as well."""
    counts, counts_env = offsets.diff(), offsets_env.diff()
    ray = torch.repeat_interleave(counts, output_size=len(w))
    ray_env = torch.repeat_interleave(counts_env, output_size=len(w_env))
    length = 1 + max(t_ends.max().item(), t_env_ends.max().item())
    first, last = offsets_env[ray], offsets_env[ray + 1] - 1

    def search(values: Tensor, x: Tensor) -> Tensor:
        axis = values.double() + length * ray_env
        return torch.searchsorted(axis, x.double() + length * ray, right=True)

    begin = (search(t_env_starts, t_starts) - 1).maximum(first).minimum(last)
    end = search(t_env_ends, t_ends).maximum(first).minimum(last)
    until = torch.cat([w_env.new_zeros(1, dtype=torch.double), w_env.double().cumsum(0)])
    bound = torch.where(last < first, 0, until[end + 1] - until[begin.clamp(min=0)]).to(w.dtype)
    each = (w - bound).clip(min=0) ** 2 / (w + 1e-7)
    return each.new_zeros(len(counts)).index_add(0, ray, each) / counts.clamp(min=1)


class BenchPackedInterlevelLoss(harness.PackedBench):
    op = staticmethod(rayfuse.packed_interlevel_loss)
    workloads = (
        # 2^18 samples in all
        Workload((4096,), dict(P=64, Q=128)),
        Workload((8192,), dict(P=32, Q=64)),
        Workload((65536,), dict(P=48, Q=96)),
        Workload((65536,), dict(P=48, Q=96), torch.bfloat16),
    )
    directions = ((), ("w_env",), ("w", "w_env"))
    read_again = ("offsets", "offsets_env")
    peers: Any = (
        peers.eager("one search", one_search),
        peers.eager("reference", rayfuse.packed_interlevel_loss.op.reference),
    )
    growth = ("Q", (64, 256, 1024, 4096), (4096,), ("eager one search",))
    page = "interlevel"

    def _sizes(self, workload: Workload) -> dict[str, int]:
        sizes = super()._sizes(workload)
        return {**sizes, "Q": sizes["R"] * workload.sizes["Q"]}
