"""Save and load a run's models: the encoder for other tools, the whole model for ours."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from simmim.config.pretraining import PretrainConfig
from simmim.config.training import TrainingConfig
from simmim.errors import UserError
from simmim.interop.checkpoints import read_checkpoint
from simmim.interop.weight_names import BACKBONE, MASK_TOKEN, from_timm
from simmim.method.objectives import PixelReconstruction
from simmim.torch_engine.models.attention import set_attention
from simmim.torch_engine.models.encoders import load_timm
from simmim.torch_engine.models.heads import LinearDecoder
from simmim.torch_engine.models.kernels import kernels_of_rules, set_kernels
from simmim.torch_engine.models.mask_guides import create_guide
from simmim.torch_engine.models.masked_image_model import MaskedImageModel, PretrainStep, build_model
from simmim.torch_engine.models.objective import ObjectiveModule, create_objectives
from simmim.torch_engine.models.resize import adapt_output_channels, fit_backbone
from simmim.torch_engine.models.savings import PLAIN, Counts, Savings, count
from simmim.torch_engine.models.sound_input import SoundInput
from simmim.torch_engine.train.checkpoint import load_model_state
from simmim.training.checkpoint_directory import newest_checkpoint
from simmim.training.origins import check_encoder, encoder_directory, is_timms
from simmim.training.run_directory import Run, read_pretraining
from simmim.training.whole_files import written_whole


def full_state(model: nn.Module, *, sharded: bool) -> dict[str, Any]:
    """Return the state of a model that may be compiled, copied or sharded; all processes call this together."""
    options = StateDictOptions(full_state_dict=sharded, cpu_offload=sharded)
    return get_model_state_dict(model, options=options)


def save_hub(
    directory: Path,
    backbone: nn.Module,
    state: dict[str, Tensor],
    config: TrainingConfig,
    classes: tuple[str, ...] | None = None,
    crop: float = 1.0,
    dtype: np.dtype[Any] | None = None,
) -> None:
    """Write a timm hub directory, which timm and Transformers load with nothing of ours; each file whole or not at all.

    `state` holds the weights under timm's names; `backbone` says how to build the module again; `classes` are the
    names of what it tells apart, and `crop` the share of an image's short side that it is to see. `dtype` is that of
    the pixels that a predictor decodes.
    """
    assert config.image_size is not None and isinstance(config.mean, tuple) and isinstance(config.std, tuple)
    data_config = {
        "input_size": (config.channels, *config.image_size),
        "mean": config.mean,
        "std": config.std,
        "crop_pct": crop,
    }
    save_weights(directory / "model.safetensors", state)
    with written_whole(directory / "config.json") as path:
        save_config_for_hf(backbone, str(path), data_config=data_config)
        settings = json.loads(path.read_text(encoding="utf-8"))
        # Transformers passes num_classes itself and would pass it twice.
        settings["model_args"].pop("num_classes", None)
        if classes is not None:
            settings["label_names"] = list(classes)
        if config.input == "sounds":
            settings["sound"] = config.sound.as_table()
        if isinstance(config, PretrainConfig) and config.crop == "pixels":
            settings["crop"] = config.crop
        if dtype is not None:
            settings["pixel_dtype"] = dtype.name
        path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def save_classifier(
    directory: Path, run: str, backbone: Any, classes: tuple[str, ...], crop: float, dtype: np.dtype[Any]
) -> None:
    """Write the encoder of `run`, which has got a last layer for `classes` and takes means, as a hub directory.

    `crop` and `dtype` as for `save_hub`.
    """
    source = encoder_directory(run)
    assert source is not None
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    shape = {"num_classes": len(classes), "global_pool": "avg"}
    settings |= shape | {"label_names": list(classes), "pixel_dtype": dtype.name}
    settings["pretrained_cfg"] |= {"num_classes": len(classes), "crop_pct": crop}
    arguments = settings.setdefault("model_args", {})
    arguments.pop("num_classes", None)  # Transformers passes it itself
    arguments["global_pool"] = "avg"
    if hasattr(backbone, "fc_norm"):
        name = "use_fc_norm" if settings["architecture"].startswith("beit") else "fc_norm"
        arguments[name] = not isinstance(backbone.fc_norm, nn.Identity)
    save_weights(directory / "model.safetensors", backbone.state_dict())
    with written_whole(directory / "config.json") as path:
        path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def save_backbone(directory: Path, backbone: nn.Module) -> None:
    """Write a timm module as a hub directory, as its own description has it; config.json comes last."""
    save_weights(directory / "model.safetensors", backbone.state_dict())
    with written_whole(directory / "config.json") as path:
        facts: Any = backbone.pretrained_cfg
        save_config_for_hf(
            backbone, str(path), data_config={name: facts[name] for name in ("input_size", "mean", "std")}
        )


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    with written_whole(path) as aside:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, aside)


def load_encoder(run: str | Path) -> nn.Module:
    """Load the encoder of a run or an encoder directory: a timm module without classifier, in evaluation mode.

    One of sounds has a `front_end`, a `SoundInput`: `encoder(encoder.front_end(encoder.front_end.read("a.wav")))`.
    `timm:NAME` is a model of timm with its weights, `local-dir:PATH` one that timm saved. Raises `UserError` where
    there is no saved encoder.
    """
    return _encoder_of(run, pretrained=True)


def untrained_encoder(run: str | Path) -> nn.Module:
    """Build the encoder that `load_encoder` loads, with random weights."""
    return _encoder_of(run, pretrained=False)


def _encoder_of(run: str | Path, *, pretrained: bool) -> nn.Module:
    if is_timms(str(run)):
        return load_timm(str(run), weights=pretrained)
    check_encoder(str(run))
    directory = encoder_directory(run)
    assert directory is not None
    backbone = timm.create_model(f"local-dir:{directory}", pretrained=pretrained, num_classes=0).eval()
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if "sound" in settings:
        backbone.front_end = SoundInput(settings)
    backbone.sees_windows = settings.get("crop") == "pixels"
    return backbone


def starting_encoder(run: str | Path) -> nn.Module | None:
    """Build the encoder of a run with the weights that its training began from; `None` if those were random.

    Raises `UserError` where what `--init-from` named is not there any more.
    """
    config = Run(Path(run)).read_config(PretrainConfig)
    source = config.init_from
    if source is None:
        return None

    def begin(model: MaskedImageModel) -> None:
        initialize(model, source, config.model)

    step = build_step(config, PLAIN, begin=begin, trains=False)
    backbone = untrained_encoder(run)
    backbone.load_state_dict(step.model.encoder.backbone.state_dict())
    return backbone


def load_model(run: str | Path) -> MaskedImageModel:
    """Load the `MaskedImageModel` of a run's newest checkpoint that verifies, on the CPU, in evaluation mode.

    Raises `UserError` where `run` is not a pretraining run or has no checkpoint yet.
    """
    return load_run(run)[0].model


def load_run(run: str | Path, *, objectives: bool = False) -> tuple[PretrainStep, PretrainConfig]:
    """Load the model of a run, as `load_model`, with its normalisation, and its configuration.

    Its objectives (a teacher, clusters) and its mask guide, which are for training, come only if asked for.
    """
    config = read_pretraining(run)
    checkpoint = newest_checkpoint(Run(Path(run)).checkpoints)
    if checkpoint is None:
        raise UserError(f"{run} has no checkpoint yet; wait for its first --save-every-steps")
    # A run's features are those of anyone who loads its encoder, to the bit: products by the usual library.
    step = build_step(config, PLAIN if config.plain_step else Savings(products=False), trains=objectives)
    load_model_state(checkpoint, step)
    return step.eval(), config


def build_step(
    config: PretrainConfig,
    savings: Savings | None = None,
    *,
    begin: Callable[[MaskedImageModel], None] = lambda model: None,
    trains: bool = True,
) -> PretrainStep:
    """Build what one step trains, for a complete configuration, with random weights.

    `begin` may load initial weights. It is called before objectives are built, which may copy the encoder (a teacher).
    A step that does not train has no mask guide and no objective but pixels: what they own (a teacher, clusters) is for
    training only.
    """
    assert isinstance(config.mean, tuple) and isinstance(config.std, tuple) and config.image_size is not None
    savings = savings or (PLAIN if config.plain_step else Savings())
    model = build_model(config)
    begin(model)
    patch, stride = model.encoder.patch_size, model.encoder.stride
    counts = count(config.mask, config.image_size, patch=patch, stride=stride) if config.masks_images else Counts()
    if config.device == "cpu":
        backbone = model.encoder.backbone
        kernels = kernels_of_rules(config.kernels, backbone, config.precision, pretraining=True)
        if not savings.attention:
            kernels = dataclasses.replace(kernels, attention="fused")
        if not savings.products:
            kernels = dataclasses.replace(kernels, linear="default")
        set_kernels(model, backbone, kernels)
    elif config.device == "cuda":
        set_attention(model.encoder.backbone, config.gpu.attention)
    wanted = tuple(each for each in config.objectives if trains or isinstance(each, PixelReconstruction))
    objectives = create_objectives(model, dataclasses.replace(config, objectives=wanted))
    if config.checkpoint_activations:
        _check_passes({kind: module for kind, (_, module) in objectives.items()})
    guide = create_guide(config.mask.for_patch(patch), model, config) if trains and config.masks_images else None
    return PretrainStep(
        model,
        config.mean,
        config.std,
        counts=counts,
        savings=savings,
        objectives=objectives,
        guide=guide,
        spectrogram=config.spectrogram,
    )


def _check_passes(objectives: dict[str, ObjectiveModule]) -> None:
    """Refuse several passes of the encoder: the backward pass of one would recompute with the masks of another."""
    passes = [kind for kind, module in objectives.items() for _ in module.passes]
    if passes and len(passes) + any(module.needs_masked for module in objectives.values()) > 1:
        raise UserError(
            f"--checkpoint-activations is not for objective {passes[0]} here, with which a step encodes the images "
            "more than once; use --accumulate-steps"
        )


def initialize(model: MaskedImageModel, source: str, name: str) -> str:
    """Load the weights of `--init-from`: a run, a model of timm's (`timm:NAME`, `local-dir:PATH`), or whatever
    `simmim convert` takes if it is of the timm model `name`.

    Position tables and channels are resized; mask token and head come too, where there are such. Says what was loaded.
    Raises `UserError` where the encoder's weights do not fit.
    """
    path = Path(source)
    if is_timms(source):
        state = as_tensors(from_timm(load_timm(source, option="--init-from").state_dict()).state)
        target = model.target.kind
    elif (path / "config.toml").is_file():
        other = load_model(path)
        state, target = other.state_dict(), other.target.kind
    elif path.exists():
        try:
            checkpoint = read_checkpoint(path, model=name)
        except UserError as error:
            raise UserError(f"--init-from {error}") from None
        state, target = as_tensors(checkpoint.mapped.state), checkpoint.settings.get("target", "pixels")
    else:
        raise UserError(f"--init-from {source} is not there; give a run, a checkpoint, timm:NAME or local-dir:PATH")
    if target != model.target.kind:  # a head for something else
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    try:
        resized, fresh = adopt(model, state)
    except UserError as error:
        raise UserError(f"--init-from {source} does not fit the encoder: {error}; use the same --model") from None
    kept = [*resized, *(f"new {part}" for part in fresh)]
    return f"{len(state)} tensors" + (f" ({'; '.join(kept)})" if kept else "")


def as_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copy NumPy arrays, or tensors, to tensors."""
    return {name: torch.as_tensor(array).clone() for name, array in state.items()}


def adopt(model: MaskedImageModel, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Load weights under our names, for another image size, window or channels if need be.

    Returns what was resized, and what keeps its random numbers: mask token or head that are not there or of another
    kind. Raises `UserError` where the encoder's weights do not fit (`fit_backbone`).
    """
    backbone = {name.removeprefix(BACKBONE): tensor for name, tensor in state.items() if name.startswith(BACKBONE)}
    fitted, resized = fit_backbone(backbone, model.encoder.backbone)
    model.encoder.backbone.load_state_dict(fitted)
    own = model.state_dict()
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(BACKBONE)}
    if isinstance(model.head, LinearDecoder) and {"head.weight", "head.bias"} <= set(rest):
        old, new = len(rest["head.bias"]), len(own["head.bias"])
        pixels = model.encoder.stride**2
        if old != new and old % pixels == new % pixels == 0:
            for name in ("head.weight", "head.bias"):
                rest[name] = adapt_output_channels(rest[name], old // pixels, new // pixels)
            resized.append(f"the head's channels {old // pixels} → {new // pixels}")
    # What an encoder of visible cells has after its backbone serves the head.
    decoder = [name for name in own if not name.startswith(BACKBONE) and name != MASK_TOKEN]
    parts = {"mask token": [MASK_TOKEN], "head": decoder}
    fresh = []
    for part, names in parts.items():
        if all(name in rest and rest[name].shape == own[name].shape for name in names):
            model.load_state_dict({name: rest[name] for name in names}, strict=False)
        else:
            fresh.append(part)
    return resized, fresh
