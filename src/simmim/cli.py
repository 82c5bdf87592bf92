"""The command line: choose a command, and turn its errors into a line and an exit code."""

import contextlib
import difflib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from simmim.disk import WriteError
from simmim.errors import TrainingFailedError, UserError
from simmim.output import printable, safe_output, shortened
from simmim.subcommands import COMMANDS


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {function.__doc__}" for name, function in COMMANDS.items()]
    return (
        "usage: simmim COMMAND [OPTIONS]\n\nPretrain vision backbones by masked image modelling.\n\n"
        + "\n".join(lines)
        + "\n\n`simmim COMMAND --help` shows a command's options and their defaults. --debug shows tracebacks."
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns 0 on success, 2 for a user error (one line on stderr), 1 if training failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    with safe_output(), warnings.catch_warnings():
        warnings.showwarning = partial(_show_warning, warnings.showwarning)
        try:
            try:
                return _run([word for word in argv if word != "--debug"])
            finally:
                sys.stdout.flush()  # results that cannot be written are an error
        except KeyboardInterrupt:
            print("simmim: interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            line = explain(error)
            if debug or line is None:
                raise
            print(f"simmim: {shortened(printable(line))}", file=sys.stderr)
            _tell_torchrun(line)
            return 2 if isinstance(error, (UserError, OSError)) else 1


def _tell_torchrun(line: str) -> None:
    """Leave the line of an error where torchrun looks for it: its summary names the rank that failed first, and why."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        told = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": told}), encoding="utf-8")


def _show_warning(usual: Callable[..., None], message: Warning | str, kind: Any, file: str, *rest: Any) -> None:
    """Show a warning of ours as a line, and others as usual, with the place in the source."""
    if kind is UserWarning and Path(file).is_relative_to(Path(__file__).parent):
        print(f"warning    {printable(str(message))}", file=sys.stderr)
    else:
        usual(message, kind, file, *rest)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from simmim import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"use one of {', '.join(COMMANDS)}"
        raise UserError(f"command {argv[0]!r} is not known; {remedy}")
    return COMMANDS[argv[0]](argv[1:])


def explain(error: Exception) -> str | None:
    """Describe an error in one line for the user; `None` for a bug."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, WriteError):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (UserError, TrainingFailedError)) and str(error):
        return str(error).strip()  # a line end is one of a name
    if isinstance(error, (UserError, OSError, TrainingFailedError)):
        return str(error).strip().splitlines()[0] if str(error) else repr(error)
    if "out of memory" in str(error) or "can't allocate memory" in str(error):  # CUDA's and the CPU's messages
        return "out of memory: lower --batch-size, split it with --accumulate-steps, or use --checkpoint-activations"
    return None
