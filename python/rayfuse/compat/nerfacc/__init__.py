"""nerfacc 0.5.3 on rayfuse: packed rays by its names, on any device (docs/compat.md).

Import from here, or `install()` once, before what imports nerfacc.
"""

from __future__ import annotations

import sys
from types import ModuleType

from . import data_specs, estimators, grid, losses, pack, pdf, scan, volrend
from .data_specs import RayIntervals, RaySamples
from .estimators import occ_grid, prop_net
from .estimators.occ_grid import OccGridEstimator
from .estimators.prop_net import PropNetEstimator
from .grid import ray_aabb_intersect, traverse_grids
from .pack import pack_info
from .pdf import importance_sampling, searchsorted
from .scan import exclusive_prod, exclusive_sum, inclusive_prod, inclusive_sum
from .volrend import (
    accumulate_along_rays,
    accumulate_along_rays_,
    render_transmittance_from_alpha,
    render_transmittance_from_density,
    render_visibility_from_alpha,
    render_visibility_from_density,
    render_weight_from_alpha,
    render_weight_from_density,
    rendering,
)

__all__ = [
    "OccGridEstimator",
    "PropNetEstimator",
    "RayIntervals",
    "RaySamples",
    "accumulate_along_rays",
    "accumulate_along_rays_",
    "exclusive_prod",
    "exclusive_sum",
    "importance_sampling",
    "inclusive_prod",
    "inclusive_sum",
    "install",
    "pack_info",
    "ray_aabb_intersect",
    "render_transmittance_from_alpha",
    "render_transmittance_from_density",
    "render_visibility_from_alpha",
    "render_visibility_from_density",
    "render_weight_from_alpha",
    "render_weight_from_density",
    "rendering",
    "searchsorted",
    "traverse_grids",
    "uninstall",
]

# of the nerfacc whose names and arguments these are
__version__ = "0.5.3"

_MODULES = {
    module.__name__.replace(__name__, "nerfacc", 1): module
    for module in (
        *(sys.modules[__name__], data_specs, estimators, occ_grid, prop_net),
        *(grid, losses, pack, pdf, scan, volrend),
    )
}
# what was imported before install()
_hidden: dict[str, ModuleType] = {}


def install() -> list[str]:
    """Let `import nerfacc`, and its modules, mean this package, be nerfacc installed or not.

    A second call changes nothing. What has imported nerfacc before keeps what it has.

    Returns:
        The names of the modules.
    """
    if sys.modules.get("nerfacc") is not _MODULES["nerfacc"]:
        _hidden.update(_loaded())
        for name in _hidden:
            del sys.modules[name]
        sys.modules.update(_MODULES)
    return [*_MODULES]


def uninstall() -> None:
    """Put back what `install` replaced."""
    if sys.modules.get("nerfacc") is _MODULES["nerfacc"]:
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(_hidden)
        _hidden.clear()


def _loaded() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "nerfacc"}
