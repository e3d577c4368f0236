"""Packages of one module a stem, found by name; a module may define more public names than its
stem in its `__all__`."""

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any


def public(
    package: str, path: Iterable[str], namespace: dict[str, Any]
) -> tuple[tuple[str, ...], list[str]]:
    """The stems of a package, and the public names of its modules, which it gets as its own."""
    stems = tuple(module.name for module in pkgutil.iter_modules(path))
    names: list[str] = []
    for stem in stems:
        module = importlib.import_module(f"{package}.{stem}")
        own = getattr(module, "__all__", [stem])
        namespace.update({name: getattr(module, name) for name in own})
        names += own
    return stems, names
