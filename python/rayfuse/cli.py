"""The command line: `rayfuse train` and `rayfuse doctor`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

USAGE = """\
usage: rayfuse COMMAND ...

  train    train a feature field on posed photographs and report how well it did
  doctor   show versions, backends and why each can or cannot run

`rayfuse COMMAND --help` explains a command.
"""
INSTALL = "needs the extra 'train': pip install 'rayfuse[train]' (missing: {})"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments else ""
    if command == "train":
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
        sys.stderr.write(f"rayfuse: COMMAND must be train or doctor, got {command}\n")
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
        say(INSTALL.format(error.name))
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
    """Of a command that trains: what makes a configuration of its arguments, and what runs it."""
    assert command == "train"
    from rayfuse.train.config import parse
    from rayfuse.train.trainer import train

    return parse, train


if __name__ == "__main__":
    sys.exit(main())
