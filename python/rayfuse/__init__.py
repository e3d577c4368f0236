"""Fused losses and compositing for training neural fields, as drop-in torch ops."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .backend import (
    BackendError,
    backends,
    debug,
    last_backend,
    release_memory,
    use_backend,
)
from .lookups import *  # noqa: F403
from .lookups import __all__ as _lookups
from .objective import (
    FieldLosses,
    field_losses,
    field_objective,
    packed_field_losses,
    packed_field_objective,
)
from .ops import *  # noqa: F403
from .ops import __all__ as _ops
from .packed import ray_offsets

try:
    __version__ = version("rayfuse")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"

__all__ = [
    "BackendError",
    "FieldLosses",
    "backends",
    "debug",
    "field_losses",
    "field_objective",
    "last_backend",
    "packed_field_losses",
    "packed_field_objective",
    "ray_offsets",
    "release_memory",
    "use_backend",
    *_lookups,
    *_ops,
]

if TYPE_CHECKING:  # ops are found by file, where a type checker does not look

    def __getattr__(name: str) -> Any: ...
