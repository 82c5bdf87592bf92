"""Strategies: components that are their own configuration.

A strategy is a frozen dataclass whose fields are its settings. Python passes the object, `mask=BlockMask(ratio=0.4)`;
TOML has a table, `[mask]` with `kind = "block"` and `ratio = 0.4`; the command line has a kind and its settings,
`--mask block --mask.ratio 0.4`. Each family (masks, targets, losses, heads, objectives) is a base class. Defining a
subclass with a `kind` adds it to its family, from outside the package too.
"""

from typing import Any, ClassVar


class Strategy:
    """Base of every family; a family's base class names it, as in `class MaskStrategy(Strategy, family="mask")`."""

    family: ClassVar[str]
    """Name of the configuration field that holds a strategy of this family."""
    kinds: ClassVar[dict[str, type[Any]]]
    """The family's strategies by their kind."""
    kind: ClassVar[str]
    """Name of this strategy in TOML and on the command line, unique in its family."""

    def __init_subclass__(cls, family: str | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if family is not None:
            cls.family, cls.kinds = family, {}
        elif (kind := vars(cls).get("kind")) is not None:
            known = cls.kinds.get(kind)
            # `dataclass(slots=True)` and a reloaded module define a class again; a second class must not hide a first.
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"{cls.family} kind {kind!r} is {known.__qualname__} already; choose another kind")
            cls.kinds[kind] = cls
