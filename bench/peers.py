"""What rayfuse is timed against, as far as every op has it; a bench adds what only its op has.

A peer prepares a call that returns the mean loss and the gradients that are wanted. Inputs in half
precision are widened within the call, as the ops do on the fly.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import rayfuse

Call = Callable[[], tuple[Tensor, ...]]
Loss = Callable[[], Tensor]


@dataclass
class Peer:
    """A differentiable loss that somebody could use instead.

    Args:
        name: as the tables show it.
        loss: inputs -> a function that computes the mean loss of just these. What a user would
            have at hand anyway may be computed outside that function.
        gradients: names of the inputs that get a gradient; None for all.
        module: what must be installed.
        refuse: (leading shape, sizes, dtype) -> why this size is not run, or None.
    """

    name: str
    loss: Callable[..., Loss]
    gradients: tuple[str, ...] | None = None
    module: str | None = None
    refuse: Callable[[tuple[int, ...], dict[str, int], torch.dtype], str | None] = (
        lambda leading, sizes, dtype: None
    )

    def reason(self, workload: object, wants: Sequence[str]) -> str | None:
        """Why the peer does not run, or None."""
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        missing = [name for name in wants if self.gradients and name not in self.gradients]
        if missing:
            return f"no gradient to {', '.join(missing)}"
        return self.refuse(workload.leading, workload.sizes, workload.dtype)

    def prepare(self, inputs: dict[str, Tensor], wants: Sequence[str]) -> Call:
        leaves = {
            name: x.detach().clone().requires_grad_(name in wants) for name, x in inputs.items()
        }
        loss, wanted = self.loss(*leaves.values()), [leaves[name] for name in wants]

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (loss(),)

        def both() -> tuple[Tensor, ...]:
            value = loss()
            return value.detach(), *torch.autograd.grad(value, wanted)

        return both if wants else forward


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def mean_of(per_ray: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss per ray, as the mean over rays of inputs of any precision."""

    def mean(*inputs: Tensor) -> Tensor:
        return per_ray(*map(wide, inputs)).mean()

    return mean


def eager(name: str, per_ray: Callable[..., Tensor], **options: object) -> Peer:
    mean = mean_of(per_ray)
    return Peer(f"eager {name}", lambda *inputs: lambda: mean(*inputs), **options)


def compiled(name: str, per_ray: Callable[..., Tensor], **options: object) -> Peer:
    """torch.compile for just this shape; the harness forgets older shapes between workloads."""

    def loss(*inputs: Tensor) -> Loss:
        mean = torch.compile(mean_of(per_ray), dynamic=False, fullgraph=True)
        return lambda: mean(*inputs)

    return Peer(f"compile {name}", loss, **options)


def ours(op: Callable[..., Tensor], name: str = "rayfuse", backend: str | None = None) -> Peer:
    def loss(*inputs: Tensor) -> Loss:
        if backend is None:
            return lambda: op(*inputs)

        def forced() -> Tensor:
            with rayfuse.use_backend(backend):
                return op(*inputs)

        return forced

    return Peer(name, loss)
