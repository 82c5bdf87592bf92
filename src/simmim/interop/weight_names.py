"""Rename weights between our names (timm's) and those of official SimMIM, Swin, MAE and Transformers.

A *state* is names → arrays. Ours holds what a `MaskedImageModel` holds: `encoder.backbone.*` (timm's names),
`encoder.mask_token` (1, 1, D), `head.weight` (P, D), `head.bias` (P,). A map renames, splits and joins; no value
changes, so a round trip is bit-identical.

Shapes: `D` features, `P` predicted values of a cell.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.errors import UserError

Array = NDArray[Any]
State = dict[str, Array]

BACKBONE = "encoder.backbone."
MASK_TOKEN = "encoder.mask_token"

# Checkpoint entries without a place in a masked image model: pattern → why it is left out.
_LEFT_OUT = {
    r"(relative_position_index|relative_coords_table|attn_mask)$": "computed again",
    r"^(head|head_dist|fc|classifier|lm_head)\.(?!norm\.)": "a classifier",  # ConvNeXt's norm is in its head
    r"^(pooler\.dense|attn_pool)\.": "a pooling layer, which only a classifier uses",
}
_MAE_DECODER = {r"^decoder_|^mask_token$": "MAE's decoder, which mask tokens enter only there"}


@dataclass(frozen=True)
class Mapped:
    """A state under our names, and the entries left out: name → why."""

    state: State
    left_out: dict[str, str] = field(default_factory=dict)


def from_timm(state: Mapping[str, Array]) -> Mapped:
    """Map timm's names, which official ViT, DeiT, BEiT and MAE checkpoints share."""
    reasons = _LEFT_OUT | (_MAE_DECODER if any(name.startswith("decoder_") for name in state) else {})
    kept, left_out = _sort_out(state, reasons)
    return Mapped({_place(name): array for name, array in kept.items()}, left_out)


def to_timm(state: Mapping[str, Array]) -> State:
    """Return the backbone's state under timm's names."""
    return {name.removeprefix(BACKBONE): array for name, array in state.items() if name.startswith(BACKBONE)}


def from_official_swin(state: Mapping[str, Array]) -> Mapped:
    """Map official Swin and SwinV2, which downsample at the end of a stage; timm does at the start of the next."""
    return from_timm({_shift_stage(name, 1): array for name, array in state.items()})


def from_official_simmim(state: Mapping[str, Array]) -> Mapped:
    """Map `encoder.*` (a ViT with timm's names for BEiT, or an official Swin) and `decoder.0.*`, a 1x1 convolution.

    Raises `UserError` for a decoder of another kind.
    """
    prefix = "encoder."
    inner = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
    outer = {name: array for name, array in state.items() if not name.startswith(prefix)}
    mapped = from_official_swin(inner)
    return Mapped(mapped.state | _head_from_convolution(outer), mapped.left_out)


def to_official_simmim(state: Mapping[str, Array]) -> State:
    """Invert `from_official_simmim`, without buffers that the official code recomputes."""
    inner = to_timm(state) | {"mask_token": state[MASK_TOKEN]}
    return {f"encoder.{_shift_stage(name, -1)}": array for name, array in inner.items()} | _head_to_convolution(state)


def from_transformers(state: Mapping[str, Array], kind: str) -> Mapped:
    """Map a Transformers model; `kind` is its configuration's `model_type`, one of `DIALECTS`.

    Accepts the names on disk and those in memory since version 5. Raises `UserError` for a name that no
    model of the kind has.
    """
    dialect = DIALECTS[kind]
    older = {_older_name(name.removeprefix(f"{kind}."), dialect): array for name, array in state.items()}
    head = {name: array for name, array in older.items() if name.startswith("decoder.")}
    kept, left_out = _sort_out({name: array for name, array in older.items() if name not in head}, _LEFT_OUT)
    found: State = {}
    triples: dict[str, State] = {}
    for name, array in kept.items():
        joint, part = _part_of_triple(name, dialect)
        if part is None:
            found[_shift_stage(dialect.to_timm(name), 1)] = array
        else:
            triples.setdefault(joint, {})[part] = array
    for joint, parts in triples.items():
        if set(parts) != set(_TRIPLE):
            raise UserError(f"the checkpoint has only {', '.join(sorted(parts))} of the three parts of {joint!r}")
        found[joint] = np.concatenate([parts[part] for part in _TRIPLE])
    mapped = {_place(name): array for name, array in found.items()}
    return Mapped(mapped | _head_from_convolution(head), left_out)


def to_transformers(state: Mapping[str, Array], kind: str) -> State:
    """Invert, to the names that Transformers writes: `ViTForMaskedImageModeling`, `SwinFor…`, `Swinv2For…`.

    For `beit` the names are those of `BeitModel`, which has no head: ours is left out.
    """
    dialect = DIALECTS[kind]
    inner = to_timm(state)
    if MASK_TOKEN in state:
        inner["mask_token"] = state[MASK_TOKEN]
    found: State = {}
    for name, array in inner.items():
        joint = re.fullmatch(r"(.*)attn\.qkv\.(weight|bias)", name)
        if joint is None:
            found[dialect.from_timm(_shift_stage(name, -1))] = array
            continue
        block = dialect.block_from_timm(joint[1])
        for part, third in zip(_TRIPLE, np.split(array, 3), strict=True):
            found[f"{block}{dialect.attention}{part}.{joint[2]}"] = third
    if kind == "beit":
        return found
    return {f"{kind}.{name}": array for name, array in found.items()} | _head_to_convolution(state)


_TRIPLE = ("query", "key", "value")


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How Transformers names the parts of one kind of model."""

    blocks: tuple[str, str]
    """Name of block {} (Swin: block {} of stage {}): timm's, theirs."""
    attention: str
    """Prefix of query, key and value in a block."""
    joint_bias: bool
    """Whether timm joins the biases of query, key and value."""
    parts: tuple[tuple[str, str], ...]
    """timm's names outside the blocks, theirs."""
    inside: tuple[tuple[str, str], ...]
    """timm's names inside a block, theirs."""

    def to_timm(self, name: str) -> str:
        return self._translated(name, theirs=1)

    def from_timm(self, name: str) -> str:
        return self._translated(name, theirs=0)

    def block_from_timm(self, prefix: str) -> str:
        return _refilled(self.blocks[0], self.blocks[1], prefix)

    def _translated(self, name: str, theirs: int) -> str:
        """Translate a name; `theirs` is the column of each pair that it comes from."""
        source, target = self.blocks[theirs], self.blocks[1 - theirs]
        found = re.match(_as_pattern(source), name)
        if found is None:
            new = _exchanged(name, self.parts, theirs)
        else:
            rest = _exchanged(name[found.end() :], self.inside, theirs)
            new = None if rest is None else _refilled(source, target, found[0]) + rest
        if new is None:
            raise UserError(f"the checkpoint holds {name!r}, which no model of its kind has")
        return new


def _as_pattern(template: str) -> str:
    return re.escape(template).replace(r"\{\}", r"(\d+)")


def _refilled(source: str, target: str, name: str) -> str:
    found = re.fullmatch(_as_pattern(source), name)
    assert found is not None
    return target.format(*found.groups())


def _exchanged(name: str, pairs: Iterable[tuple[str, str]], theirs: int) -> str | None:
    """Replace a name's prefix by the other one of the matching pair."""
    for pair in pairs:
        if name == pair[theirs] or name.startswith(pair[theirs] + "."):
            return pair[1 - theirs] + name[len(pair[theirs]) :]
    return None


def _part_of_triple(name: str, dialect: Dialect) -> tuple[str, str | None]:
    """Return timm's joined name of a query, key or value name, and the part's index."""
    kinds = "weight|bias" if dialect.joint_bias else "weight"
    found = re.fullmatch(rf"({_as_pattern(dialect.blocks[1])}){re.escape(dialect.attention)}(\w+)\.({kinds})", name)
    if found is None or found[found.re.groups - 1] not in _TRIPLE:
        return "", None
    block = _refilled(dialect.blocks[1], dialect.blocks[0], found[1])
    return f"{block}attn.qkv.{found[found.re.groups]}", found[found.re.groups - 1]


def _older_name(name: str, dialect: Dialect) -> str:
    """Undo the renaming of Transformers 5, which by default still writes the older names."""
    table = "relative_position_bias.relative_position_bias_table"
    swin = dialect.blocks[0].startswith("layers.")
    renamed = [
        (r"attention\.([qkv])_proj\.", lambda m: f"{dialect.attention}{_TRIPLE['qkv'.index(m[1])]}."),
        (r"attention\.o_proj\.", "attention.output.dense."),
        (r"(?<!\w)mlp\.fc1\.", "intermediate.dense."),
        (r"(?<!\w)mlp\.fc2\.", "output.dense."),
    ]
    if swin:
        renamed.append((rf"attention\.{table}$", "attention.self.relative_position_bias_table"))
    else:
        renamed += [
            (r"^layers\.", "encoder.layer."),
            (r"^shared_position_bias\.", "encoder.relative_position_bias."),
            (rf"(layer\.\d+)\.{table}$", rf"\1.attention.attention.{table}"),
        ]
    for pattern, new in renamed:
        name = re.sub(pattern, new, name)
    return name


_INSIDE = (
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attn.proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)
_PARTS = (
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("mask_token", "embeddings.mask_token"),
    ("norm", "layernorm"),
)
_TOKENS = (("cls_token", "embeddings.cls_token"), ("pos_embed", "embeddings.position_embeddings"))
_STAGES = (("patch_embed.norm", "embeddings.norm"), ("layers", "encoder.layers"))
_TABLE = "relative_position_bias_table"


def _two_biases(attention: str) -> tuple[tuple[str, str], ...]:
    """Handle models without key bias, whose query and value biases timm keeps separately."""
    return (("attn.q_bias", f"{attention}query.bias"), ("attn.v_bias", f"{attention}value.bias"))


_VIT_BLOCKS, _VIT_ATTENTION = ("blocks.{}.", "encoder.layer.{}."), "attention.attention."
_SWIN_BLOCKS, _SWIN_ATTENTION = ("layers.{}.blocks.{}.", "encoder.layers.{}.blocks.{}."), "attention.self."
DIALECTS = {
    "vit": Dialect(
        blocks=_VIT_BLOCKS,
        attention=_VIT_ATTENTION,
        joint_bias=True,
        parts=_PARTS + _TOKENS,
        inside=_INSIDE,
    ),
    "beit": Dialect(
        blocks=_VIT_BLOCKS,
        attention=_VIT_ATTENTION,
        joint_bias=False,
        parts=(*_PARTS, *_TOKENS, ("fc_norm", "pooler.layernorm"), ("rel_pos_bias", "encoder.relative_position_bias")),
        inside=(
            *_INSIDE,
            *_two_biases(_VIT_ATTENTION),
            ("gamma_1", "lambda_1"),
            ("gamma_2", "lambda_2"),
            (f"attn.{_TABLE}", f"{_VIT_ATTENTION}relative_position_bias.{_TABLE}"),
        ),
    ),
    "swin": Dialect(
        blocks=_SWIN_BLOCKS,
        attention=_SWIN_ATTENTION,
        joint_bias=True,
        parts=_PARTS + _STAGES,
        inside=(*_INSIDE, (f"attn.{_TABLE}", f"{_SWIN_ATTENTION}{_TABLE}")),
    ),
    "swinv2": Dialect(
        blocks=_SWIN_BLOCKS,
        attention=_SWIN_ATTENTION,
        joint_bias=False,
        parts=_PARTS + _STAGES,
        inside=(
            *_INSIDE,
            *_two_biases(_SWIN_ATTENTION),
            ("attn.logit_scale", f"{_SWIN_ATTENTION}logit_scale"),
            ("attn.cpb_mlp", f"{_SWIN_ATTENTION}continuous_position_bias_mlp"),
        ),
    ),
}


def _shift_stage(name: str, by: int) -> str:
    return re.sub(r"^layers\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) + by}.downsample.", name)


def _sort_out(state: Mapping[str, Array], reasons: Mapping[str, str]) -> tuple[State, dict[str, str]]:
    """Split into kept entries and name → why left out."""
    left_out = {}
    for name in state:
        if why := next((why for pattern, why in reasons.items() if re.search(pattern, name)), None):
            left_out[name] = why
    return {name: array for name, array in state.items() if name not in left_out}, left_out


def _place(name: str) -> str:
    """Map timm's name or the mask token to ours."""
    return MASK_TOKEN if name == "mask_token" else f"{BACKBONE}{name}"


def _head_from_convolution(state: Mapping[str, Array]) -> State:
    """Map `decoder.0.*` to our linear head: a 1x1 convolution (P, D, 1, 1) is a linear layer (P, D)."""
    names = {"decoder.0.weight": "head.weight", "decoder.0.bias": "head.bias"}
    if unknown := set(state) - set(names):
        raise UserError(f"the checkpoint holds {min(unknown)!r}, which no linear prediction head has")
    return {names[name]: array.reshape(array.shape[:2]) for name, array in state.items()}


def _head_to_convolution(state: Mapping[str, Array]) -> State:
    """Invert `_head_from_convolution`; returns nothing without a linear head."""
    weight = state.get("head.weight")
    if weight is None:
        return {}
    return {"decoder.0.weight": weight.reshape(*weight.shape, 1, 1), "decoder.0.bias": state["head.bias"]}
