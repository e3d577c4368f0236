"""The dims string of an op: `t[..., S+1] w[..., S] background?[..., C] -> loss[...]`.

What the forward leaves to the backward alone follows: `-> loss[...] keeps error[..., C]`.

`...` stands for any number of leading dimensions, shared by all arguments; a capital letter is a
size, found where it first occurs; a number is itself; `?` marks an argument that may be absent.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_ARRAY = re.compile(r"(\w+)(\??)\[([^\]]*)\]")
_DIM = re.compile(r"(?:([A-Z])([+-]\d+)?|(\d+))")


@dataclass(frozen=True)
class Array:
    """One named array: its trailing dims as (letter, offset) or (None, size)."""

    name: str
    text: str
    leading: bool
    optional: bool
    dims: tuple[tuple[str | None, int], ...]

    def shape(self, leading: tuple[int, ...], sizes: dict[str, int]) -> tuple[int, ...]:
        # a size that only absent arguments have is 0
        trailing = (offset + sizes.get(letter or "", 0) for letter, offset in self.dims)
        return (*(leading if self.leading else ()), *trailing)


class ShapeError(ValueError):
    """Carries what an array must look like and what it looks like."""


@dataclass(frozen=True)
class Signature:
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    kept: tuple[Array, ...]

    @classmethod
    def parse(cls, text: str) -> Signature:
        """Parse a dims string; raises ValueError where it breaks the grammar."""
        sides = text.split("->")
        if len(sides) != 2:
            raise ValueError(f"dims must read 'inputs -> outputs', got {text!r}")
        outputs, _, kept = sides[1].partition(" keeps ")
        return cls(*(tuple(map(_array, _ARRAY.finditer(x))) for x in (sides[0], outputs, kept)))

    def bind(
        self, shapes: Sequence[tuple[int, ...] | None]
    ) -> tuple[tuple[int, ...], dict[str, int]]:
        """The leading shape and the sizes that input shapes imply; raises ShapeError.

        None is the shape of an absent argument.
        """
        leading: tuple[int, ...] | None = None
        sizes: dict[str, int] = {}
        sources: dict[str, str] = {}
        for array, shape in zip(self.inputs, shapes, strict=True):
            if shape is None:
                continue
            split = len(shape) - len(array.dims)
            if split < 0 or (split and not array.leading):
                raise ShapeError(self._must(array, leading, sizes, sources, shape))
            if array.leading:
                if leading is None:
                    leading, sources["..."] = tuple(shape[:split]), array.name
                elif leading != tuple(shape[:split]):
                    raise ShapeError(self._must(array, leading, sizes, sources, shape))
            for (letter, offset), size in zip(array.dims, shape[split:], strict=True):
                if letter is None:
                    fits = size == offset
                else:
                    sources.setdefault(letter, array.name)
                    fits = sizes.setdefault(letter, size - offset) == size - offset >= 0
                if not fits:
                    raise ShapeError(self._must(array, leading, sizes, sources, shape))
        return leading or (), sizes

    def shape_of_first_output(self, inputs: Sequence[Any]) -> tuple[int, ...]:
        """Its shape for inputs that fit, as compilers can trace it; outputs alike have this one."""
        first = self.outputs[0]
        present = [(a, x) for a, x in zip(self.inputs, inputs, strict=True) if x is not None]
        shape = []
        if first.leading:
            x, trailing = next((x, len(array.dims)) for array, x in present if array.leading)
            shape += x.shape[: x.dim() - trailing]
        for letter, offset in first.dims:
            if letter is None:
                shape.append(offset)
                continue
            for array, x in present:
                found = [k for k, (other, _) in enumerate(array.dims) if other == letter]
                if found:
                    k = found[0] - len(array.dims)
                    shape.append(x.shape[k] - array.dims[k][1] + offset)
                    break
        return tuple(shape)

    def _must(
        self,
        array: Array,
        leading: tuple[int, ...] | None,
        sizes: dict[str, int],
        sources: dict[str, str],
        shape: tuple[int, ...],
    ) -> str:
        if array is self.inputs[0]:
            known = "".join(f", {k} >= {max(0, -o)}" for k, o in array.dims if k)
            known = known and " with" + known[1:]
        else:
            found: dict[str, object] = {}
            if array.leading and leading is not None:
                found["..."] = list(leading)
            found |= {k: sizes[k] for k, _ in array.dims if k and k in sizes}
            parts = [
                f"{', '.join(f'{k}={found[k]}' for k in of)} (from {source})"
                for source, of in itertools.groupby(found, sources.__getitem__)
            ]
            known = f" with {', '.join(parts)}" if parts else ""
        return f"{array.name} must have shape [{array.text}]{known}, got {list(shape)}"


def _array(match: re.Match[str]) -> Array:
    name, mark, text = match.groups()
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    leading = parts[:1] == ["..."]
    dims = []
    for part in parts[leading:]:
        found = _DIM.fullmatch(part)
        if found is None:
            raise ValueError(f"{name}: a dim must be a capital, a capital +- n or n, got {part!r}")
        letter, offset, number = found.groups()
        dims.append((letter, int(offset or 0)) if letter else (None, int(number)))
    return Array(name, ", ".join(parts), leading, bool(mark), tuple(dims))
