"""The command line: argv → configuration → one call. No logic.

Adding a command is adding a function with a docstring to `COMMANDS`.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from simmim.errors import TrainingDivergedError

if TYPE_CHECKING:
    from simmim.config import PretrainConfig

Arguments = TypeVar("Arguments")


def pretrain(argv: list[str]) -> int:
    """Pretrain a backbone on unlabelled images, or resume"""
    import tyro

    from simmim.config import PretrainConfig, read_toml
    from simmim.recipes import find_recipe

    @dataclass(frozen=True, kw_only=True)
    class Command(PretrainConfig):
        recipe: str | None = None
        """Take the defaults from this recipe (simmim recipes)."""
        config: Annotated[str | None, tyro.conf.arg(metavar="FILE.toml")] = None
        """Take the defaults from this file, such as RUN/config.toml."""

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--config")
    sources = vars(first.parse_known_args(argv)[0])
    defaults = PretrainConfig()
    if sources["recipe"] and sources["config"]:
        raise ValueError("--recipe and --config both give the defaults; use one of them")
    if sources["recipe"]:
        defaults = find_recipe(sources["recipe"])
    if sources["config"]:
        defaults = dataclasses.replace(read_toml(sources["config"], PretrainConfig), out=None, fresh=False)
    command = parse(Command, "pretrain", argv, Command(**vars(defaults), **sources))
    settings = {field.name: getattr(command, field.name) for field in dataclasses.fields(PretrainConfig)}
    return _pretrain(PretrainConfig(**settings))


def _pretrain(config: "PretrainConfig") -> int:
    from simmim.torch_engine.pretrain import pretrain

    _, outcome = pretrain(config)
    return 0 if outcome.stopped_by is None else 128 + outcome.stopped_by


def reconstruct(argv: list[str]) -> int:
    """Draw original, masked and reconstructed images side by side"""
    from tyro.conf import Positional

    from simmim.visualize import reconstruct

    @dataclass(frozen=True, kw_only=True)
    class Command:
        run: Positional[str]
        """The --out directory of a pretraining."""
        images: Positional[tuple[str, ...]]
        """Image files, or anything that --data takes (then its first images)."""
        out: str = "reconstruction.png"
        """The picture to write."""
        count: int = 8
        """Images to draw at most."""
        seed: int = 0
        """Seed of the masks."""

    print(reconstruct(**vars(parse(Command, "reconstruct", argv))))
    return 0


def bench(argv: list[str]) -> int:
    """Measure this machine's step and input speed, and its share of the peak"""
    from simmim.torch_engine.bench import BenchConfig, bench, describe

    @dataclass(frozen=True, kw_only=True)
    class Command(BenchConfig):
        json: bool = False
        """Print JSON only."""

    command = parse(Command, "bench", argv)
    figures = bench(command)
    print(json.dumps(figures, indent=1) if command.json else describe(figures))
    return 0


def doctor(argv: list[str]) -> int:
    """Say what was found on this machine, what works and what is missing"""
    from simmim.doctor import examine

    @dataclass(frozen=True, kw_only=True)
    class Command:
        json: bool = False
        """Print JSON only."""

    command = parse(Command, "doctor", argv)
    findings = examine()
    print(json.dumps(findings, indent=1) if command.json else "\n".join(f"{k:14}{v}" for k, v in findings.items()))
    return 0


def recipes(argv: list[str]) -> int:
    """List the recipes, or show one: simmim recipes NAME"""
    from tyro.conf import Positional

    from simmim.config import to_toml
    from simmim.recipes import RECIPES, find_recipe

    @dataclass(frozen=True, kw_only=True)
    class Command:
        name: Positional[str | None] = None
        """The recipe to show."""

    command = parse(Command, "recipes", argv)
    if command.name is None:
        for name, recipe in RECIPES.items():
            print(f"{name:24}{(recipe.__doc__ or '').splitlines()[0]}")
    else:
        print(to_toml(find_recipe(command.name)))
        print("\n".join("# " + line.strip() for line in (RECIPES[command.name].__doc__ or "").splitlines()))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    function.__name__: function for function in (pretrain, reconstruct, bench, doctor, recipes)
}


def parse(kind: type[Arguments], command: str, argv: Sequence[str], default: Arguments | None = None) -> Arguments:
    """Arguments by tyro, whose boxes of text become one line that raises `ValueError`."""
    import tyro

    words = {"--compile": ["--compile", "yes"], "--no-compile": ["--compile", "no"]}
    args = [word for given in argv for word in words.get(given, [given])]
    box = io.StringIO()
    extra: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, prog=f"simmim {command}", description=COMMANDS[command].__doc__, args=args, **extra)
    except SystemExit as end:
        if not end.code:
            raise
    lines = [line.strip("│╭╮╰╯─ ").strip() for line in box.getvalue().splitlines()]
    message = next((line for line in lines[1:] if line), "the arguments are not understood")
    raise ValueError(f"{message.rstrip('.')}; see `simmim {command} --help`")


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {function.__doc__}" for name, function in COMMANDS.items()]
    return (
        "usage: simmim COMMAND [OPTIONS]\n\nPretrain vision backbones by masked image modelling.\n\n"
        + "\n".join(lines)
        + "\n\n`simmim COMMAND --help` shows a command's options and their defaults. --debug shows tracebacks."
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 on success, 2 on a user's mistake (one line on stderr), 1 where training failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from simmim import __version__

        print(__version__)
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise ValueError(f"command {argv[0]!r} is not known; use {', '.join(COMMANDS)}")
        return COMMANDS[argv[0]](argv[1:])
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, TrainingDivergedError) as error:
        if debug:
            raise
        print(f"simmim: {str(error).strip().splitlines()[0] if str(error) else repr(error)}", file=sys.stderr)
        return 1 if isinstance(error, TrainingDivergedError) else 2
