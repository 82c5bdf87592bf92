"""Read checkpoints of other packages, recognise their model and rename their weights. Nothing in a file is executed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from simmim.data.statistics import IMAGENET_MEAN, IMAGENET_STD
from simmim.errors import UserError
from simmim.interop.infer_model import TimmModel, infer, pools_before_norm
from simmim.interop.pickles import StoredTensor, read_pickle
from simmim.interop.weight_names import (
    DIALECTS,
    Mapped,
    State,
    from_official_simmim,
    from_official_swin,
    from_timm,
    from_transformers,
    to_timm,
)

_KNOWN = (
    "official SimMIM, MAE, Swin and BEiT (.pth), Transformers' ViT, BEiT, Swin and SwinV2, and timm's models "
    "(hub directory, safetensors or .pth)"
)
_OFFICIAL_COLOURS = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
_NORM_EPSILON = {"vit": 1e-6, "beit": 1e-6, "swin": 1e-5, "swinv2": 1e-5}  # timm's, per family


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was recognised."""

    what: str
    """Origin of the checkpoint, for messages."""
    mapped: Mapped
    architecture: TimmModel | None
    """`None` if unknown."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further fields of `PretrainConfig` found in it: mask, target, mean and std."""
    note: str | None = None
    """Warnings about what changes in the conversion."""


@dataclass(frozen=True)
class _Content:
    """Arrays under their original names, with accompanying metadata."""

    arrays: State
    extra: Mapping[str, Any]
    config: Mapping[str, Any]
    """The config.json beside them."""
    processor: Mapping[str, Any]
    """The preprocessor_config.json beside them."""


def read_checkpoint(path: Path, *, model: str | None = None, model_args: Mapping[str, Any] | None = None) -> Checkpoint:
    """Read a checkpoint file or directory of another package. `model` overrides its architecture with a timm name.

    Raises `UserError` for a damaged or unknown file (it quotes some names) or an unknown architecture, and
    `simmim.interop.pickles.UnsafePickleError` for a pickle that would execute code.
    """
    content = _read(path)
    given = None if model is None else TimmModel(model=model, model_args=dict(model_args or {}))
    try:
        for recognise in (_timm_hub, _transformers, _official_simmim, _plain):
            if found := recognise(content, given):
                return found
        names = ", ".join(list(content.arrays)[:4])
        raise UserError(f"it is of no known kind: it holds {names} …; known are {_KNOWN}")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: what it says of its model is not understood ({error!r}); give --model") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _timm_hub(content: _Content, given: TimmModel | None) -> Checkpoint | None:
    if "architecture" not in content.config:
        return None
    cfg = content.config.get("pretrained_cfg", {})
    own = ("img_size", "in_chans", "num_classes", "global_pool", "fc_norm", "use_fc_norm", "drop_path_rate")
    told = content.config.get("model_args", {})
    arguments = {name: value for name, value in told.items() if name not in own and value is not None}
    mapped = from_timm(content.arrays)
    if pools_before_norm(to_timm(mapped.state)):
        arguments["use_fc_norm" if content.config["architecture"].startswith("beit") else "fc_norm"] = True
    architecture = given or TimmModel(model=content.config["architecture"], model_args=arguments)
    _, height, width = cfg.get("input_size", (3, 224, 224))
    return Checkpoint(
        what=f"timm's {content.config['architecture']}",
        mapped=mapped,
        architecture=replace(architecture, image_size=(height, width)),
        settings={name: tuple(cfg[name]) for name in ("mean", "std") if name in cfg},
    )


def _transformers(content: _Content, given: TimmModel | None) -> Checkpoint | None:
    config = content.config
    kind = config.get("model_type")
    if kind is None:
        return None
    if kind not in DIALECTS:
        raise UserError(f"a model of Transformers of the kind {kind!r} is not known; known are {', '.join(DIALECTS)}")
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"its activation is {config['hidden_act']!r}; only gelu is known")
    mapped = from_transformers(content.arrays, kind)
    ours = {"num_heads": config.get("num_attention_heads"), "image_size": _pair(config.get("image_size"))}
    ours |= {"window_size": config.get("window_size")}
    if any(window := config.get("pretrained_window_sizes") or ()):
        ours["pretrained_window_sizes"] = list(window)
    hints = {name: value for name, value in ours.items() if value is not None}
    epsilon = config.get("layer_norm_eps", _NORM_EPSILON[kind])
    note = f"norms add {_NORM_EPSILON[kind]:g} to variances, as timm's do, and not {epsilon:g}"
    colours = {"mean": "image_mean", "std": "image_std"}
    return Checkpoint(
        what=f"Transformers' {(config.get('architectures') or [kind])[0]}",
        mapped=mapped,
        architecture=_infer(given, mapped, {}, hints),
        settings={k: tuple(content.processor[v]) for k, v in colours.items() if v in content.processor},
        note=note if epsilon != _NORM_EPSILON[kind] else None,
    )


def _official_simmim(content: _Content, given: TimmModel | None) -> Checkpoint | None:
    names = content.arrays
    if not ("encoder.mask_token" in names and "decoder.0.weight" in names):
        return None
    mapped = from_official_simmim(content.arrays)
    record = content.extra.get("config") or {}
    hints, settings = _official_facts(record)
    buffers = {name.removeprefix("encoder."): array for name, array in content.arrays.items()}
    what = "official SimMIM" + (f" ({record['MODEL']['TYPE']})" if record else "")
    architecture = _infer(given, mapped, buffers, hints)
    return Checkpoint(what=what, mapped=mapped, architecture=architecture, settings=_OFFICIAL_COLOURS | settings)


def _official_facts(record: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Extract the model's facts and the method's settings from an official configuration.

    Skips learning rates: they are scaled by a world size that the file does not record.
    """
    if not record:
        return {}, {}
    data, model = record["DATA"], record["MODEL"]
    part = model[{"vit": "VIT", "swin": "SWIN", "swinv2": "SWINV2"}[model["TYPE"]]]
    hints: dict[str, Any] = {"num_heads": part["NUM_HEADS"], "image_size": _pair(data["IMG_SIZE"])}
    if "WINDOW_SIZE" in part:
        hints["window_size"] = part["WINDOW_SIZE"]
    if any(part.get("PRETRAINED_WINDOW_SIZES", ())):
        hints["pretrained_window_sizes"] = part["PRETRAINED_WINDOW_SIZES"]
    settings = {
        "mask": {"kind": "random", "cell": data["MASK_PATCH_SIZE"], "ratio": data["MASK_RATIO"]},
        "drop_path": model["DROP_PATH_RATE"],
    }
    normalised = model.get("SIMMIM", {}).get("NORM_TARGET", {})
    if normalised.get("ENABLE"):
        if normalised["PATCH_SIZE"] != 47:
            raise UserError(f"its target is normalised over {normalised['PATCH_SIZE']} pixels; only 47 is known")
        settings["target"] = "local_normalized"
    return hints, settings


def _plain(content: _Content, given: TimmModel | None) -> Checkpoint | None:
    """Read a bare state dict with timm's names or official Swin names."""
    arrays = content.arrays
    settings: dict[str, Any] = _OFFICIAL_COLOURS
    if "layers.0.downsample.reduction.weight" in arrays:
        what, mapped = "official Swin", from_official_swin(arrays)
    elif any(name.startswith("decoder_") for name in arrays):
        what, mapped = "official MAE", from_timm(arrays)
    else:
        what, mapped, settings = "weights under timm's names", from_timm(arrays), {}
    architecture = _infer(given, mapped, arrays, {})
    convolutional = {"conv1.weight", "stem.0.weight", "stem.conv.weight"} & set(arrays)
    if architecture is None and not convolutional:
        return None
    return Checkpoint(what=what, mapped=mapped, architecture=architecture, settings=settings)


def _infer(given: TimmModel | None, mapped: Mapped, buffers: State, hints: Mapping[str, Any]) -> TimmModel | None:
    if given is not None:
        return replace(given, image_size=hints.get("image_size"))
    return infer(to_timm(mapped.state), buffers, hints)


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width


def _read(path: Path) -> _Content:
    if path.is_dir():
        if (path / "config.toml").is_file():
            raise UserError(f"{path} is a run already; every command takes it as it is")
        directory, files = path, _files_of(path)
    elif path.is_file():
        directory, files = path.parent, [path]
    else:
        raise UserError(f"{path} is not there; give a checkpoint file or directory")
    read: State = {}
    extra: Mapping[str, Any] = {}
    for file in files:
        if file.suffix == ".safetensors":
            read |= _read_safetensors(file)
        else:
            arrays, extra = _read_torch(file)
            read |= arrays
    arrays = {name.removeprefix("module."): _as_float32(array) for name, array in read.items()}
    # A configuration beside a .pth file may belong to another model.
    beside = path.is_dir() or path.suffix == ".safetensors"
    config = _read_json(directory / "config.json") if beside else {}
    return _Content(arrays, extra, config, _read_json(directory / "preprocessor_config.json") if beside else {})


def _files_of(directory: Path) -> list[Path]:
    """List a directory's weight files, sharded or whole; prefer safetensors."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (index := directory / f"{name}.index.json").is_file():
            return [directory / part for part in sorted(set(_read_json(index)["weight_map"].values()))]
        if (directory / name).is_file():
            return [directory / name]
    raise UserError(f"{directory} has neither model.safetensors nor pytorch_model.bin; give a checkpoint")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return content if isinstance(content, dict) else {}


_SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}


def _read_safetensors(path: Path) -> State:
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from None
    arrays = {}
    for name, entry in entries:
        if entry["dtype"] == "BF16":
            flat = (np.frombuffer(entry["data"], "<u2").astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] in _SAFETENSORS:
            flat = np.frombuffer(entry["data"], _SAFETENSORS[entry["dtype"]])
        else:
            raise UserError(f"{path} holds {name!r} in the type {entry['dtype']}, which is not known")
        arrays[name] = flat.reshape(entry["shape"])
    return arrays


_WRAPPERS = ("model", "state_dict", "module")


def _read_torch(path: Path) -> tuple[State, Mapping[str, Any]]:
    """Split a `.pth` file into weights, which may be nested under a key, and the rest."""
    content = read_pickle(path)
    extra: Mapping[str, Any] = {}
    while isinstance(content, dict) and not any(isinstance(value, StoredTensor) for value in content.values()):
        inner = next((name for name in _WRAPPERS if name in content), None)
        if inner is None:
            names = ", ".join(str(name) for name in list(content)[:6]) or "nothing"
            raise UserError(f"{path} holds no weights: neither tensors nor {' or '.join(_WRAPPERS)}, but {names}")
        extra, content = extra or content, content[inner]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no weights but a {type(content).__name__}; give a state dict")
    return {name: value.array() for name, value in content.items() if isinstance(value, StoredTensor)}, extra


def _as_float32(array: Any) -> Any:
    return array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array
