"""One module an op, found by name; a module may define more public functions in its `__all__`."""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

# what is found below, for those who import it from here
if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


STEMS = tuple(module.name for module in pkgutil.iter_modules(__path__))
__all__: list[str] = []

for _stem in STEMS:
    _module = importlib.import_module(f"{__name__}.{_stem}")
    _names = getattr(_module, "__all__", [_stem])
    globals().update({name: getattr(_module, name) for name in _names})
    __all__ += _names
