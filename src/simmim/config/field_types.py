"""Types of configuration fields: command-line syntax and valid range."""

import math
import tomllib
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field
from tyro.conf import arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from simmim.errors import UserError


def parse_image_size(value: Any) -> tuple[int, int] | None:
    """Parse `224`, `"224"`, `"96x160"` or `(96, 160)` into (height, width) in pixels."""
    if value is None:
        return None
    parts = str(value).lower().split("x") if isinstance(value, (str, int, float)) else list(value)
    try:
        sides = [int(part) for part in parts]
    except (TypeError, ValueError):
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise UserError(f"{value!r} is not N or HxW in whole pixels; write 224 or 96x160")
    return (sides[0], sides[-1])


def parse_model_args(value: Any) -> dict[str, Any]:
    """Parse `["depth=2", "embed_dims=[32,64]"]` into keyword arguments of the timm model; values are TOML."""
    if isinstance(value, Mapping):
        return dict(value)
    arguments = {}
    for item in value:
        name, equals, text = item.partition("=")
        if not name or not equals:
            raise UserError(f"{item!r} is not NAME=VALUE; write depth=4")
        try:
            arguments[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            arguments[name] = text
    return arguments


def parse_range(value: Any) -> tuple[float, float] | None:
    """Parse a range of positive numbers: `(0.67, 1.0)`, `["0.67", "1"]`, or `0.08` for (0.08, 1)."""
    if value is None:
        return None
    try:
        low, high = map(float, (value, 1.0) if isinstance(value, (str, int, float)) else value)
    except (TypeError, ValueError):
        raise UserError(f"{value!r} is not two numbers; write MIN MAX") from None
    if not 0 < low <= high < math.inf:
        raise UserError(f"{low:g} {high:g} is not a range of positive numbers; write the smaller first")
    return low, high


def parse_shares(value: Any) -> tuple[float, float] | None:
    """Parse a range (`parse_range`) that ends at 1 at most."""
    found = parse_range(value)
    if found and found[1] > 1:
        raise UserError(f"{found[0]:g} {found[1]:g} is not within 0..1; write shares of the image's area")
    return found


def _in_lists(value: Any) -> Any:
    """Turn tuples into lists, as TOML returns them, so that a resumed run has equal settings."""
    if isinstance(value, Mapping):
        return {name: _in_lists(item) for name, item in value.items()}
    return [_in_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _parse_yes_no(word: str) -> bool:
    if word not in ("yes", "no"):
        raise UserError(f"{word!r} is neither yes nor no")
    return word == "yes"


def _parse_colour(words: list[str]) -> tuple[float, ...] | str | None:
    if words in (["auto"], ["measure"]):
        return None if words == ["auto"] else "measure"
    return tuple(map(float, words))


def _show_colour(value: tuple[float, ...] | str | None) -> list[str]:
    return [value or "auto"] if value is None or isinstance(value, str) else [str(number) for number in value]


def one_word(parse: Callable[[str], Any], metavar: str, *, nothing: str = "auto", show: Any = str) -> Any:
    """Let tyro read an optional value from one word on the command line, where `nothing` stands for `None`."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: None if words[0] == nothing else parse(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [nothing if value is None else show(value)],
    )


def open_values() -> ConstructorRegistry:
    """Let tyro read an optional number or word without annotation, as in strategies, where auto stands for `None`."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        kinds = [kind for kind in get_args(info.type) if kind is not NoneType]
        if len(kinds) == len(get_args(info.type)) or len(kinds) != 1 or kinds[0] not in (int, float, str):
            return None
        return one_word(kinds[0], kinds[0].__name__.upper())

    return registry


# TOML has no `None`, so "none" turns off a setting that is on by default.
NONE_WORD = BeforeValidator(lambda value: None if value == "none" else value)
# A field whose default is decided later describes it in its help.
HINT = arg(help_behavior_hint=lambda default: "" if default in ("auto", "none", "") else f"(default: {default})")
ImageSize = Annotated[
    tuple[int, int] | None,
    BeforeValidator(parse_image_size),
    one_word(parse_image_size, "N|HxW", show=lambda size: f"{size[0]}x{size[1]}"),
    HINT,
]


def _yes_no(name: str) -> Any:
    """Read a choice that is left open by default: the command line turns `--no-NAME` into `--NAME no`."""
    return one_word(_parse_yes_no, f"/ --no-{name}", show=lambda value: "yes" if value else "no")


Compile = Annotated[bool | None, _yes_no("compile"), HINT]
AsyncSave = Annotated[bool | None, _yes_no("async-save"), HINT]
ModelArgs = Annotated[
    dict[str, Any],
    BeforeValidator(_in_lists),
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE",
        instance_from_str=parse_model_args,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={item}" for name, item in value.items()],
    ),
    HINT,
]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegativeReal = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[Positive | None, one_word(int, "INT"), HINT]
# TOML writes a `None` that is not the default as "none".
CountOrAuto = Annotated[
    Positive | None,
    BeforeValidator(lambda value: None if value in ("auto", "none") else value),
    one_word(int, "INT|auto"),
    HINT,
]
# Names of the rows of `simmim.torch_engine.accelerators`, which checks them: listing them here would load PyTorch.
Device = Annotated[str, one_word(str, "auto|cpu|cuda|mps|xpu|tpu", nothing="")]
Word = Annotated[str | None, one_word(str, "STR", nothing="none"), HINT]
Flip = Literal["none", "horizontal", "both"]
"""Random flips: none, left-right, or left-right and upside down, independently."""
_RANGE: Any = PrimitiveConstructorSpec(
    nargs="*",
    metavar="MIN MAX",
    instance_from_str=lambda words: parse_range(words[0] if len(words) == 1 else words),
    is_instance=lambda value: True,
    str_from_instance=lambda value: [f"{number:g}" for number in value or ()],
)
Shares = Annotated[tuple[float, float], BeforeValidator(parse_shares), _RANGE, HINT]
"""A range within 0..1."""
SharesIfAny = Annotated[tuple[float, float] | None, BeforeValidator(parse_shares), _RANGE, HINT]
RangeIfAny = Annotated[tuple[float, float] | None, BeforeValidator(parse_range), _RANGE, HINT]
Colour = Annotated[
    tuple[float, ...] | Literal["measure"] | None,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="FLOAT…|measure",
        instance_from_str=_parse_colour,
        is_instance=lambda value: True,
        str_from_instance=_show_colour,
    ),
    HINT,
]
