"""Infer the timm model of a set of weights from their names, shapes and metadata.

Shapes: `D` features, `T` entries of a relative-bias table, `A` attention heads, `C` channels, `k` patch side.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from simmim.errors import UserError
from simmim.interop.weight_names import State

_TABLE = "relative_position_bias_table"
_CLASS_ROWS = 3  # of BEiT's tables, after the rows of distances

# Facts of timm's models that weights reveal. The entry with the fewest differences names the model.
_VITS = {
    "vit_tiny_patch16_224": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small_patch16_224": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base_patch16_224": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large_patch16_224": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_huge_patch14_224": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
}
_BEITS = {
    "beit_base_patch16_224": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "init_values": 0.1},
    "beit_large_patch16_224": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16, "init_values": 1e-5},
}
_SWIN_SIZES = {
    "tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "small": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]},
    "base": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
    "large": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]},
}
_SWINS = {f"swin_{size}_patch4_window7_224": facts | {"window_size": 7} for size, facts in _SWIN_SIZES.items()}
_SWINS |= {
    f"swin_{size}_patch4_window12_384": _SWIN_SIZES[size] | {"window_size": 12} for size in ("base", "large")
}  # fmt: skip
_SWINV2S = {
    f"swinv2_{size}_window{window}_{pixels}": _SWIN_SIZES[size] | {"window_size": window}
    for window, pixels, sizes in ((8, 256, ("tiny", "small", "base")), (12, 192, ("base", "large")))
    for size in sizes
}
_ALWAYS = {  # facts that all entries of a family have
    "vit": {"mlp_ratio": 4.0},
    "beit": {
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": True,
        "use_shared_rel_pos_bias": False,
    },
    "swin": {"patch_size": 4, "mlp_ratio": 4.0},
    "swinv2": {"patch_size": 4, "mlp_ratio": 4.0, "pretrained_window_sizes": [0, 0, 0, 0]},
}
_VARIANTS = {"vit": _VITS, "beit": _BEITS, "swin": _SWINS, "swinv2": _SWINV2S}


@dataclass(frozen=True, kw_only=True)
class TimmModel:
    """A timm model, with the image size (height, width) in pixels if the weights reveal it."""

    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    image_size: tuple[int, int] | None = None


def infer(weights: State, buffers: State, hints: Mapping[str, Any]) -> TimmModel | None:
    """Infer the model of `weights` (timm's names); `None` for an unknown family.

    `hints` are accompanying facts under timm's names; `buffers` are the checkpoint's other tensors. Raises `UserError`
    if a fact is missing.
    """
    family = infer_family(weights)
    if family is None:
        return None
    shape = weights["patch_embed.proj.weight"].shape  # (D, C, k, k)
    facts = {"patch_size": shape[2], "embed_dim": shape[0]}
    facts |= (_swin_facts if family.startswith("swin") else _token_facts)(weights, buffers)
    facts |= {name: value for name, value in hints.items() if name != "image_size"}
    arguments = {"fc_norm" if family == "vit" else "use_fc_norm": True} if pools_before_norm(weights) else {}
    if family == "vit" and "num_heads" not in facts:
        facts |= _usual_heads(facts)
    model, different = nearest(family, facts)
    return TimmModel(
        model=model,
        model_args=arguments | different,
        image_size=hints.get("image_size") or _image_size(facts, weights, buffers),
    )


def infer_family(weights: State) -> str | None:
    """Return vit, beit, swin or swinv2; `None` if the names match none."""
    if "patch_embed.proj.weight" not in weights:
        return None
    if any(".cpb_mlp." in name for name in weights):
        return "swinv2"
    if any(name.startswith("layers.") and name.endswith(_TABLE) for name in weights):
        return "swin"
    if any(name.endswith((f"attn.{_TABLE}", "attn.q_bias")) for name in weights) or f"rel_pos_bias.{_TABLE}" in weights:
        return "beit"
    return "vit" if {"blocks.0.attn.qkv.weight", "pos_embed"} <= set(weights) else None


def pools_before_norm(weights: State) -> bool:
    """Return whether the last norm acts on the pooled tokens instead of each token."""
    return "fc_norm.weight" in weights and "norm.weight" not in weights


def nearest(family: str, facts: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the timm model with the fewest differing facts, and these facts."""

    def different(model: str) -> dict[str, Any]:
        usual = _ALWAYS[family] | _VARIANTS[family][model]
        return {name: value for name, value in facts.items() if value != usual.get(name)}

    model = min(_VARIANTS[family], key=lambda name: len(different(name)))
    return model, different(model)


def _token_facts(weights: State, _buffers: State) -> dict[str, Any]:
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    D = weights["patch_embed.proj.weight"].shape[0]
    facts: dict[str, Any] = {"depth": depth, "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / D}
    if infer_family(weights) == "vit":
        if "blocks.0.attn.qkv.bias" not in weights:
            facts["qkv_bias"] = False
        if "blocks.0.ls1.gamma" in weights:
            facts["init_values"] = 1e-5
        if "reg_token" in weights:
            facts["reg_tokens"] = weights["reg_token"].shape[1]
        return facts
    tables = [name for name in weights if name.endswith(f".attn.{_TABLE}")]
    shared = f"rel_pos_bias.{_TABLE}"
    facts |= {"use_abs_pos_emb": "pos_embed" in weights, "qkv_bias": "blocks.0.attn.q_bias" in weights}
    facts |= {"use_rel_pos_bias": bool(tables), "use_shared_rel_pos_bias": shared in weights}
    if "blocks.0.gamma_1" not in weights:
        facts["init_values"] = 0.0  # timm's word for no LayerScale
    if found := next((name for name in (*tables, shared) if name in weights), None):
        facts["num_heads"] = weights[found].shape[1]  # (T, A)
    return facts


def _usual_heads(facts: Mapping[str, Any]) -> dict[str, int]:
    """Guess the number of heads from a ViT's width and depth; its weights do not reveal it."""
    for usual in _VITS.values():
        if (usual["embed_dim"], usual["depth"]) == (facts["embed_dim"], facts["depth"]):
            return {"num_heads": usual["num_heads"]}
    size = f"{facts['embed_dim']} features and {facts['depth']} blocks"
    raise UserError(
        f"a ViT of {size} does not tell its attention heads; give --model vit_base_patch16_224 --model-args "
        f"embed_dim={facts['embed_dim']} depth={facts['depth']} patch_size={facts['patch_size']} num_heads=N"
    )


def _swin_facts(weights: State, buffers: State) -> dict[str, Any]:
    stages = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    blocks = [{name.split(".")[3] for name in weights if name.startswith(f"layers.{s}.blocks.")} for s in range(stages)]
    first = "layers.0.blocks.0"
    D = weights["patch_embed.proj.weight"].shape[0]
    facts: dict[str, Any] = {"depths": [len(numbers) for numbers in blocks]}
    facts["mlp_ratio"] = weights[f"{first}.mlp.fc1.weight"].shape[0] / D
    if f"{first}.attn.logit_scale" in weights:  # (A, 1, 1)
        facts["num_heads"] = [weights[f"layers.{s}.blocks.0.attn.logit_scale"].shape[0] for s in range(stages)]
        if f"{first}.attn.q_bias" not in weights:
            facts["qkv_bias"] = False
        if (index := buffers.get(f"{first}.attn.relative_position_index")) is not None:
            facts["window_size"] = math.isqrt(index.shape[0])
        return facts
    tables = [weights[f"layers.{s}.blocks.0.attn.{_TABLE}"].shape for s in range(stages)]  # (T, A)
    facts |= {"num_heads": [heads for _, heads in tables], "window_size": (math.isqrt(tables[0][0]) + 1) // 2}
    if f"{first}.attn.qkv.bias" not in weights:
        facts["qkv_bias"] = False
    return facts


def _image_size(facts: Mapping[str, Any], weights: State, buffers: State) -> tuple[int, int] | None:
    """Derive a square image size: weights reveal the number of patches, not their arrangement."""
    patch = facts["patch_size"]
    if "depth" in facts:  # a ViT or BEiT
        tables = [name for name in weights if name.endswith(_TABLE)]
        if "pos_embed" in weights:
            prefix = sum(weights[name].shape[1] for name in ("cls_token", "reg_token") if name in weights)
            grid = math.isqrt(weights["pos_embed"].shape[1] - prefix)
        elif tables:
            grid = (math.isqrt(weights[tables[0]].shape[0] - _CLASS_ROWS) + 1) // 2
        else:
            return None
        return grid * patch, grid * patch
    if "window_size" not in facts:
        return None
    # A shifted block's mask has one entry per window. Without it, assume that the last stage is one window.
    mask = buffers.get("layers.0.blocks.1.attn_mask")
    windows = 2 ** (len(facts["depths"]) - 1) if mask is None else math.isqrt(mask.shape[0])
    side = patch * facts["window_size"] * windows
    return side, side
