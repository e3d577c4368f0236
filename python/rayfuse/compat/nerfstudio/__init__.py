"""nerfstudio 1.1.5 on rayfuse: `install()` once, and its models train with it (docs/compat.md)."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from .. import swap_everywhere
from . import losses, rays, renderers

__all__ = ["install", "uninstall"]

_MODULES = ("model_components.losses", "model_components.renderers", "cameras.rays")
# losses that stand in the place of others
_losses: dict[Callable, Callable] = {}
# method that was replaced -> how to put it back
_undo: dict[str, Callable[[], None]] = {}


def install() -> list[str]:
    """Put rayfuse behind the losses, the weights and the renderers of the installed nerfstudio.

    Modules that imported a loss by its name are served too. Packed samples, which nerfstudio gives
    to nerfacc, still go there. A second call changes nothing.

    Returns:
        The names of what is replaced.

    Raises:
        ImportError: if nerfstudio cannot be imported.
    """
    if not _undo:
        try:
            theirs = [importlib.import_module(f"nerfstudio.{name}") for name in _MODULES]
        except ImportError as error:
            raise ImportError(f"install: nerfstudio must be importable, got: {error}") from error
        _replace_losses(theirs[0])
        _replace_renderers(theirs[1])
        _replace_weights(theirs[2].RaySamples)
    return [*(function.__name__ for function in _losses), *_undo]


def uninstall() -> None:
    """Put back all that `install` replaced."""
    swap_everywhere(_losses)
    _losses.clear()
    while _undo:
        _undo.popitem()[1]()


def _replace_losses(module: Any) -> None:
    for name in losses.FUNCTIONS:
        theirs = getattr(module, name)
        _losses[_copy(getattr(losses, name), theirs)] = theirs
    swap_everywhere({theirs: ours for ours, theirs in _losses.items()})


def _copy(function: Callable, theirs: Callable) -> Callable:
    """A function of its own, to be told from what users import from here."""

    @functools.wraps(theirs)
    def call(*args: Any, **named: Any) -> Any:
        return function(*args, **named)

    return call


def _replace_weights(ray_samples: type) -> None:
    _replace_method(ray_samples, "get_weights", rays.get_weights)
    alphas = rays.get_weights_and_transmittance_from_alphas
    _replace_method(ray_samples, alphas.__name__, staticmethod(alphas))


def _replace_renderers(module: Any) -> None:
    def combine_rgb(cls: Any, rgb: Any, weights: Any, background_color: Any = "random") -> Any:
        if module.BACKGROUND_COLOR_OVERRIDE is not None:
            background_color = module.BACKGROUND_COLOR_OVERRIDE
        if not (isinstance(background_color, str) and background_color in renderers.BACKGROUNDS):
            shape = (*rgb.shape[:-2], rgb.shape[-1])
            background_color = cls.get_background_color(background_color, shape, rgb.device)
        return renderers.combine_rgb(rgb, weights, background_color)

    def depth(self: Any, weights: Any, ray_samples: Any) -> Any:
        frustums = ray_samples.frustums
        return renderers.render_depth(weights, frustums.starts, frustums.ends, self.method)

    def semantics(cls: Any, semantics: Any, weights: Any) -> Any:
        return renderers.render_semantics(semantics, weights)

    def normals(cls: Any, normals: Any, weights: Any, normalize: bool = True) -> Any:
        return renderers.render_normals(normals, weights, normalize)

    for owner, name, ours in (
        (module.RGBRenderer, "combine_rgb", combine_rgb),
        (module.DepthRenderer, "forward", depth),
        (module.SemanticRenderer, "forward", semantics),
        (module.NormalsRenderer, "forward", normals),
    ):
        theirs = vars(owner)[name]
        if isinstance(theirs, classmethod):
            _replace_method(owner, name, classmethod(_unless_packed(ours, theirs.__func__)))
        else:
            _replace_method(owner, name, _unless_packed(ours, theirs))


def _unless_packed(ours: Callable, theirs: Callable) -> Callable:
    arity = len(inspect.signature(ours).parameters)

    @functools.wraps(theirs)
    def call(*args: Any, **named: Any) -> Any:
        if len(args) > arity or named.get("ray_indices") is not None:
            return theirs(*args, **named)
        named.pop("ray_indices", None)
        named.pop("num_rays", None)
        return ours(*args, **named)

    return call


def _replace_method(owner: type, name: str, ours: Any) -> None:
    theirs = vars(owner)[name]
    setattr(owner, name, ours)
    _undo[f"{owner.__name__}.{name}"] = functools.partial(setattr, owner, name, theirs)
