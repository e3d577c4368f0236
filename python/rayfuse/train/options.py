"""The configuration of a run: what all jobs share, presets and the command line, and JSON."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from rayfuse.train import InputError


def hint(metavar: str, default: str) -> Any:
    """How --help shows an option whose default is worked out later."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"({default})")


@dataclass
class RunConfig:
    """What every job has to be told."""

    scene: Annotated[
        Path | None, tyro.conf.Positional, hint("[SCENE]", "default: the Motorcycle pair")
    ] = None
    """Folder with transforms.json, or that file."""
    preset: Annotated[str, hint("NAME", "default: demo for the Motorcycle pair, else photos")] = ""
    """Where all other values start, see above."""
    downscale: Annotated[int, hint("N", "default: 2 for the Motorcycle pair, else 1")] = 0
    """Average the photographs over blocks of N x N pixels."""
    steps: int = 3000
    """Training steps; the learning rates reach their end at the last one."""
    output: Annotated[Path | None, hint("DIR", "default: runs/<scene>-<date>-<time>")] = None
    """Folder for the run, new or empty."""
    resume: Annotated[Path | None, hint("DIR", "default: a new run")] = None
    """Folder of a run to continue from its checkpoint; only --steps and --device then count."""
    seed: int = 0
    """Same seed, same run, bit for bit on a CPU."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, xpu, ..."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written at the end and on Ctrl-C."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""


AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


def parse(
    command: str, presets: dict[str, tuple[str, AnyConfig]], arguments: Sequence[str]
) -> AnyConfig:
    """The configuration of a command line; leaves with code 0 for --help, 2 for bad options.

    Args:
        presets: what each is for, and its values: the first is that of the Motorcycle pair, the
            second that of a scene, where --preset does not name one.
    """
    own, photos, *_ = presets
    name = _preset_of(arguments)
    config = _parse_from(command, presets, name or own, arguments)
    if name or config.scene is None:
        return config
    return _parse_from(command, presets, photos, arguments)


def _preset_of(arguments: Sequence[str]) -> str:
    for number, option in enumerate(arguments):
        if option == "--preset":
            return "".join(arguments[number + 1 : number + 2])
        if option.startswith("--preset="):
            return option.partition("=")[2]
    return ""


def _parse_from(
    command: str,
    presets: dict[str, tuple[str, AnyConfig]],
    name: str,
    arguments: Sequence[str],
) -> AnyConfig:
    if name not in presets:
        raise InputError(f"--preset must be one of {', '.join(presets)}, got {name!r}")
    default = replace(presets[name][1], preset=name)
    listed = "\n\n".join(f"preset {key}: {about}." for key, (about, _) in presets.items())
    return tyro.cli(
        type(default),
        args=list(arguments),
        prog=f"rayfuse {command}",
        default=default,
        description=f"{inspect.getdoc(type(default))}\n\n{listed}",
    )


def require_positive(values: dict[str, float]) -> None:
    """Raises InputError for the first of these options that is below 1."""
    for name, value in values.items():
        if value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")


def to_json(config: Any) -> Any:
    """A dataclass as nested dicts of JSON values."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return str(config) if isinstance(config, Path) else config


def from_json(kind: Any, value: Any) -> Any:
    """The inverse of to_json, for the type `kind`; unknown keys raise KeyError."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = value.keys() - hints.keys()
        if unknown:
            raise KeyError(f"unknown settings {sorted(unknown)}")
        return kind(**{key: from_json(hints[key], item) for key, item in value.items()})  # type: ignore[operator]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        return None if value is None else from_json(options[0], value)
    if kind is Path:
        return Path(value)
    return tuple(value) if typing.get_origin(kind) is tuple else value
