"""Strategies: components that are their own configuration.

A strategy is a frozen dataclass whose fields are its settings. Python takes the object, `mask=BlockMask(ratio=0.4)`;
TOML a table, `[mask]` with `kind = "block"` and `ratio = 0.4`; the command line a kind and its settings,
`--mask block --mask.ratio 0.4`. Each family (masks, targets, losses, heads, objectives) is a base class. Defining a
subclass with a `kind`, in this package or another, adds it to its family.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar


class Strategy:
    """Base of all families. A family's base class names it, as in `class MaskStrategy(Strategy, family="mask")`."""

    family: ClassVar[str]
    """Name of the configuration field that holds a strategy of this family."""
    kinds: ClassVar[dict[str, type[Any]]]
    """Strategies of the family by kind."""
    kind: ClassVar[str]
    """Name of this strategy in TOML and on the command line, unique in its family."""

    def __init_subclass__(cls, family: str | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if family is not None:
            cls.family, cls.kinds = family, {}
        elif (kind := vars(cls).get("kind")) is not None:
            known = cls.kinds.get(kind)
            # `dataclass(slots=True)` and a reloaded module define a class again; another class must not hide it.
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"{cls.family} kind {kind!r} is {known.__qualname__} already; choose another kind")
            cls.kinds[kind] = cls

    def settings(self) -> dict[str, Any]:
        """Return the settings by name, without those that are `None`."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in found.items() if value is not None}

    def as_table(self) -> Mapping[str, Any]:
        """Return kind and settings as a TOML table."""
        return {"kind": self.kind, **self.settings()}

    def __str__(self) -> str:
        return " ".join([self.kind, *(f"{name}={value}" for name, value in self.settings().items())])
