"""What rayfuse is timed against, as far as every op has it; a bench adds what only its op has.

A peer prepares a call that returns the mean loss, or all outputs of an op that is none, and the
gradients that are wanted. Inputs in half precision are widened within the call, as the ops do on
the fly.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rayfuse

# where everything is timed (`--device`)
device = torch.device("cpu")

Call = Callable[[], tuple[Tensor, ...]]
Loss = Callable[[], Tensor | tuple[Tensor, ...]]


@dataclass
class Peer:
    """A differentiable function that somebody could use instead.

    Args:
        name: as the tables show it.
        loss: inputs -> a function that computes the mean loss of just these, or the outputs. What a
            user would have at hand anyway may be computed outside that function.
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
        if self.module == "numba" and device.type != "cpu":
            return "its loops run on the CPU"
        missing = [name for name in wants if self.gradients and name not in self.gradients]
        if missing:
            return f"no gradient to {', '.join(missing)}"
        return self.refuse(workload.leading, workload.sizes, workload.dtype)

    def prepare(
        self,
        inputs: dict[str, Tensor],
        wants: Sequence[str],
        d_outputs: Sequence[Tensor] | None = None,
    ) -> Call:
        """The call; `d_outputs` are the gradients of outputs that are no mean losses."""
        leaves = {
            name: x.detach().clone().requires_grad_(name in wants) for name, x in inputs.items()
        }
        loss, wanted = self.loss(*leaves.values()), [leaves[name] for name in wants]

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return as_tuple(loss())

        def both() -> tuple[Tensor, ...]:
            values = as_tuple(loss())
            grads = torch.autograd.grad(values, wanted, d_outputs)
            return *(value.detach() for value in values), *grads

        return both if wants else forward


def as_tuple(x: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def widened(function: Callable[..., Any], mean: bool = True) -> Callable[..., Any]:
    """A function of inputs of any precision; one that gives losses per ray gives their means."""

    def call(*inputs: Tensor) -> Any:
        out = function(*map(wide, inputs))
        if not mean:
            return out
        return out.mean() if isinstance(out, Tensor) else tuple([x.mean() for x in out])

    return call


def eager(name: str, function: Callable[..., Any], mean: bool = True, **options: object) -> Peer:
    call = widened(function, mean)
    return Peer(f"eager {name}".strip(), lambda *inputs: lambda: call(*inputs), **options)


def compiled(name: str, function: Callable[..., Any], mean: bool = True, **options: object) -> Peer:
    """torch.compile for just this shape; the harness forgets older shapes between workloads."""

    def loss(*inputs: Tensor) -> Loss:
        call = torch.compile(widened(function, mean), dynamic=False, fullgraph=True)
        return lambda: call(*inputs)

    return Peer(f"compile {name}".strip(), loss, **options)


def ours(op: Callable[..., Any], name: str = "rayfuse", backend: str | None = None) -> Peer:
    def loss(*inputs: Tensor) -> Loss:
        if backend is None:
            return lambda: op(*inputs)

        def forced() -> Any:
            with rayfuse.use_backend(backend):
                return op(*inputs)

        return forced

    return Peer(name, loss)
