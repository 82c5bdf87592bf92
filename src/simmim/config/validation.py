"""Validate settings from the command line, TOML or Python, and turn pydantic's errors into one line."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic

from simmim.config.migration import migrate
from simmim.config.strategies import parse_fields
from simmim.config.training import TrainingConfig
from simmim.errors import UserError
from simmim.method.strategy import Strategy

Config = TypeVar("Config", bound=TrainingConfig)
Settings = TypeVar("Settings")


def validated(config: Config) -> Config:
    """Return the configuration with types and ranges checked. Raises `UserError`.

    Every training calls this once.
    """
    config = from_settings(type(config), vars(config))
    config.check()
    return config


# Rules by pydantic's error type.
_RULES = {
    "greater_than": "is not above {gt}",
    "greater_than_equal": "is less than {ge}",
    "less_than": "is not below {lt}",
    "less_than_equal": "is more than {le}",
    "finite_number": "is not finite",
    "too_short": "holds fewer than {min_length}",
    "literal_error": "is not known",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "is not a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "is not a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "is neither true nor false"),
    "string_type": "is not a text",
}


def from_settings(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Build a configuration, or any other dataclass of settings, from names and values.

    Checks types and ranges, and raises `UserError` for the first that fails. Flat names of version 0.1, such as
    mask_ratio, are accepted.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = migrate(values, fields)
    values |= parse_fields(kind, values)
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            command = getattr(kind, "command", None)
            names = f"see `simmim {command} --help` for the names" if command else f"use {', '.join(fields)}"
            raise UserError(f"setting {name!r} is not known; {f'did you mean {close[0]}?' if close else names}")
    try:
        return pydantic.TypeAdapter(kind).validate_python(dict(values))
    except pydantic.ValidationError as failure:
        error = failure.errors()[0]
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, ValueError) and not isinstance(cause, UserError):
            raise cause from None  # a validator's own bug
        name = str(error["loc"][0])
        default = fields[name].default
        # The message of a strategy names its family already.
        start = "" if isinstance(default, Strategy) else name.replace("_", " ") + " "
        raise UserError(start + _explain(error, default)) from None


def _explain(error: Mapping[str, Any], default: Any) -> str:
    """Describe a pydantic error as value, rule and remedy."""
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    context = {k: f"{v:g}" if isinstance(v, float) else v for k, v in error.get("ctx", {}).items()}
    rule = _RULES[error["type"]].format(**context) if error["type"] in _RULES else f"is not possible ({message})"
    remedy = "leave it out for the default" if default in (None, dataclasses.MISSING) else f"the default is {default}"
    if error["type"] == "literal_error":
        remedy = "choose from " + context["expected"].replace("'", "").replace(" or ", ", ")
    return f"{error['input']!r} {rule}; {remedy}"
