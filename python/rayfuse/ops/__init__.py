"""One module an op, found by name."""

import importlib
import pkgutil

__all__ = [module.name for module in pkgutil.iter_modules(__path__)]

for _stem in __all__:
    globals()[_stem] = getattr(importlib.import_module(f"{__name__}.{_stem}"), _stem)
