"""Read strategies as configuration fields, from TOML, Python and the command line."""

import argparse
import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import pydantic
from tyro.conf import arg

from simmim.errors import UserError
from simmim.method.strategy import Strategy

Family = TypeVar("Family", bound=Strategy)


class UnknownKindError(UserError):
    """Kind that no imported module defines."""


_HELP = {
    "mask": "Masking strategy.",
    "target": "Prediction target.",
    "loss": "Loss, on masked pixels only.",
    "head": "Prediction head.",
}


def one_of(family: type[Strategy]) -> pydantic.PlainValidator:
    """Annotate a configuration field that holds a strategy of a family."""
    return pydantic.PlainValidator(lambda value: parse_strategy(family, value))


def several_of(family: type[Strategy]) -> pydantic.PlainValidator:
    """Annotate a configuration field that holds a tuple of strategies of a family."""
    return pydantic.PlainValidator(lambda values: parse_strategies(family, values))


def parse_strategies(family: type[Family], values: Any) -> tuple[Family, ...]:
    """Read strategies from a list of what `parse_strategy` takes. Raises `UserError`."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise UserError(f"{values!r} is no list of {family.family}s; give a list, such as [{next(iter(family.kinds))}]")
    return tuple(parse_strategy(family, value) for value in values)


def parse_strategy(family: type[Family], value: Any) -> Family:
    """Read a strategy from an object of the family, a kind, or a table with `kind` and settings. Raises `UserError`."""
    if isinstance(value, family):
        return value
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping) or "kind" not in value:
        raise UserError(f"{value!r} is not a {family.family}; give a kind, such as {next(iter(family.kinds))}")
    kind = find_kind(family, value["kind"])
    settings = {name: setting for name, setting in value.items() if name != "kind"}
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"it has {', '.join(known) or 'none'}"
            raise UserError(f"{family.family} {kind.kind} has no setting {name!r}; {remedy}")
    try:
        return pydantic.TypeAdapter(kind).validate_python(settings)
    except pydantic.ValidationError as failure:
        error = failure.errors()[0]
        if error["type"] == "value_error":
            raise UserError(error["msg"].removeprefix("Value error, ")) from None
        place = ".".join(map(str, (family.family, *error["loc"])))
        raise UserError(f"{place} {error['input']!r}: {error['msg'].lower()}; leave it out for the default") from None


def find_kind(family: type[Family], kind: str) -> type[Family]:
    """Return the class of a kind. Raises `UserError` for an unknown one."""
    if kind not in family.kinds:
        raise UnknownKindError(f"{family.family} {kind!r} is not known; choose from {', '.join(family.kinds)}")
    return family.kinds[kind]


def with_kind(strategy: Family, kind: str) -> Family:
    """Change a strategy's kind and keep the settings that both kinds share."""
    found = find_kind(type(strategy), kind)
    if found is type(strategy):
        return strategy
    shared = {field.name for field in dataclasses.fields(found)}  # type: ignore[arg-type]
    return found(**{name: value for name, value in strategy.settings().items() if name in shared})


def families_of(configuration: type[Any]) -> dict[str, type[Strategy]]:
    """Return the families of a configuration's fields by name."""
    defaults = {field.name: field.default for field in dataclasses.fields(configuration)}
    return {name: _family_of(default) for name, default in defaults.items() if isinstance(default, Strategy)}


def parse_fields(configuration: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the strategies among the settings of a configuration, parsed. Raises `UserError`."""
    found: dict[str, Any] = {
        name: parse_strategy(family, values[name])
        for name, family in families_of(configuration).items()
        if name in values
    }
    for field in dataclasses.fields(configuration):
        default: Any = field.default
        several = isinstance(default, tuple) and default and isinstance(default[0], Strategy)
        if several and field.name in values:
            found[field.name] = parse_strategies(_family_of(default[0]), values[field.name])
    return found


def _family_of(strategy: Strategy) -> type[Strategy]:
    return next(base for base in type(strategy).__mro__ if "family" in vars(base))


def take_kinds(defaults: Any, argv: Sequence[str]) -> Any:
    """Change the kinds of a configuration's strategies to those named on the command line, such as `--mask block`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    families = families_of(type(defaults))
    for name in families:
        parser.add_argument(f"--{name}", nargs="?")
    found = vars(parser.parse_known_args(argv)[0])
    changes = {name: with_kind(getattr(defaults, name), kind) for name, kind in found.items() if kind}
    return dataclasses.replace(defaults, **changes)


def with_full_names(argv: Sequence[str]) -> list[str]:
    """Replace `--teacher`, which is short for the setting of the objective of that name."""
    parts = [word.partition("=") for word in argv]
    return [("--teacher.source" if name == "--teacher" else name) + equals + value for name, equals, value in parts]


def take_objectives(defaults: Any, argv: Sequence[str]) -> Any:
    """Change a configuration's objectives to those of the command line: `--objective pixels=1 teacher=0.5`.

    Those that the configuration has already keep their settings, but for the weight. `--teacher` adds the objective of
    that name; without `--objective` it becomes the only one. Raises `UserError`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--objective", nargs="*")
    parser.add_argument("--teacher.source", dest="teacher", nargs="?")
    options = parser.parse_known_args(argv)[0]
    words = options.objective
    if not hasattr(defaults, "objectives"):
        return defaults
    kinds = [each.kind for each in defaults.objectives] if words is None else [word.partition("=")[0] for word in words]
    if options.teacher and "teacher" not in kinds:
        words = [*(words or ()), "teacher"]
    if words is None:
        return defaults
    family = _family_of(defaults.objectives[0])
    return dataclasses.replace(defaults, objectives=parse_words(family, words, defaults.objectives))


def parse_words(family: type[Family], words: Sequence[str], before: Sequence[Family] = ()) -> tuple[Family, ...]:
    """Read objectives from words KIND or KIND=WEIGHT; those of `before` keep their settings. Raises `UserError`."""
    known: dict[str, Any] = {objective.kind: objective for objective in before}
    found = []
    for word in words:
        kind, equals, weight = word.partition("=")
        try:
            changes = {"weight": float(weight)} if equals else {}
        except ValueError:
            raise UserError(f"weight {weight!r} of objective {kind} is not a number; write {kind}=1") from None
        objective: Any = known.get(kind) or find_kind(family, kind)()
        found.append(dataclasses.replace(objective, **changes))
    if not found:
        raise UserError(f"--objective names none; give one or more of {', '.join(family.kinds)}")
    return tuple(found)


def with_strategy_options(configuration: type[Any], defaults: Any) -> type[Any]:
    """Build the class that tyro parses, with `--mask KIND` and the options of that kind, such as `--mask.ratio`.

    An objective's options are those of its kind, such as `--teacher.layer`.
    """
    fields: list[tuple[str, Any, Any]] = []
    for name, family in families_of(configuration).items():
        strategy = getattr(defaults, name)
        kind = arg(name=name, metavar="|".join(family.kinds), help=_HELP.get(name, ""))
        fields.append((f"{name}_kind", Annotated[str, kind], dataclasses.field(default=strategy.kind)))
        fields.append((name, type(strategy), dataclasses.field(default=strategy)))
    if objectives := getattr(defaults, "objectives", ()):
        kinds = ", ".join(_family_of(objectives[0]).kinds)
        words = arg(name="objective", metavar="KIND[=WEIGHT] ...", help=f"Terms of the loss, of {kinds}.")
        default = tuple(f"{each.kind}={each.weight:g}" for each in objectives)
        fields.append(("objective_words", Annotated[tuple[str, ...], words], dataclasses.field(default=default)))
        fields += [
            (each.kind, type(each), dataclasses.field(default=each)) for each in objectives if _has_options(each)
        ]
    return dataclasses.make_dataclass("Command", fields, bases=(configuration,), frozen=True, kw_only=True)


def parsed_objectives(found: Any, defaults: Any) -> dict[str, Any]:
    """Return the field `objectives` of what tyro parsed by `with_strategy_options`; nothing for one without."""
    objectives = getattr(defaults, "objectives", ())
    return {"objectives": tuple(getattr(found, each.kind, each) for each in objectives)} if objectives else {}


def _has_options(objective: Strategy) -> bool:
    return len(dataclasses.fields(objective)) > 1  # type: ignore[arg-type]  # besides the weight
