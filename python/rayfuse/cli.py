"""The command line: `rayfuse train`, `splat`, `view` and `doctor`."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

USAGE = """\
usage: rayfuse COMMAND ...

  train    train a feature field on posed photographs and report how well it did
  splat    train Gaussian splats on posed photographs, and write them as .ply
  view     look at Gaussian splats in a browser
  doctor   show versions, backends and why each can or cannot run

`rayfuse COMMAND --help` explains a command.
"""
# command, and extra -> its configuration, and the module of the function of its name
JOBS = {
    "train": ("train.config", "train.trainer"),
    "splat": ("splat.config", "splat.trainer"),
    "view": ("splat.view", "splat.view"),
}
INSTALL = "needs the extra '{0}': pip install 'rayfuse[{0}]' (missing: {1})"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C, 141 where nobody
    reads on."""
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        # `rayfuse doctor | head`: what is left would fail once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _main(arguments: list[str]) -> int:
    command = arguments.pop(0) if arguments else ""
    if command in JOBS:
        return _run(command, arguments)
    if command == "doctor":
        from rayfuse import doctor

        return doctor.main()
    asked = command in ("-h", "--help", "help")
    if command == "--version":
        import rayfuse

        sys.stdout.write(f"rayfuse {rayfuse.__version__}\n")
        return 0
    if command and not asked:
        sys.stderr.write(f"rayfuse: COMMAND must be train, splat, view or doctor, got {command}\n")
    (sys.stdout if asked else sys.stderr).write(USAGE)
    return 0 if asked else 2


def _run(command: str, arguments: list[str]) -> int:
    """Runs a command that trains; whatever goes wrong by what the user gave is one line."""

    def say(*message: object) -> None:
        text = " ".join(" ".join(map(str, message)).split())
        sys.stderr.write(f"rayfuse {command}: {text}\n")

    try:
        from rayfuse.train import InputError, InputWarning

        parse, job = _job(command)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("rayfuse"):
            raise
        say(INSTALL.format(command, error.name))
        return 2
    plain = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, InputWarning):
            say(message)
        else:
            plain(message, category, *place, **more)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            return job(parse(arguments))
    except InputError as error:
        say(error)
        return 2
    except FloatingPointError as error:
        say(error)
        return 1
    except KeyboardInterrupt:
        say("stopped by Ctrl-C")
        return 130


def _job(command: str) -> tuple[Callable[[list[str]], Any], Callable[[Any], int]]:
    """What makes a configuration of a command's arguments, and what runs it."""
    config, job = (importlib.import_module(f"rayfuse.{module}") for module in JOBS[command])
    return config.parse, getattr(job, command)


if __name__ == "__main__":
    sys.exit(main())
