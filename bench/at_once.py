"""What it saves to make a loss and its gradients at once: `python bench/at_once.py` prints a table
for the CPU kernels of all ops that have such a one, all gradients wanted, without the engine around
them. Medians of turns, as in all benches."""

from __future__ import annotations

import torch

import harness
import kernels
from rayfuse.ops import STEMS

SECONDS = 1.5


def main() -> None:
    # glibc returns results of a MB to the system after each call until it has seen larger ones go
    torch.empty(7 << 20)
    print("| ms | workload | forward, then backward | at once | saved |")
    print("|---|---|--:|--:|--:|")
    for bench in (bench for stem in STEMS for bench in kernels.benches(stem)):
        if bench.op.op.kernels.choose("cpu").fwd_bwd is None:
            continue
        for workload in bench.workloads:
            both = kernels.Kernels(bench, bench.inputs(workload), "cpu")
            turns = [harness.Turns(call) for call in (both.forward, both.backward, both.at_once)]
            harness.take_turns(turns, seconds=SECONDS)
            forward, backward, at_once = (1e3 * x.median for x in turns)
            apart = forward + backward
            cells = [f"{apart:.3g}", f"{at_once:.3g}", f"{1 - at_once / apart:.0%}"]
            print(
                "| " + " | ".join([kernels.title(bench), str(workload), *cells]) + " |", flush=True
            )


if __name__ == "__main__":
    main()
