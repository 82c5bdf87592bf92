"""Parse command-line arguments with tyro, and turn its error boxes into one line."""

import contextlib
import io
import re
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from simmim.config.option_groups import show_in_groups, wide_output
from simmim.errors import UserError

Arguments = TypeVar("Arguments")


def _rewrites() -> tuple[tuple[str, str], ...]:
    """Return tyro's messages, joined into one line, and our wording; others, of another version, pass unchanged."""
    from simmim.method.objectives import Objective  # not before it is needed: it loads tyro

    kinds = "|".join(Objective.kinds)
    return (
        (
            r"Unrecognized options: --(mask|target|loss|head)\.([\w-]+).*",
            r"--\1.\2 is not a setting of the \1 in use; name the kind that has it by --\1, or leave it out",
        ),
        (
            rf"Unrecognized options: --({kinds})\.([\w-]+).*",
            r"--\1.\2 is not a setting of an objective in use; add --objective \1=1, or leave it out",
        ),
        (r"Unrecognized options: (-[^, ]+).* meant: (--[\w-]+).*", r"option \1 is not known; did you mean \2?"),
        (r"Unrecognized options: (-[^, ]+).*", r"option \1 is not known"),
        (r"Unrecognized options: (.*)", r"argument '\1' is not expected"),
        (r"Missing value for argument '(.+?)'\. Expected 1 values?\.", r"\1 has no value; give one"),
        (r"Missing value for argument '(.+?)'\. Expected (\d+) values?\.", r"\1 has too few values; give \2"),
        (r"Missing from .*?: (\S+) .*", r"\1 is missing"),
        (
            r"invalid choice ('.*') for argument '(.+?)'\. Expected one of \((.*?)\)\.",
            r"\2 \1 is not known; choose from \3",
        ),
        (r"Error parsing (\S+): invalid literal for int\(\) with base 10: ('.*')", r"\1 \2 is not a whole number"),
        (r"Error parsing (\S+): could not convert string to float: ('.*')", r"\1 \2 is not a number"),
        (rf"Error parsing (?:mask|target|loss|head|{kinds}): (.*)", r"\1"),  # a strategy's own rule
        (r"Error parsing (\S+): (.*)", r"\1 \2"),
    )


_WORDS = {
    f"--{no}{name}": [f"--{name}", "no" if no else "yes"] for name in ("compile", "async-save") for no in ("", "no-")
}
# Options of version 0.1 and their current names.
_OLD_NAMES = {
    "--mask-ratio": "--mask.ratio",
    "--mask-cell": "--mask.cell",
    "--clusters": "--target.clusters",
    "--decoder-depth": "--head.depth",
    "--decoder-width": "--head.width",
}


def _with_current_names(argv: Sequence[str]) -> list[str]:
    """Replace option names of version 0.1 with the current ones."""
    parts = [word.partition("=") for word in argv]
    return [_OLD_NAMES.get(name, name) + equals + value for name, equals, value in parts]


def parse(
    kind: type[Arguments],
    command: str,
    description: str | None,
    argv: Sequence[str],
    default: Arguments | None = None,
    unlisted: Collection[str] | None = None,
) -> Arguments:
    """Read a command's arguments. `--help` prints and exits. Raises `UserError`.

    With `unlisted`, `--help` shows the options in groups and leaves out the fields that it names.
    """
    import tyro

    from simmim.config.field_types import open_values

    args = [word for given in _with_current_names(argv) for word in _WORDS.get(given, [given])]
    box, help_text = io.StringIO(), io.StringIO()
    extra: dict[str, Any] = {"registry": open_values()} | ({} if default is None else {"default": default})
    try:
        with contextlib.ExitStack() as redirected:
            redirected.enter_context(contextlib.redirect_stderr(box))
            if unlisted is not None:
                redirected.enter_context(wide_output(help_text))
            return tyro.cli(kind, prog=f"simmim {command}", description=description, args=args, **extra)
    except SystemExit as end:
        if not end.code:
            if unlisted is not None:
                print(show_in_groups(help_text.getvalue(), command.split()[-1], unlisted))
            raise
    message = one_line(box.getvalue())
    raise UserError(message if ";" in message else f"{message}; see `simmim {command} --help`")


def one_line(box: str) -> str:
    """Convert an error box of tyro to one line in our wording."""
    lines = [line.strip("│| ") for line in box.splitlines()[1:]]  # the first is the title
    text = " ".join(" ".join(line for line in lines if line.strip("─╰╯+-")).split())
    text = re.sub(r" (Argument helptext:|For full helptext).*", "", text)
    for pattern, words in _rewrites():
        if match := re.fullmatch(pattern, text):
            sentence, choose, choices = match.expand(words).partition("; choose from ")
            return sentence + choose + choices.replace("'", "").rstrip(",")
    return text
