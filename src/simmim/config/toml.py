"""Configurations as TOML files."""

import dataclasses
import os
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from simmim.config.strategies import UnknownKindError
from simmim.config.training import TrainingConfig
from simmim.config.validation import from_settings
from simmim.errors import UserError
from simmim.method.strategy import Strategy

Config = TypeVar("Config", bound=TrainingConfig)

FORMAT = 2
"""Format number written. Files of version 0.1 (format 1) have no number; `simmim.config.migration` reads them."""

# Fields that may change on resume: where and how a run executes and is monitored, never the result of training.
OPERATIONAL = {
    "out", "backend", "device", "compile", "workers", "max_bad_fraction", "accumulate_steps", "checkpoint_activations",
    "shard", "plain_step", "kernels", "gpu", "decode", "readers", "save_every_steps", "keep", "async_save", "max_hours",
    "extend", "fresh", "log_every_steps", "log", "accept_changed_data", "picture_every_steps", "probe",
    "probe_every_epochs",
}  # fmt: skip


def to_toml(config: TrainingConfig) -> str:
    """Write a configuration as TOML.

    TOML has no `None`: such a field is left out, or "none" if its default is not `None`.
    """
    values: dict[str, Any] = {"format": FORMAT}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Strategy):
            value = value.as_table()
        elif isinstance(value, tuple) and value and isinstance(value[0], Strategy):
            value = [each.as_table() for each in value]
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {name: setting for name, setting in dataclasses.asdict(value).items() if setting is not None}
        if value is None and field.default is not None:
            value = "none"
        if value is not None:
            values[field.name] = value
    return tomli_w.dumps(values)


def read_toml(path: str | os.PathLike[str], kind: type[Config]) -> Config:
    """Read a configuration from a TOML file, not yet `validated` (data and out may follow on the command line)."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"configuration {path} cannot be read: {error.strerror}; give a TOML file") from None
    except UnicodeDecodeError:
        raise UserError(f"configuration {path} is not text; give a TOML file, such as a RUN/config.toml") from None
    try:
        return parse_toml(text, kind)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"configuration {path} is not TOML: {error}; compare it with a RUN/config.toml") from None
    except UnknownKindError as error:
        raise UserError(f"{path}: {error}, or import the module that defines it first") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse_toml(text: str, kind: type[Config]) -> Config:
    """Read a configuration from TOML of any format, not yet `validated`."""
    values = tomllib.loads(text)
    if (version := values.pop("format", 1)) > FORMAT:
        raise UserError(f"format {version} is newer than this simmim, which reads up to {FORMAT}; upgrade it")
    return from_settings(kind, values)


def changed_fields(old: TrainingConfig, new: TrainingConfig) -> list[str]:
    """Return the names of changed fields that would alter the training of a resumed run."""
    names = [f.name for f in dataclasses.fields(new) if f.name not in OPERATIONAL]
    return [name for name in names if getattr(old, name) != getattr(new, name)]
