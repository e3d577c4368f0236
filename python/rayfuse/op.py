"""The engine: from one spec on a reference function to a differentiable, traceable torch op.

    @op("t[..., S+1] w[..., S] -> loss[...]", domain=dict(t=increasing, w=nonnegative))
    def distortion_loss(t, w): ...

From that come the schemas `rayfuse::distortion_loss` and `rayfuse::distortion_loss_bwd`, the checks
and their messages, the fake kernels, the batching rules, the choice of backend, the autograd
Function, the reduction, and the samples of tests and benches.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backend, dims
from .domain import Domain, real

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
_GRADIENT_PREFIX = "d_"
_REDUCTION_DOC = """
Keyword Args:
    reduction: `"mean"` over all rays (default), `"sum"`, or `"none"` for one value per ray.
    denominator: what `"mean"` divides the sum by instead of the number of rays, a number or a
        0-d tensor, so that micro-batches add up to the full batch. No gradient flows to it.
"""


def op(dims_text: str, domain: dict[str, Domain] | None = None) -> Callable[[Callable], Any]:
    """Make a differentiable op of a plain PyTorch reference.

    Args:
        dims_text: the shapes of inputs and outputs (module `dims`). An output called `loss` gets
            `reduction=` and `denominator=`.
        domain: the values that inputs must hold; finite ones where it is silent.

    Returns:
        a decorator; the decorated function is public, and carries the op as `.op` and its autograd
        Function as `.Function`.
    """

    def decorate(reference: Callable) -> Any:
        return Op(reference, dims.Signature.parse(dims_text), domain or {}).public()

    return decorate


class Op:
    """All that is derived from one spec."""

    def __init__(
        self, reference: Callable, signature: dims.Signature, domain: dict[str, Domain]
    ) -> None:
        self.reference = reference
        self.parameters = [*inspect.signature(reference).parameters.values()]
        self.name = reference.__name__
        self.signature = signature
        self.inputs = [array.name for array in signature.inputs]
        self.domain = {name: domain.get(name, real) for name in self.inputs}
        self.is_loss = [array.name for array in signature.outputs] == ["loss"]
        self.kernels = backend.Kernels(self.name, self._reference_fwd, self._reference_bwd)
        self._libraries = [
            self._register(namespace)
            for namespace in ("rayfuse", *map(backend.library_namespace, backend.LIBRARIES))
        ]
        self._passed: set[tuple] = set()
        self.Function, self.Transformable = _autograd_functions(self.name)
        _OPS[self.name] = self

    # ---- the public function

    def public(self) -> Callable:
        """The function that users call: checks, then the autograd Function."""
        arity, function, transformable = len(self.inputs), self.Function, self.Transformable

        def apply(
            args: tuple[Tensor, ...],
            named: dict[str, Tensor],
            reduction: str | None = None,
            denominator: float | Tensor | None = None,
        ) -> Any:
            if named or len(args) != arity:
                args = self._positional(args, named)
            self._check_once(args)
            if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
                return transformable.apply(reduction, denominator, *args)
            return function.apply(reduction, denominator, *args)

        def loss(
            *args: Tensor,
            reduction: str = "mean",
            denominator: float | Tensor | None = None,
            **named: Tensor,
        ) -> Any:
            if reduction != "mean":
                self._check_reduction(reduction, denominator)
            return apply(args, named, reduction, denominator)

        def outputs(*args: Tensor, **named: Tensor) -> Any:
            return apply(args, named)

        doc = inspect.getdoc(self.reference) or ""
        parameters = self.parameters
        if self.is_loss:
            keywords = inspect.signature(loss).parameters
            extra = [keywords["reduction"], keywords["denominator"]]
            parameters = [*parameters, *extra]
            head, returns, tail = doc.partition("\n\nReturns:")
            doc = head + "\n" + _REDUCTION_DOC.rstrip() + returns + tail
        call: Any = functools.update_wrapper(loss if self.is_loss else outputs, self.reference)
        call.__doc__ = doc
        call.__signature__ = inspect.Signature(parameters)
        call.op, call.Function = self, self.Function
        return call

    def _positional(self, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> tuple[Tensor, ...]:
        try:
            bound = inspect.Signature(self.parameters).bind(*args, **named)
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}") from None
        return bound.args

    # ---- checks

    def _check_once(self, args: Sequence[Any]) -> None:
        """Check arguments unless some of the same shapes, dtypes and devices have passed before."""
        if torch.compiler.is_compiling() or backend.debugging():
            return self.check(args)
        try:
            key = tuple([(x.shape, x.dtype, x.device) for x in args])
        except AttributeError:  # not a tensor
            return self.check(args)
        if key not in self._passed:
            self.check(args)
            if len(self._passed) == _PASSED_AT_MOST:
                self._passed.clear()
            self._passed.add(key)

    def check(self, args: Sequence[Tensor]) -> None:
        """Raise ValueError or TypeError, in one wording, unless the arguments fit the spec."""
        first = args[0]
        for name, arg in zip(self.inputs, args, strict=True):
            if not isinstance(arg, Tensor):
                self._fail(TypeError, name, "be a tensor", type(arg).__name__)
            if arg.dtype is not first.dtype:
                rule = f"be {_plain(first.dtype)} like {self.inputs[0]}"
                self._fail(TypeError, name, rule, _plain(arg.dtype))
            if arg.device != first.device:
                self._fail(
                    ValueError, name, f"be on {first.device} like {self.inputs[0]}", arg.device
                )
        if first.dtype not in FLOATS:
            rule = "be " + ", ".join(map(_plain, FLOATS[:-1])) + f" or {_plain(FLOATS[-1])}"
            self._fail(TypeError, self.inputs[0], rule, _plain(first.dtype))
        try:
            self.signature.bind([arg.shape for arg in args])
        except dims.ShapeError as error:
            raise ValueError(f"{self.name}: {error}") from None
        if backend.debugging():
            self._check_values(args)

    def _check_reduction(self, reduction: str, denominator: object) -> None:
        if reduction not in ("mean", "sum", "none"):
            self._fail(ValueError, "reduction", "be 'mean', 'sum' or 'none'", repr(reduction))
        if denominator is not None:
            rule = "come with reduction='mean'"
            self._fail(ValueError, "denominator", rule, f"reduction={reduction!r}")

    def _check_values(self, args: Sequence[Tensor]) -> None:
        for name, arg in zip(self.inputs, args, strict=True):
            domain = self.domain[name]
            wrong = domain.holds(arg.detach()).logical_not().nonzero()
            if len(wrong):
                at = wrong[0].tolist()
                # a difference is one shorter than the values: the later of the two is named
                at[-1] += arg.shape[-1] - domain.holds(arg.detach()).shape[-1]
                self._fail(ValueError, name, domain.rule, f"{arg[tuple(at)].item():g} at {at}")

    def _fail(self, error: type[Exception], name: str, rule: str, got: object) -> None:
        raise error(f"{self.name}: {name} must {rule}, got {got}")

    # ---- the reference as a backend

    def _reference_fwd(self, *args: Tensor) -> Any:
        return self.reference(*map(_accumulated, args))

    def _reference_bwd(self, *args: Any) -> tuple[Tensor, ...]:
        d_outputs, inputs, needs = self._split_bwd(args)
        wide = [_accumulated(x.detach()).requires_grad_() for x in inputs]
        # below the dispatcher autograd's keys are excluded, and a reference is differentiated there
        below = torch._C._SetExcludeDispatchKeyGuard
        with below(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
            outputs = self.reference(*wide)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            grads = torch.autograd.grad(outputs, wide, d_outputs)
        return tuple(
            grad.to(x.dtype) if needs >> i & 1 else x.new_empty(0)
            for i, (x, grad) in enumerate(zip(inputs, grads, strict=True))
        )

    def _split_bwd(self, args: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor], int]:
        outputs = len(self.signature.outputs)
        return [*args[:outputs]], [*args[outputs:-1]], args[-1]

    # ---- torch.ops

    def _register(self, namespace: str) -> torch.library.Library:
        """Define both ops in a namespace; `rayfuse` itself dispatches, the others are libraries."""
        library = torch.library.Library(namespace, "FRAGMENT")
        inputs = [f"Tensor {name}" for name in self.inputs]
        outputs = [array.name for array in self.signature.outputs]
        d_outputs = [f"Tensor {_GRADIENT_PREFIX}{name}" for name in outputs]
        directions = {
            self.name: (inputs, len(outputs), self._fake_fwd, self.run_fwd),
            f"{self.name}_bwd": (
                [*d_outputs, *inputs, "int needs"],
                len(inputs),
                self._fake_bwd,
                self.run_bwd,
            ),
        }
        for name, (parameters, results, fake, run) in directions.items():
            returns = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
            library.define(f"{name}({', '.join(parameters)}) -> {returns}")
            torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
            if namespace == "rayfuse":
                library.impl(name, run, "CompositeExplicitAutograd")
                batched = functools.partial(self._batched, name)
                torch.library.register_vmap(f"{namespace}::{name}", batched, lib=library)
        return library

    def run_fwd(self, *inputs: Tensor) -> Any:
        """The raw forward on the backend that is chosen for these tensors."""
        self._check_once(inputs)
        return self.kernels.choose(inputs[0].device.type).run_fwd(inputs)

    def run_bwd(self, *args: Any) -> Any:
        """The raw backward: gradients of all inputs, empty where `needs` has no bit."""
        d_outputs, inputs, needs = self._split_bwd(args)
        self._check_once(inputs)
        leading, sizes = self.signature.bind([x.shape for x in inputs])
        for array, d_output in zip(self.signature.outputs, d_outputs, strict=True):
            shape = list(array.shape(leading, sizes))
            if list(d_output.shape) != shape:
                name = _GRADIENT_PREFIX + array.name
                self._fail(ValueError, name, f"have shape {shape}", list(d_output.shape))
        return self.kernels.choose(inputs[0].device.type).run_bwd((*d_outputs, *inputs), needs)

    def _fake_fwd(self, *inputs: Tensor) -> Any:
        leading, sizes = self.signature.bind([x.shape for x in inputs])
        dtype = _accumulator(inputs[0].dtype)
        outputs = [
            inputs[0].new_empty(array.shape(leading, sizes), dtype=dtype)
            for array in self.signature.outputs
        ]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _fake_bwd(self, *args: Any) -> Any:
        _, inputs, needs = self._split_bwd(args)
        grads = [x.new_empty(x.shape if needs >> i & 1 else (0,)) for i, x in enumerate(inputs)]
        return grads[0] if len(grads) == 1 else tuple(grads)

    def _batched(self, name: str, info: Any, in_dims: Any, *args: Any) -> Any:
        """vmap of a raw op."""
        out = getattr(torch.ops.rayfuse, name)(*_batch_first(info, in_dims, args))
        # gradients that are not needed are empty, and have no batch dimension
        if isinstance(out, Tensor):
            return out, 0
        return out, tuple(None if x.shape == (0,) else 0 for x in out)

    # ---- autograd

    def differentiable_bwd(
        self, d_outputs: Sequence[Tensor], inputs: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients as a graph, for a second derivative, through the reference."""
        outputs = self._reference_fwd(*inputs)
        wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        grads = iter(torch.autograd.grad(outputs, wanted, d_outputs, create_graph=True))
        return [next(grads) if need else None for need in needs]

    # ---- samples

    def sample(
        self,
        leading: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **sizes: int,
    ) -> list[Tensor]:
        """Random inputs in their domains, with these leading dimensions and sizes."""
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.float64 if dtype == torch.float64 else torch.float32
        return [
            self.domain[array.name]
            .from_uniform(
                torch.rand(array.shape(leading, sizes), generator=generator, dtype=uniform)
            )
            .to(dtype)
            for array in self.signature.inputs
        ]


# a training run has a handful of shapes; one whose shapes never repeat must not fill the memory
_PASSED_AT_MOST = 1024

# Functions find their op here by name: a compiler can trace a global, not an object in a closure
_OPS: dict[str, Op] = {}


def _autograd_functions(name: str) -> tuple[type[torch.autograd.Function], ...]:
    """(reduction, denominator, *inputs) -> outputs as an autograd Function, in two forms.

    torch.func and torch.compile want `setup_context`, which doubles the cost of an eager call.
    """
    raw = getattr(torch.ops.rayfuse, name).default
    raw_bwd = getattr(torch.ops.rayfuse, f"{name}_bwd").default

    def run(inputs: Sequence[Tensor]) -> Any:
        if torch.compiler.is_compiling():
            return raw(*inputs)
        # past torch.ops, which costs more than all the rest of an eager call
        return _OPS[name].kernels.choose(inputs[0].device.type).run_fwd(inputs)

    def reduce(out: Tensor, reduction: str | None, denominator: Any) -> Tensor:
        if reduction not in ("mean", "sum"):
            return out
        return _reduced(out, _count(out.shape, reduction, denominator))

    def save(ctx: Any, reduction: str | None, denominator: Any, inputs: Sequence[Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.reduction, ctx.denominator = reduction, denominator
        # the backward may run in another thread, where another backend is forced
        ctx.backend = None if torch.compiler.is_compiling() else backend.last_backend()

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, reduction: str | None, denominator: Any, *inputs: Tensor) -> Any:
            out = run(inputs)
            save(ctx, reduction, denominator, inputs)
            return reduce(out, reduction, denominator)

        @staticmethod
        def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
            inputs = ctx.saved_tensors
            needs = ctx.needs_input_grad[2:]
            if ctx.reduction in ("mean", "sum"):
                rays = _OPS[name].signature.leading(inputs)
                d_loss = d_outputs[0].expand(rays)
                count = _count(rays, ctx.reduction, ctx.denominator)
                d_outputs = (d_loss if count is None else d_loss / count,)
            if torch.compiler.is_compiling():
                grads = raw_bwd(*d_outputs, *inputs, _mask(needs))
            elif torch.is_grad_enabled():
                grads = _OPS[name].differentiable_bwd(d_outputs, inputs, needs)
            else:
                chosen = _OPS[name].kernels.choose(inputs[0].device.type, ctx.backend)
                grads = chosen.run_bwd((*d_outputs, *inputs), _mask(needs))
            grads = (grads,) if isinstance(grads, Tensor) else grads
            return None, None, *[grads[i] if needs[i] else None for i in range(len(needs))]

    class Transformable(Function):
        @staticmethod
        def forward(reduction: str | None, denominator: Any, *inputs: Tensor) -> Any:  # type: ignore[override]
            return reduce(run(inputs), reduction, denominator)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            reduction, denominator, *tensors = inputs
            save(ctx, reduction, denominator, tensors)

        @staticmethod
        def vmap(
            info: Any, in_dims: Any, reduction: str | None, denominator: Any, *inputs: Tensor
        ) -> Any:
            inputs = _batch_first(info, in_dims[2:], inputs)
            if reduction not in ("mean", "sum"):
                out = Transformable.apply(reduction, None, *inputs)
                return out, torch.utils._pytree.tree_map(lambda _: 0, out)
            loss = Transformable.apply("none", None, *inputs)
            total = loss.unsqueeze(-1).flatten(1).sum(1)
            count = _count(loss.shape[1:], reduction, denominator)
            return total if count is None else total / count, 0

    Function.__name__ = Function.__qualname__ = f"{name}.Function"
    return Function, Transformable


def _mask(needs: Sequence[bool]) -> int:
    """Bit i says whether input i needs a gradient."""
    mask = 0
    for i, need in enumerate(needs):
        mask |= need << i
    return mask


def _batch_first(info: Any, in_dims: Sequence[int | None], args: Sequence[Any]) -> tuple[Any, ...]:
    """A batch dimension is one more leading dimension."""

    def to_front(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

    return tuple(map(to_front, args, in_dims))


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALVES else dtype


def _accumulated(x: Tensor) -> Tensor:
    return x.to(_accumulator(x.dtype))


# torch adds up fewer values than this on one thread, whatever the number of threads
_SERIAL_SUM = 1 << 14


def _reduced(loss: Tensor, count: float | Tensor | None) -> Tensor:
    """The sum over all rays by the count, the same to the bit for any number of threads."""
    if loss.device.type == "cpu" and loss.numel() > _SERIAL_SUM:
        loss = torch.stack([part.sum() for part in loss.flatten().split(_SERIAL_SUM)])
    total = loss.sum()
    return total if count is None else total / count


def _count(
    rays: torch.Size, reduction: str, denominator: float | Tensor | None
) -> float | Tensor | None:
    """What divides the sum: no rays give the exact 0 of an empty sum, not 0 / 0."""
    if reduction == "sum":
        return None
    return max(1, rays.numel()) if denominator is None else denominator
