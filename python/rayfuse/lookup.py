"""Ops without a gradient, whose results may be integers, and as many as values say.

    intersect = Lookup(reference, "(Tensor means2d, int tile_size) -> (Tensor, Tensor)", fake)

They have what the engine of differentiable ops (module `op`) gives but for its shapes: the schema
`rayfuse::<name of the reference>`, kernels found by that name, a fake kernel, and any backend that
is forced. Their checks are those of the functions that call them. A backend without such kernels,
as triton, leaves them to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backend


class Lookup:
    """All that is derived from a reference and its schema."""

    def __init__(self, reference: Callable, schema: str, fake: Callable) -> None:
        """Register the op.

        Args:
            reference: plain PyTorch; takes what the schema names, as kernels do.
            schema: parameters and returns, as torch.library takes them behind a name.
            fake: from the same parameters, empty tensors of the results' shapes and dtypes; a size
                that values decide is `torch.library.get_ctx().new_dynamic_size()`.
        """
        self.name = reference.__name__.removeprefix("_")
        self.reference = reference
        self.kernels = backend.Kernels(self.name, reference)
        self._libraries = [
            self._register(namespace, schema, fake)
            for namespace in ("rayfuse", *map(backend.library_namespace, backend.LIBRARIES))
        ]

    def __call__(self, *args: Any) -> Any:
        """Results of the backend that is chosen for the first argument, without a gradient."""
        args = tuple([x.detach() if isinstance(x, Tensor) else x for x in args])
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return getattr(torch.ops.rayfuse, self.name)(*args)
        return self.run(*args)

    def run(self, *args: Any) -> Any:
        """The raw op."""
        with torch.no_grad():
            return self.kernels.choose(args[0].device.type).run_fwd(args)

    def _register(self, namespace: str, schema: str, fake: Callable) -> torch.library.Library:
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(self.name + schema)
        torch.library.register_fake(f"{namespace}::{self.name}", fake, lib=library)
        if namespace == "rayfuse":
            library.impl(self.name, self.run, "CompositeExplicitAutograd")
        return library
