"""What a sample of packed rays costs, in multiples of one of dense rays: `python
bench/packed_beside_dense.py` (or with `triton` or `cuda`) prints a table for the kernels of all ops
that have both forms, without the engine around them.

2^18 samples: dense rays of 64 or of 16, and as many packed rays with any number of samples up to
twice as many, or with as many each. Medians of turns, as in all benches.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import harness
import kernels
import peers
from rayfuse.ops import STEMS

SAMPLES, SECONDS = 1 << 18, 1.0
# samples of a ray, and whether their number differs
RAYS = ((64, False), (64, True), (16, True))
# so that light reaches the end of a ray of 128: what is below 1e-38 takes longer in any form
DIMMED = {"alpha": 0.1}


def lengths(S: int, ragged: bool) -> Tensor:
    """As many rays as are dense, of SAMPLES in all."""
    R = SAMPLES // S
    if not ragged:
        return torch.full((R,), S)
    counts = torch.randint(0, 2 * S + 1, (R,), generator=torch.Generator().manual_seed(0))
    counts[-1] = 0
    while missing := SAMPLES - int(counts.sum()):
        step = max(-1, min(1, missing))
        # those that may still grow, or shrink
        at = (counts < 2 * S if step > 0 else counts > 0).nonzero()[: abs(missing), 0]
        counts[at] += step
    return counts


def inputs(bench: harness.Bench, S: int, ragged: bool) -> dict[str, Tensor]:
    """Dense, or packed where the op is."""
    spec, R = bench.op.op, SAMPLES // S
    packed = spec.name.startswith("packed_")
    own = {"P": S, "Q": 2 * S, "C": 64} if packed else {"S": S, "E": 2 * S, "C": 64}
    if "composite" in spec.name:
        own["C"] = 3
    sizes = {name: own[name] for name in bench.workloads[0].sizes}
    named = bench.inputs(harness.Workload((R,), sizes))
    if packed:
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths(S, ragged).cumsum(0)])
        named["offsets"] = ends.to(peers.device)
        if "offsets_env" in named:
            named["offsets_env"] = 2 * named["offsets"]
        on_cpu = {name: x.cpu() for name, x in named.items()}
        spec.lay_intervals(on_cpu)
        named = {name: x.to(peers.device) for name, x in on_cpu.items()}
    return {name: DIMMED.get(name, 1) * x for name, x in named.items()}


def main() -> None:
    backend = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    if backend != "cpu":
        peers.device = torch.device("cuda")
    # glibc returns results of a MB to the system after each call until it has seen larger ones go
    torch.empty(7 << 20)
    columns = [f"{S} each" if not ragged else f"0 to {2 * S}" for S, ragged in RAYS]
    print("| forward, forward + backward | " + " | ".join(columns) + " |")
    print("|---|" + "--:|" * len(columns))
    for stem in STEMS:
        if f"packed_{stem}" not in STEMS:
            continue
        dense_of = {bench.title.replace(stem, ""): bench for bench in kernels.benches(stem)}
        for packed in kernels.benches(f"packed_{stem}"):
            dense = dense_of[packed.title.replace(f"packed_{stem}", "")]
            cells = []
            for S, ragged in RAYS:
                both = [kernels.Kernels(x, inputs(x, S, ragged), backend) for x in (dense, packed)]
                turns = [harness.Turns(call) for x in both for call in (x.forward, x.backward)]
                harness.take_turns(turns, seconds=SECONDS)
                forward, backward, packed_forward, packed_backward = (x.median for x in turns)
                whole = (packed_forward + packed_backward) / (forward + backward)
                cells.append(f"{packed_forward / forward:.2f} {whole:.2f}")
            print("| " + " | ".join([kernels.title(packed), *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
