"""Migrate settings of version 0.1, which named masks, targets, losses and heads by words beside flat settings."""

from collections.abc import Collection, Mapping
from typing import Any

from simmim.config.strategies import parse_strategy
from simmim.errors import UserError
from simmim.method.heads import Head, LinearHead
from simmim.method.masks import MaskStrategy, RandomMask
from simmim.method.strategy import Strategy
from simmim.method.targets import PixelTarget, Target

# Field of version 0.1 → family, default, setting, the kind that has it (None: every kind), and its default where
# version 0.1 refused another value for other kinds (None: it ignored the value).
_MOVED: dict[str, tuple[type[Strategy], Strategy, str, str | None, Any]] = {
    "mask_ratio": (MaskStrategy, RandomMask(), "ratio", None, None),
    "mask_cell": (MaskStrategy, RandomMask(), "cell", None, None),
    "clusters": (Target, PixelTarget(), "clusters", "clusters", None),
    "cluster_centres": (Target, PixelTarget(), "centres", "clusters", None),
    "decoder_depth": (Head, LinearHead(), "depth", "transformer", 2),
    "decoder_width": (Head, LinearHead(), "width", "transformer", 256),
}


def migrate(values: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """Return settings in the current form. `fields` are the configuration's current names. Raises `UserError`."""
    kept = dict(values)
    for name, (family, default, setting, only, usual) in _MOVED.items():
        if name not in kept or name in fields or family.family not in fields:
            continue
        value = kept.pop(name)
        strategy = parse_strategy(family, kept.get(family.family, default))
        if only is not None and strategy.kind != only:
            if usual is not None and value not in (None, usual):
                raise UserError(
                    f"{name.replace('_', ' ')} {value} is for {family.family} {only}, not {strategy.kind}; "
                    f"set {family.family} to {only}, or leave it out"
                )
            continue
        if value is not None:
            table = {**strategy.as_table(), setting: value}
            kept[family.family] = parse_strategy(family, table)
    return kept
