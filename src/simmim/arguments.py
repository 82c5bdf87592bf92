"""Arguments of commands whose options are fields of a configuration: `--json`, and defaults from recipes and files.

`about` is what `--help` says of a command.
"""

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from simmim.config import cli_errors
from simmim.errors import UserError

if TYPE_CHECKING:
    from simmim.config.training import TrainingConfig

Arguments = TypeVar("Arguments")
Config = TypeVar("Config", bound="TrainingConfig")


def parse_with_json(kind: type[Arguments], command: str, about: str | None, argv: list[str]) -> tuple[Arguments, bool]:
    """Read the command's arguments, as `parse_checked`, and whether `--json` is among them."""
    from simmim.config.validation import from_settings

    @dataclass(frozen=True, kw_only=True)
    class Command(kind):  # type: ignore[misc, valid-type]
        json: bool = False
        """Print JSON only."""

    values = vars(cli_errors.parse(Command, command, about, argv))
    as_json = values.pop("json")
    return from_settings(kind, values), as_json


def parse_checked(kind: type[Arguments], command: str, about: str | None, argv: list[str]) -> Arguments:
    """Read the command's arguments, and check their types and ranges. Raises `UserError`."""
    from simmim.config.validation import from_settings

    return from_settings(kind, vars(cli_errors.parse(kind, command, about, argv)))


def parse_with_defaults(
    kind: type[Config],
    about: str | None,
    argv: list[str],
    find: Callable[[str], Config],
    first: Callable[..., Config] | None = None,
) -> Config:
    """Parse arguments whose defaults may come from a recipe, looked up by `find`, or from a file.

    Without either they are those of `first`, which gets the names of the options, the model, and whether the data is
    sounds, or of the class.
    """
    from simmim.config.field_types import Word
    from simmim.config.strategies import (
        parsed_objectives,
        take_kinds,
        take_objectives,
        with_full_names,
        with_strategy_options,
    )
    from simmim.config.toml import read_toml
    from simmim.data.files import names_sounds

    @dataclass(frozen=True, kw_only=True)
    class Command(kind):
        recipe: Word = None
        """Recipe to take defaults from (see simmim recipes)."""
        config: Word = None
        """TOML file to take defaults from, such as RUN/config.toml."""

    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--recipe", "--config", "--model", "--data"):
        known.add_argument(name, nargs="?")
    sources = vars(known.parse_known_args(argv)[0])
    model, data = sources.pop("model"), sources.pop("data")
    defaults = first(_names(argv), model, sounds=names_sounds(data)) if first else kind()
    if sources["recipe"] and sources["config"]:
        raise UserError("--recipe and --config both set the defaults; use one of them")
    if sources["recipe"]:
        defaults = find(sources["recipe"])
    if sources["config"]:
        defaults = dataclasses.replace(
            read_toml(sources["config"], kind),
            out=None,
            max_hours=None,
            extend=False,
            fresh=False,
            accept_changed_data=False,
        )
    if hasattr(defaults, "objectives"):
        argv = with_full_names(argv)
    defaults = take_objectives(take_kinds(defaults, argv), argv)
    options = with_strategy_options(Command, defaults)
    found = cli_errors.parse(options, kind.command, about, argv, options(**vars(defaults), **sources), kind.unlisted)
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(kind)}
    return kind(**values | parsed_objectives(found, defaults))


def _names(argv: list[str]) -> set[str]:
    """Return the fields that options set: of `--mask.ratio 0.5 --plain-step`, mask and plain_step."""
    words = (word[2:].partition("=")[0].partition(".")[0] for word in argv if word.startswith("--"))
    return {word.removeprefix("no-").replace("-", "_") for word in words}
