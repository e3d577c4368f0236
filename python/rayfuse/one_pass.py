"""A weighted sum of losses, and its gradients in the same pass.

A loss that is added up with a multiplier gets that multiplier as its gradient. So its op makes the
gradients of its inputs while these are in cache, in one kernel where there is one, and one node of
autograd stands for all ops (docs/objective.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import Chosen, as_tuple, last_backend, use_backend
from .op import HALVES, Op, gradients, is_transformed, ray_count, wants_gradient


class Calls:
    """How a function calls its ops: here one by one, by autograd."""

    def op(self, op: Callable, *args: Any, **named: Any) -> Any:
        return op(*args, **named)

    def loss(self, names: Sequence[str], op: Callable, *args: Any, **named: Any) -> Any:
        """One whose outputs are the losses of these names, or add to them; or a function of torch
        of that kind, which says in `.with_gradients` how it makes both."""
        return op(*args, **named)


Losses = Callable[..., Any]
"""To a named tuple of tensors, losses among them. Calls its ops through `_calls=`, if given."""


def weighted_sum(
    losses: Losses, multipliers: Mapping[str, float], args: Sequence[Any], named: dict[str, Any]
) -> tuple[Tensor, Sequence[Tensor]]:
    """The sum of the losses that are named, each times its multiplier; and all outputs.

    All are differentiable as ever. Where the losses are numbers, on a CPU, the gradients of the sum
    are made with it; a backward that does not begin with the sum alone computes everything again.
    """
    if is_transformed() or not _gives_numbers(**named):
        return _one_by_one(losses, multipliers, args, named)
    tensors: list[Tensor] = []
    arguments = _without_tensors((args, named), tensors)
    on_cpu = all([type(x) in _PLAIN and x.is_cpu for x in tensors])
    if not (on_cpu and wants_gradient(tensors)):
        return _one_by_one(losses, multipliers, args, named)
    total, *out = _OnePass.apply(losses, multipliers, arguments, *tensors)
    return total, out


# others may have no values: those of torch.export, for one
_PLAIN = (Tensor, torch.nn.Parameter)


def _gives_numbers(
    reduction: str = "mean", denominator: float | Tensor | None = None, **_: Any
) -> bool:
    """Whether losses are reduced to numbers, and divided by one as Python does."""
    return reduction != "none" and (
        denominator is None or (isinstance(denominator, (int, float)) and denominator != 0)
    )


def _one_by_one(
    losses: Losses, multipliers: Mapping[str, float], args: Sequence[Any], named: dict[str, Any]
) -> tuple[Tensor, Sequence[Tensor]]:
    out = losses(*args, **named)
    return sum(x * getattr(out, name) for name, x in multipliers.items()), out


class _Place(int):
    """Where a tensor belongs: its index."""


def _without_tensors(x: Any, tensors: list[Tensor]) -> Any:
    """Arguments with places instead of their tensors, which go to a list."""
    if isinstance(x, Tensor):
        tensors.append(x)
        return _Place(len(tensors) - 1)
    return _map(lambda y: _without_tensors(y, tensors), x)


def _with_tensors(x: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(x, _Place):
        return tensors[x]
    return _map(lambda y: _with_tensors(y, tensors), x)


def _map(f: Callable[[Any], Any], x: Any) -> Any:
    """f of what a container holds; anything else as it is."""
    if isinstance(x, dict):
        return {key: f(y) for key, y in x.items()}
    return [f(y) for y in x] if isinstance(x, (list, tuple)) else x


class _Call(NamedTuple):
    """A call of an op, with what its backward needs."""

    op: Op
    chosen: Chosen
    raw: tuple[Any, ...]
    wanted: list[int]

    @classmethod
    def of(cls, op: Op, args: tuple[Any, ...], named: dict[str, Any]) -> _Call:
        raw = op.raw(args, named)
        wanted = [i for i in op.differentiable if raw[i] is not None and raw[i].requires_grad]
        return cls(op, op.kernels.choose(raw[0].device.type), raw, wanted)

    @property
    def needs(self) -> int:
        return self.op.needs(self.wanted)

    def recorded(self) -> Any:
        profiles = torch.autograd._profiler_enabled()
        return self.op.recorded(self.chosen) if profiles else nullcontext()

    def add(self, grads: Sequence[Tensor]) -> None:
        """These gradients to the inputs."""
        for i, grad in zip(self.op.differentiable, grads, strict=True):
            if i in self.wanted:
                _add_gradient(self.raw[i], grad)


def _add_gradient(x: Tensor, grad: Tensor) -> None:
    if not x.is_leaf:
        torch.autograd.backward(x, grad, retain_graph=True)
    elif x.grad is None:
        x.grad = grad
    else:
        x.grad.add_(grad)


class _Tape(Calls):
    """Ops without autograd, and losses that are numbers.

    Gradients gather in `.grad` of leaves: of the function's own tensors, and of outputs of ops.
    Between these autograd has what torch does with them.
    """

    def __init__(self, multipliers: Mapping[str, float]) -> None:
        self._multipliers = multipliers
        self._calls: list[tuple[_Call, Sequence[Tensor]]] = []
        self._no_grad = torch.no_grad()

    def op(self, op: Any, *args: Any, **named: Any) -> Sequence[Tensor]:
        call = _Call.of(op.op, args, named)
        with self._no_grad, call.recorded():
            out = as_tuple(call.chosen.run_fwd(call.raw))
        outputs = out[: len(call.op.outputs)]
        if call.wanted:
            self._calls.append((call, out))
            for y in outputs:
                y.requires_grad_()
        return outputs

    def loss(self, names: Sequence[str], op: Any, *args: Any, **named: Any) -> Any:
        # where it is 0, nothing is spent on gradients
        multipliers = [self._multipliers.get(name) or None for name in names]
        if hasattr(op, "op"):
            return self._loss(op.op, multipliers, args, **named)
        with self._no_grad:
            loss, grads = op.with_gradients(*multipliers, *args, **named)
        for x, grad in zip(args, grads, strict=False):
            if x.requires_grad:
                _add_gradient(x, grad.to(x.dtype))
        return loss

    def _loss(
        self,
        op: Op,
        multipliers: Sequence[float | None],
        args: tuple[Any, ...],
        reduction: str,
        denominator: float | None,
        **named: Any,
    ) -> Any:
        call = _Call.of(op, args, named)
        shape = op.signature.shape_of_first_output(call.raw[: len(op.inputs)])
        count: Any = ray_count(shape, reduction, denominator) or 1
        d_sums = [x if x is None else x / count for x in multipliers]
        with self._no_grad, call.recorded():
            sums, grads = call.chosen.run_fwd_bwd(d_sums, call.raw, call.needs)
        if grads:
            call.add(grads)
        losses = [x.item() / count for x in sums]
        return losses if len(losses) > 1 else losses[0]

    def finish(self) -> None:
        """Carry the gradients from the outputs of ops to their inputs."""
        for call, out in reversed(self._calls):
            count = len(call.op.outputs)
            d_outputs = [y.grad for y in out[:count]]
            if any([d is not None for d in d_outputs]):
                with call.recorded():
                    args = (*d_outputs, *out[count:], *call.raw)
                    call.add(as_tuple(call.chosen.run_bwd(args, call.needs)))


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        losses: Losses,
        multipliers: Mapping[str, float],
        arguments: Any,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() if x.requires_grad else x for x in tensors]
        args, named = _with_tensors(arguments, leaves)
        tape = _Tape(multipliers)
        with torch.enable_grad():
            out = losses(*args, **named, _calls=tape)
        tape.finish()
        ctx.save_for_backward(*tensors)
        ctx.function = losses, multipliers, arguments
        ctx.made = [x.grad if x.requires_grad else None for x in leaves]
        ctx.backend = last_backend()
        ctx.set_materialize_grads(False)
        like = next(y for y in out if isinstance(y, Tensor))
        total = sum([x * float(getattr(out, name)) for name, x in multipliers.items()])
        return tuple(
            [y.detach() if isinstance(y, Tensor) else like.new_full((), y) for y in (total, *out)]
        )

    @staticmethod
    def backward(ctx: Any, d_total: Tensor | None, *d_out: Tensor | None) -> Any:
        made, ctx.made = ctx.made, None
        if made is not None and not torch.is_grad_enabled():
            if d_total is not None and all([d is None for d in d_out]):
                scale = d_total.item()
                if scale == 1:
                    return None, None, None, *made
                # what is too small for half precision may not be so once it is scaled
                if not any([x is not None and x.dtype in HALVES for x in made]):
                    return None, None, None, *[x if x is None else x * scale for x in made]
            warnings.warn(_WARNING, stacklevel=2)
        losses, multipliers, arguments = ctx.function
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad(), use_backend(ctx.backend):
            # aliases: where an input was computed from another one, its own share alone is ours
            tensors = [x.view_as(x) for x in ctx.saved_tensors]
            args, named = _with_tensors(arguments, tensors)
            total, out = _one_by_one(losses, multipliers, args, named)
            wanted = [i for i, needs in enumerate(ctx.needs_input_grad[3:]) if needs]
            grads = gradients(
                (total, *out),
                [tensors[i] for i in wanted],
                (d_total, *d_out),
                create_graph=create_graph,
            )
        found = dict(zip(wanted, grads, strict=True))
        return None, None, None, *[found.get(i) for i in range(len(tensors))]


_WARNING = (
    "the gradients that were made with the sum of the losses are of no use, as other outputs have "
    "gradients, too, or half precision is scaled: everything is computed again"
)
