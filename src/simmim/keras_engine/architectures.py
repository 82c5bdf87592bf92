"""Names and sizes of the timm models that this engine builds, since timm itself needs PyTorch."""

import dataclasses
import difflib
import re
from dataclasses import dataclass
from typing import Any, Literal

from simmim.errors import UserError

Family = Literal["vit", "beit", "swin", "resnet"]

_TRANSFORMERS = {  # width, blocks, heads
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
_SWINS = {  # width of the first stage, blocks, heads
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
_RESNETS = {  # blocks, whether they are bottlenecks
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet26": ((2, 2, 2, 2), True),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}
NAMES = (
    *(f"vit_{size}_patch16_{side}" for size in ("tiny", "small", "base", "large") for side in (224, 384)),
    *(f"vit_{size}_patch32_{side}" for size in ("small", "base", "large") for side in (224, 384)),
    *("vit_small_patch8_224", "vit_base_patch8_224", "vit_large_patch14_224", "vit_huge_patch14_224"),
    *(f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")),
    "deit_base_patch16_384",
    *(f"beit_{size}_patch16_{side}" for size in ("base", "large") for side in (224, 384)),
    *("beit_large_patch16_512", "beitv2_base_patch16_224", "beitv2_large_patch16_224"),
    *(f"swin_{size}_patch4_window7_224" for size in _SWINS),
    *("swin_base_patch4_window12_384", "swin_large_patch4_window12_384"),
    *_RESNETS,
)

_PATTERN = re.compile(r"(vit|deit|beit|beitv2|swin)_(\w+?)_patch(\d+)(?:_window(\d+))?_(\d+)")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A timm model; `arguments`, under timm's names, define its Keras counterpart completely."""

    name: str
    family: Family
    image_size: tuple[int, int]
    arguments: dict[str, Any]
    bottleneck: bool = False  # ResNet's block of three convolutions

    @property
    def width(self) -> int | None:
        """Number of features of a token of the last stage; `None` for a convolutional net."""
        stages = len(self.arguments["depths"]) if self.family == "swin" else 1
        return None if self.family == "resnet" else self.arguments["embed_dim"] * 2 ** (stages - 1)

    def with_arguments(self, changes: dict[str, Any]) -> "Architecture":
        """Apply the user's model arguments. Raises `UserError` for one that this engine does not support."""
        if unknown := set(changes) - set(self.arguments):
            raise UserError(
                f"model argument {min(unknown)!r} of {self.name} is not known to the keras engine; use "
                f"{', '.join(sorted(self.arguments))}, or --engine torch"
            )
        return dataclasses.replace(self, arguments=self.arguments | changes)


def find_architecture(model: str) -> Architecture:
    """Look up a timm model name. Raises `UserError` for a model that this engine does not support."""
    name = model.split(".")[0]
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=3)
        families = "vit_*, deit_*, beit_*, swin_*, resnet*"
        raise UserError(
            f"model {model!r} is not one that the keras engine builds ({families}); "
            f"use {' or '.join(close) if close else 'one of these'}, or --engine torch"
        )
    if name in _RESNETS:
        layers, bottleneck = _RESNETS[name]
        arguments = {"layers": layers, "channels": (64, 128, 256, 512)}
        return Architecture(
            name=name, family="resnet", image_size=(224, 224), arguments=arguments, bottleneck=bottleneck
        )
    match = _PATTERN.fullmatch(name)
    assert match is not None
    kind, size, patch, window, side = match.groups()
    build = {"vit": _vit, "deit": _vit, "beit": _beit, "beitv2": _beit, "swin": _swin}[kind]
    family, arguments = build(kind, size, window)
    return Architecture(
        name=name,
        family=family,
        image_size=(int(side), int(side)),
        arguments={"patch_size": int(patch), "mlp_ratio": 4.0, "qkv_bias": True} | arguments,
    )


def _vit(_kind: str, size: str, _window: str | None) -> tuple[Family, dict[str, Any]]:
    width, depth, heads = _TRANSFORMERS[size]
    return "vit", {"embed_dim": width, "depth": depth, "num_heads": heads}


def _beit(kind: str, size: str, _window: str | None) -> tuple[Family, dict[str, Any]]:
    width, depth, heads = _TRANSFORMERS[size]
    return "beit", {
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": True,
        "use_shared_rel_pos_bias": False,
        "init_values": 0.1 if (kind, size) == ("beit", "base") else 1e-5,
    }


def _swin(_kind: str, size: str, window: str | None) -> tuple[Family, dict[str, Any]]:
    assert window is not None
    width, depths, heads = _SWINS[size]
    return "swin", {"embed_dim": width, "depths": depths, "num_heads": heads, "window_size": int(window)}
