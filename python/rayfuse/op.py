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
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backend, dims
from .backend import as_tuple, sum_of_rays
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


def op(
    dims_text: str,
    domain: dict[str, Domain] | None = None,
    constant: Sequence[str] = (),
    narrow: Sequence[str] = (),
    keep: Callable | None = None,
    base: type[Op] | None = None,
) -> Callable[[Callable], Any]:
    """Make a differentiable op of a plain PyTorch reference.

    The reference takes the tensors of `dims_text` in their order, those that may be absent as
    keywords with default None, then scalars, keywords with an annotation: `float`, `int`, `bool`
    or a `Literal` of strings, which kernels see as the index of the choice.

    Args:
        dims_text: the shapes of inputs and outputs (module `dims`). Outputs whose names end in
            `loss` get `reduction=` and `denominator=`.
        domain: the values that inputs must hold; finite ones where it is silent. That of a scalar
            is always checked.
        constant: the inputs in which the op is piecewise constant: they get no gradient.
        narrow: the inputs that may be of half precision where the others are float32.
        keep: the reference of what the forward keeps for the backward, a tuple, with the same
            parameters.
        base: a class derived from `Op`, for an op that does not fit.

    Returns:
        a decorator; the decorated function is public, and carries the op as `.op` and its autograd
        Function as `.Function`.
    """

    def decorate(reference: Callable) -> Any:
        signature = dims.Signature.parse(dims_text)
        return (base or Op)(reference, signature, domain or {}, constant, narrow, keep).public()

    return decorate


@dataclass(frozen=True)
class Scalar:
    """A parameter that is no tensor."""

    name: str
    kind: type
    default: Any
    choices: tuple[str, ...] = ()

    @classmethod
    def of(cls, parameter: inspect.Parameter, annotation: Any) -> Scalar:
        choices = typing.get_args(annotation)
        return cls(parameter.name, str if choices else annotation, parameter.default, choices)

    @property
    def schema(self) -> str:
        return f"{'int' if self.choices else self.kind.__name__} {self.name}"

    @property
    def rule(self) -> str:
        """What a value must be that is not of this kind."""
        if self.choices:
            return "be " + ", ".join(map(repr, self.choices[:-1])) + f" or {self.choices[-1]!r}"
        return {float: "be a number", int: "be an integer", bool: "be True or False"}[self.kind]

    def fits(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        kinds = (int, float) if self.kind is float else self.kind
        return isinstance(value, kinds) and (self.kind is bool) == isinstance(value, bool)

    def encode(self, value: Any) -> Any:
        """As kernels see it."""
        return self.choices.index(value) if self.choices else self.kind(value)

    def decode(self, value: Any) -> Any:
        return self.choices[value] if self.choices else value


class Passed(set):
    """What passed a check. A training run has a handful of shapes; one whose shapes never repeat
    must not fill the memory."""

    def add(self, key: tuple[Any, ...]) -> None:
        if len(self) == 1024:
            self.clear()
        super().add(key)


class Op:
    """All that is derived from one spec."""

    def __init__(
        self,
        reference: Callable,
        signature: dims.Signature,
        domain: dict[str, Domain],
        constant: Sequence[str],
        narrow: Sequence[str],
        keep: Callable | None,
    ) -> None:
        self.reference, self._keep = reference, keep
        self.parameters = [*inspect.signature(reference).parameters.values()]
        self.name = reference.__name__
        self.signature = signature
        self.inputs = [array.name for array in signature.inputs]
        hints = typing.get_type_hints(reference)
        self.scalars = [
            Scalar.of(parameter, hints[parameter.name])
            for parameter in self.parameters
            if parameter.name not in self.inputs
        ]
        scalars = [scalar.name for scalar in self.scalars]
        self.domain = {name: domain.get(name, real) for name in (*self.inputs, *scalars)}
        self.narrow = narrow
        self.integer = [name for name in self.inputs if self.domain[name].size]
        # where the inputs are that get a gradient
        self.differentiable = [
            i
            for i, name in enumerate(self.inputs)
            if name not in constant and name not in self.integer
        ]
        self.outputs = [array.name for array in signature.outputs]
        self.is_loss = all(name.endswith("loss") for name in self.outputs)
        self._required = [array.name for array in signature.inputs if not array.optional]
        # what is given by name, and what it is otherwise
        absent = [array.name for array in signature.inputs if array.optional]
        self._keywords: dict[str, Any] = dict.fromkeys(absent)
        self._keywords |= {scalar.name: scalar.default for scalar in self.scalars}
        self._known = {*self._keywords}
        self._mandatory = {
            scalar.name for scalar in self.scalars if scalar.default is inspect.Parameter.empty
        }
        self.kernels = backend.Kernels(self.name, self._reference_fwd, self._reference_bwd)
        self._libraries = [
            self._register(namespace)
            for namespace in ("rayfuse", *map(backend.library_namespace, backend.LIBRARIES))
        ]
        self._passed = Passed()
        self.Function, self.Transformable = _autograd_functions(
            self.name, len(self.inputs), len(self.outputs)
        )
        _OPS[self.name] = self

    # ---- the public function

    def public(self) -> Callable:
        """The function that users call: checks, then the autograd Function."""
        transformable = self.Transformable
        # past what looks for transforms, as it is done here
        function_apply = super(torch.autograd.Function, self.Function).apply  # type: ignore[misc]
        # the usual call, tensors alone, must not wait for what only others need
        plain = len(self.inputs) if self._required == self.inputs and not self.scalars else None

        def returned(out: Any) -> Any:
            """Without what is kept for the backward."""
            if not self.signature.kept:
                return out
            return out[0] if len(self.outputs) == 1 else out[: len(self.outputs)]

        def apply(
            args: tuple[Any, ...],
            named: dict[str, Any],
            reduction: str | None = None,
            denominator: float | Tensor | None = None,
        ) -> Any:
            if named or len(args) != plain:
                args = self.raw(args, named)
            else:
                self._check_once(args)
            if torch.compiler.is_compiling() and not wants_gradient(args):
                # torch 2.13 traces a Function without gradients as if it took a ctx
                return returned(transformable.forward(reduction, denominator, *args))
            if is_transformed():
                return returned(transformable.apply(reduction, denominator, *args))
            if torch.autograd._profiler_enabled():
                with self.recorded(self.kernels.choose(args[0].device.type)):
                    return function_apply(reduction, denominator, *args)
            return function_apply(reduction, denominator, *args)

        def loss(
            *args: Tensor,
            reduction: str = "mean",
            denominator: float | Tensor | None = None,
            **named: Any,
        ) -> Any:
            check_reduction(self.name, reduction, denominator)
            return apply(args, named, reduction, denominator)

        def outputs(*args: Tensor, **named: Any) -> Any:
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

    def recorded(self, chosen: backend.Chosen) -> Any:
        """What shows a profile that this op runs."""
        return torch.profiler.record_function(f"rayfuse::{self.name} on {chosen.name}")

    def _positional(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        """All tensors, then all scalars."""
        # Dynamo of torch 2.11 knows these methods of a set, and no operators on keys
        if (
            len(args) != len(self._required)
            or not self._mandatory.issubset(named)
            or not self._known.issuperset(named)
        ):
            try:
                bound = inspect.Signature(self.parameters).bind(*args, **named)
            except TypeError as error:
                raise TypeError(f"{self.name}: {error}") from None
            named, args = bound.kwargs, bound.args
        values = {**self._keywords, **dict(zip(self._required, args, strict=True)), **named}
        return tuple([values[name] for name in self.domain])

    def raw(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        """What the raw forward takes, of the arguments of the public function, checked."""
        args = self._positional(args, named)
        self._check_once(args)
        return self._encoded(args) if self.scalars else args

    def _encoded(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """As the raw ops take them."""
        scalars = zip(self.scalars, args[len(self.inputs) :], strict=True)
        return *args[: len(self.inputs)], *[scalar.encode(value) for scalar, value in scalars]

    def raw_arguments(self, tensors: Sequence[Tensor | None], **named: Any) -> tuple[Any, ...]:
        """What the raw forward takes: these tensors, and scalars by name or default.

        A name that belongs to a tensor stands for it: None makes it absent.
        """
        values = {**self._keywords, **dict(zip(self.inputs, tensors, strict=True)), **named}
        return self._encoded(tuple(values[name] for name in self.domain))

    # ---- checks

    def _check_once(self, args: Sequence[Any]) -> None:
        """Check arguments unless some of the same shapes, dtypes and devices have passed before."""
        if torch.compiler.is_compiling() or backend.debugging():
            return self.check(args)
        try:
            arity = len(self.inputs)
            key: tuple[Any, ...] = tuple(
                [x if x is None else (x.shape, x.dtype, x.device) for x in args[:arity]]
            )
            if self.scalars:
                key += tuple([(x, type(x)) for x in args[arity:]])
            passed = key in self._passed
        except (AttributeError, TypeError):  # not a tensor, not hashable
            return self.check(args)
        if not passed:
            self.check(args)
            self._passed.add(key)

    def check(self, args: Sequence[Any]) -> None:
        """Raise ValueError or TypeError, in one wording, unless the arguments fit the spec."""
        tensors = args[: len(self.inputs)]
        for array, arg in zip(self.signature.inputs, tensors, strict=True):
            if not (isinstance(arg, Tensor) or (array.optional and arg is None)):
                rule = "be a tensor or None" if array.optional else "be a tensor"
                self._fail(TypeError, array.name, rule, type(arg).__name__)
        named = {n: x for n, x in zip(self.inputs, tensors, strict=True) if x is not None}
        first_name, first = self.inputs[0], tensors[0]
        for name, arg in named.items():
            self._check_dtype(name, arg.dtype, first_name, first.dtype)
            if arg.device != first.device:
                self._fail(ValueError, name, f"be on {first.device} like {first_name}", arg.device)
        try:
            self.signature.bind(_shapes(tensors))
        except dims.ShapeError as error:
            raise ValueError(f"{self.name}: {error}") from None
        for scalar, value in zip(self.scalars, args[len(self.inputs) :], strict=True):
            self._check_scalar(scalar, value)
        if backend.debugging():
            self._check_values(named)

    def _check_dtype(self, name: str, dtype: torch.dtype, first: str, want: torch.dtype) -> None:
        if name in self.integer:
            if dtype != torch.int64:
                self._fail(TypeError, name, "be int64", _plain(dtype))
            return
        narrowed = name in self.narrow and want == torch.float32 and dtype in HALVES
        if dtype is not want and not narrowed:
            rule = f"be {_plain(want)} like {first}"
            if name in self.narrow and want == torch.float32:
                rule += f", or {' or '.join(map(_plain, HALVES))}"
            self._fail(TypeError, name, rule, _plain(dtype))
        if want not in FLOATS:
            rule = "be " + ", ".join(map(_plain, FLOATS[:-1])) + f" or {_plain(FLOATS[-1])}"
            self._fail(TypeError, first, rule, _plain(want))

    def _check_scalar(self, scalar: Scalar, value: Any) -> None:
        if torch.compiler.is_compiling():
            return  # a float may be symbolic; the raw op checks it when it runs
        if not scalar.fits(value):
            error = ValueError if isinstance(value, str) and scalar.choices else TypeError
            self._fail(error, scalar.name, scalar.rule, repr(value))
        domain = self.domain[scalar.name]
        if scalar.kind is float and not domain.holds(torch.tensor(float(value))):
            self._fail(ValueError, scalar.name, domain.rule, f"{value:g}")

    def _check_values(self, named: dict[str, Tensor]) -> None:
        _, sizes = self.signature.bind(_shapes([named.get(name) for name in self.inputs]))
        for name, arg in named.items():
            domain = self.domain[name]
            size = [sizes[domain.size]] if domain.size else []
            holds = domain.holds(arg.detach(), *size)
            wrong = holds.logical_not().nonzero()
            if len(wrong):
                at = wrong[0].tolist()
                # a difference is one shorter than the values: the later of the two is named
                at[-1] += arg.shape[-1] - holds.shape[-1]
                self._fail(ValueError, name, domain.rule, f"{arg[tuple(at)].item():g} at {at}")

    def check_integers(self, tensors: Sequence[Tensor | None]) -> None:
        """Raise ValueError unless the integers among the inputs are in their domains."""
        _, sizes = self.signature.bind(_shapes(tensors))
        for name, x in zip(self.inputs, tensors, strict=True):
            if x is None or name not in self.integer:
                continue
            domain = self.domain[name]
            wrong = domain.holds(x, sizes[domain.size or ""]).logical_not().nonzero()
            if len(wrong):
                at = wrong[0].tolist()
                self._fail(ValueError, name, domain.rule, f"{x[tuple(at)].item()} at {at}")

    def _fail(self, error: type[Exception], name: str, rule: str, got: object) -> None:
        raise error(f"{self.name}: {name} must {rule}, got {got}")

    # ---- the reference as a backend

    def _reference(self, *args: Any) -> Any:
        return self._referred(self.reference, args)

    def _reference_fwd(self, *args: Any) -> Any:
        out = self._reference(*args)
        return (*as_tuple(out), *self._referred(self._keep, args)) if self._keep else out

    def _referred(self, reference: Callable, args: Sequence[Any]) -> Any:
        tensors = [_accumulated(x) for x in args[: len(self.inputs)]]
        values = dict(zip(self.inputs, tensors, strict=True))
        required = [values.pop(name) for name in self._required]
        scalars = zip(self.scalars, args[len(self.inputs) :], strict=True)
        named = {scalar.name: scalar.decode(value) for scalar, value in scalars}
        return reference(*required, **values, **named)

    def _reference_bwd(self, *args: Any) -> Any:
        d_outputs, raw, needs = self._split_bwd(args)
        wide, wanted = [*raw], {}
        for bit, i in enumerate(self.differentiable):
            if raw[i] is not None and needs >> bit & 1:
                wide[i] = wanted[i] = _accumulated(raw[i].detach()).requires_grad_()
        # below the dispatcher autograd's keys are excluded, and a reference is differentiated there
        below = torch._C._SetExcludeDispatchKeyGuard
        with below(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
            found = gradients(self._reference(*wide), [*wanted.values()], d_outputs)
        grads = {i: grad.to(raw[i].dtype) for i, grad in zip(wanted, found, strict=True)}
        out = [
            grads[i] if i in grads else (raw[0] if raw[i] is None else raw[i]).new_empty(0)
            for i in self.differentiable
        ]
        return out[0] if len(out) == 1 else tuple(out)

    def _split_bwd(self, args: tuple[Any, ...]) -> tuple[list[Any], list[Any], int]:
        """The gradients of the outputs, the arguments of the forward, and `needs`."""
        outputs = len(self.outputs)
        return [*args[:outputs]], [*args[outputs + len(self.signature.kept) : -1]], args[-1]

    def bind(self, args: Sequence[Any]) -> tuple[tuple[int, ...], dict[str, int]]:
        """The leading shape and the sizes that these arguments give the outputs."""
        return self.signature.bind(_shapes(args[: len(self.inputs)]))

    # ---- torch.ops

    def _register(self, namespace: str) -> torch.library.Library:
        """Define both ops in a namespace; `rayfuse` itself dispatches, the others are libraries."""
        library = torch.library.Library(namespace, "FRAGMENT")
        inputs = [f"Tensor{'?' * x.optional} {x.name}" for x in self.signature.inputs]
        inputs += [scalar.schema for scalar in self.scalars]
        # of several outputs a loss often uses some
        d_output = "Tensor" if len(self.outputs) == 1 else "Tensor?"
        d_outputs = [f"{d_output} {_GRADIENT_PREFIX}{name}" for name in self.outputs]
        kept = [f"Tensor {array.name}" for array in self.signature.kept]
        results = len(d_outputs) + len(kept)
        directions = {
            self.name: (inputs, results, self._fake_fwd, self.run_fwd),
            f"{self.name}_bwd": (
                [*d_outputs, *kept, *inputs, "int needs"],
                len(self.differentiable),
                self._fake_bwd,
                self.run_bwd,
            ),
        }
        if namespace != "rayfuse":
            # sums over all rays, and the gradients of these, times a number each
            numbers = [f"float {_GRADIENT_PREFIX}{name}" for name in self.outputs]
            tensors = ", ".join(["Tensor"] * (len(numbers) + len(self.differentiable)))
            library.define(
                f"{self.name}_fwd_bwd({', '.join([*numbers, *inputs, 'int needs'])}) -> ({tensors})"
            )
        for name, (parameters, results, fake, run) in directions.items():
            returns = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
            library.define(f"{name}({', '.join(parameters)}) -> {returns}")
            torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
            if namespace == "rayfuse":
                library.impl(name, run, "CompositeExplicitAutograd")
                batched = functools.partial(self._batched, name)
                torch.library.register_vmap(f"{namespace}::{name}", batched, lib=library)
        return library

    def run_fwd(self, *args: Any) -> Any:
        """The raw forward on the backend that is chosen for these tensors."""
        self._check_raw(args)
        return self.kernels.choose(args[0].device.type).run_fwd(args)

    def run_bwd(self, *args: Any) -> Any:
        """The raw backward: gradients of the inputs, empty where `needs` has no bit."""
        _, raw, needs = self._split_bwd(args)
        self._check_raw(raw)
        leading, sizes = self.bind(raw)
        named = [(_GRADIENT_PREFIX + array.name, array) for array in self.signature.outputs]
        named += [(array.name, array) for array in self.signature.kept]
        for (name, array), x in zip(named, args, strict=False):
            shape = list(array.shape(leading, sizes))
            if x is not None and list(x.shape) != shape:
                self._fail(ValueError, name, f"have shape {shape}", list(x.shape))
        return self.kernels.choose(raw[0].device.type).run_bwd(args[:-1], needs)

    def _check_raw(self, raw: Sequence[Any]) -> None:
        for scalar, value in zip(self.scalars, raw[len(self.inputs) :], strict=True):
            if scalar.choices and not 0 <= value < len(scalar.choices):
                self._fail(ValueError, scalar.name, f"be < {len(scalar.choices)}", value)
        scalars = zip(self.scalars, raw[len(self.inputs) :], strict=True)
        self._check_once((*raw[: len(self.inputs)], *[s.decode(value) for s, value in scalars]))

    def _fake_fwd(self, *raw: Any) -> Any:
        leading, sizes = self.bind(raw)
        dtype = accumulator(raw[0].dtype)
        outputs = [
            raw[0].new_empty(array.shape(leading, sizes), dtype=dtype)
            for array in (*self.signature.outputs, *self.signature.kept)
        ]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _fake_bwd(self, *args: Any) -> Any:
        _, raw, needs = self._split_bwd(args)
        grads = [
            raw[0].new_empty(0)
            if raw[i] is None
            else raw[i].new_empty(raw[i].shape if needs >> bit & 1 else (0,))
            for bit, i in enumerate(self.differentiable)
        ]
        return grads[0] if len(grads) == 1 else tuple(grads)

    def _batched(self, name: str, info: Any, in_dims: Any, *args: Any) -> Any:
        """vmap of a raw op."""
        self.check_batchable()
        out = getattr(torch.ops.rayfuse, name)(*_batch_first(info, in_dims, args))
        # gradients that are not needed are empty, and have no batch dimension
        if isinstance(out, Tensor):
            return out, 0
        return out, tuple(None if x.shape == (0,) else 0 for x in out)

    def check_batchable(self) -> None:
        """Raise NotImplementedError unless a batch is one more leading dimension."""
        if not all(array.leading for array in (*self.signature.inputs, *self.signature.outputs)):
            raise NotImplementedError(
                f"{self.name}: vmap needs leading dimensions, and there are none here: "
                "concatenate the batch instead"
            )

    # ---- autograd

    def differentiable_bwd(
        self, d_outputs: Sequence[Tensor | None], raw: Sequence[Any], wanted: Sequence[int]
    ) -> list[Tensor | None]:
        """The gradients as a graph, for a second derivative, by the reference."""
        # aliases: where an input was computed from another one, its own share alone is ours
        raw = [x.view_as(x) if i in wanted else x for i, x in enumerate(raw)]
        inputs = [raw[i] for i in wanted]
        grads = gradients(self._reference(*raw), inputs, d_outputs, create_graph=True)
        found = dict(zip(wanted, grads, strict=True))
        return [found.get(i) for i in self.differentiable]

    def needs(self, wanted: Sequence[int]) -> int:
        """The bits that ask the raw backward for the gradients of these inputs."""
        return sum([1 << bit for bit, i in enumerate(self.differentiable) if i in wanted])

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
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def value(array: dims.Array) -> Tensor:
            domain, shape = self.domain[array.name], array.shape(leading, sizes)
            u = torch.rand(shape, generator=generator, dtype=wide)
            if domain.size:
                return domain.from_uniform(u, sizes[domain.size])
            return domain.from_uniform(u).to(dtype)

        return [value(array) for array in self.signature.inputs]


# Functions find their op here by name: a compiler can trace a global, not an object in a closure
_OPS: dict[str, Op] = {}


def _autograd_functions(
    name: str, arity: int, outputs: int
) -> tuple[type[torch.autograd.Function], ...]:
    """(reduction, denominator, *tensors, *scalars) -> outputs as an autograd Function, twice.

    torch.func and torch.compile want `setup_context`, which doubles the cost of an eager call, and
    what is kept for the backward among the outputs.
    """
    raw = getattr(torch.ops.rayfuse, name).default
    raw_bwd = getattr(torch.ops.rayfuse, f"{name}_bwd").default

    def run(args: Sequence[Any]) -> Any:
        if torch.compiler.is_compiling():
            return raw(*args)
        # past torch.ops, which costs more than all the rest of an eager call
        return _OPS[name].kernels.choose(args[0].device.type).run_fwd(args)

    def reduce(out: tuple[Tensor, ...], reduction: str | None, denominator: Any) -> list[Tensor]:
        return [reduced(x, reduction, denominator) for x in out]

    def save(
        ctx: Any,
        reduction: str | None,
        denominator: Any,
        args: Sequence[Any],
        kept: Sequence[Tensor],
        shape: Sequence[int],
    ) -> None:
        ctx.save_for_backward(*args[:arity], *kept)
        ctx.scalars = args[arity:]
        ctx.reduction, ctx.denominator, ctx.shape = reduction, denominator, shape
        # the backward may run in another thread, where another backend is forced
        ctx.backend = None if torch.compiler.is_compiling() else backend.last_backend()
        if outputs > 1:  # of which a loss may use some
            ctx.set_materialize_grads(False)

    def per_ray(ctx: Any, d_output: Tensor | None) -> Tensor | None:
        """The gradient of each ray's loss, from that of the reduced one."""
        if d_output is None:
            return None
        return _divided(d_output, ray_count(ctx.shape, ctx.reduction, ctx.denominator), ctx.shape)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, reduction: str | None, denominator: Any, *args: Any) -> Any:
            out = as_tuple(run(args))
            save(ctx, reduction, denominator, args, out[outputs:], out[0].shape)
            results = reduce(out[:outputs], reduction, denominator)
            return results[0] if outputs == 1 else tuple(results)

        @staticmethod
        def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
            op, saved, d_outputs = _OPS[name], ctx.saved_tensors, d_outputs[:outputs]
            args, kept = (*saved[:arity], *ctx.scalars), saved[arity:]
            wanted = [i for i in op.differentiable if ctx.needs_input_grad[2 + i]]
            if ctx.reduction in ("mean", "sum"):
                d_outputs = tuple([per_ray(ctx, d_output) for d_output in d_outputs])
            if torch.compiler.is_compiling():
                grads = raw_bwd(*d_outputs, *kept, *args, op.needs(wanted))
            elif torch.is_grad_enabled():
                grads = op.differentiable_bwd(d_outputs, args, wanted)
            else:
                chosen = op.kernels.choose(args[0].device.type, ctx.backend)
                grads = chosen.run_bwd((*d_outputs, *kept, *args), op.needs(wanted))
            found: list[Tensor | None] = [None] * (2 + len(args))
            for i, grad in zip(op.differentiable, as_tuple(grads), strict=True):
                if i in wanted:
                    found[2 + i] = grad
            return tuple(found)

    class Transformable(Function):
        @staticmethod
        def forward(reduction: str | None, denominator: Any, *args: Any) -> Any:  # type: ignore[override]
            out = as_tuple(run(args))
            results = (*reduce(out[:outputs], reduction, denominator), *out[outputs:])
            return results[0] if len(results) == 1 else results

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            reduction, denominator, *args = inputs
            op = _OPS[name]
            shape = op.signature.shape_of_first_output(args[:arity])
            save(ctx, reduction, denominator, args, as_tuple(output)[outputs:], shape)

        @staticmethod
        def vmap(
            info: Any, in_dims: Any, reduction: str | None, denominator: Any, *args: Any
        ) -> Any:
            _OPS[name].check_batchable()
            args = _batch_first(info, in_dims[2:], args)

            def reduce_each(loss: Tensor) -> Tensor:
                total = loss.unsqueeze(-1).flatten(1).sum(1)
                count = ray_count(loss.shape[1:], reduction or "", denominator)
                return total if count is None else total / count

            if reduction not in ("mean", "sum"):
                out = Transformable.apply(reduction, None, *args)
            else:
                each = as_tuple(Transformable.apply("none", None, *args))
                out = (*map(reduce_each, each[:outputs]), *each[outputs:])
                out = out[0] if len(out) == 1 else out
            return out, torch.utils._pytree.tree_map(lambda _: 0, out)

    Function.__name__ = Function.__qualname__ = f"{name}.Function"
    return Function, Transformable


def is_transformed() -> bool:
    """Whether torch.compile or torch.func look at what is called."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def wants_gradient(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        [isinstance(x, Tensor) and x.requires_grad for x in args]
    )


def gradients(
    outputs: Any, wanted: Sequence[Tensor], d_outputs: Sequence[Tensor | None], **options: Any
) -> Sequence[Tensor]:
    """torch.autograd.grad, where outputs may have no gradient and inputs no influence."""
    pairs = [
        (y, d_y)
        for y, d_y in zip(as_tuple(outputs), d_outputs, strict=True)
        if d_y is not None and y.requires_grad
    ]
    if not (pairs and wanted):
        return [torch.zeros_like(x) for x in wanted]
    used, d_used = zip(*pairs, strict=True)
    return torch.autograd.grad(used, wanted, d_used, materialize_grads=True, **options)


def _batch_first(info: Any, in_dims: Sequence[int | None], args: Sequence[Any]) -> tuple[Any, ...]:
    """A batch dimension is one more leading dimension."""

    def to_front(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

    return tuple(map(to_front, args, in_dims))


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALVES else dtype


def _accumulated(x: Any) -> Any:
    return x.to(accumulator(x.dtype)) if isinstance(x, Tensor) else x


def _shapes(tensors: Sequence[Tensor | None]) -> list[tuple[int, ...] | None]:
    return [None if x is None else x.shape for x in tensors]


def check_reduction(function: str, reduction: str, denominator: object) -> None:
    """Raise ValueError unless a loss can be reduced so."""
    if reduction not in ("mean", "sum", "none"):
        rule = f"be 'mean', 'sum' or 'none', got {reduction!r}"
        raise ValueError(f"{function}: reduction must {rule}")
    if denominator is not None and reduction != "mean":
        rule = f"come with reduction='mean', got reduction={reduction!r}"
        raise ValueError(f"{function}: denominator must {rule}")


def reduced(loss: Tensor, reduction: str | None, denominator: float | Tensor | None) -> Tensor:
    """Over all rays, the same to the bit for any number of threads; None leaves them alone."""
    if reduction not in ("mean", "sum"):
        return loss
    count, total = ray_count(loss.shape, reduction, denominator), sum_of_rays(loss)
    return total if count is None else _divided(total, count, ())


def _divided(x: Tensor, count: float | Tensor | None, shape: Sequence[int]) -> Tensor:
    """A number divided by how many there are, in every place of a shape.

    On a CPU, where nothing traces what becomes of it, Python divides in a fraction of the time of
    torch's operators, and to the bit alike: torch would first round other counts to the type of x.
    """
    if (
        (count is None or (isinstance(count, int) and 0 < count <= 1 << 24))
        and type(x) is Tensor
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    ):
        return x.new_full(shape, x.item() / (count or 1))
    x = x.expand(shape)
    return x if count is None else x / count


def ray_count(
    rays: Sequence[int], reduction: str, denominator: float | Tensor | None
) -> float | Tensor | None:
    """What divides the sum: no rays give the exact 0 of an empty sum, not 0 / 0."""
    if reduction == "sum":
        return None
    return max(1, math.prod(rays)) if denominator is None else denominator
