"""Encoders of fine-tuning: find the pretrained weights and load them into a model for the task."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
from safetensors.torch import load_file
from torch import Tensor, nn

from simmim.config.sound import SPECTROGRAM, Sound
from simmim.config.tasks import FinetuneConfig
from simmim.data.sources import ImageSource, sniff
from simmim.data.statistics import IMAGENET_MEAN, IMAGENET_STD, measure_mean_std
from simmim.errors import UserError
from simmim.method.schedules import finetune_lr
from simmim.torch_engine.models.encoders import default_image_size, load_timm, sketch_encoder
from simmim.torch_engine.models.family import find_family
from simmim.torch_engine.models.resize import SHARED_BIAS, fit_backbone
from simmim.training.origins import check_encoder, encoder_directory, is_timms, tuned_model
from simmim.training.plan import measured_once
from simmim.training.resume import recall
from simmim.training.run_directory import Run
from simmim.training.trainer import World
from simmim.training.whole_files import read_json

_SCRATCH = "vit_small_patch16_224"  # without --model
_ENCODER = "pyramid.backbone."  # within the names of a detector's or a segmenter's weights
_LEVEL = re.compile(r"((?:pyramid\.levels|network\.inner_blocks|network\.layer_blocks)\.)(\d+)\.")


@dataclass(frozen=True)
class Origin:
    """An encoder to start from: its timm description, and its weights under timm's names."""

    model: str
    model_args: dict[str, Any]
    image_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...] | None
    """`None` for scratch, as `std`."""
    std: tuple[float, ...] | None
    weights: dict[str, Tensor] | None
    """`None` for scratch, and where a checkpoint holds them; those of the whole model for one of the same task."""
    sound: Sound | None = None
    """Front end of an encoder of sounds."""


def find_origin(config: FinetuneConfig) -> Origin:
    """Find the encoder that `--from` names. Raises `UserError` if there is none.

    A run with a checkpoint resumes without that encoder: the checkpoint holds the weights.
    """
    try:
        return _read_origin(config)
    except UserError:
        begun = recall(config)
        if begun is None or begun.init != config.init or not any(Run(Path(begun.out or "")).checkpoints.glob("step-*")):
            raise
    assert begun.image_size is not None and isinstance(begun.mean, tuple) and isinstance(begun.std, tuple)
    sound = begun.sound if begun.input == "sounds" else None
    return Origin(begun.model, begun.model_args, begun.image_size, begun.channels, begun.mean, begun.std, None, sound)


def _read_origin(config: FinetuneConfig) -> Origin:
    assert config.init is not None
    if config.init == "scratch":
        model = _SCRATCH if config.model == "auto" else config.model
        return Origin(model, config.model_args, default_image_size(model), config.channels or 3, None, None, None)
    if is_timms(config.init):
        return _from_timm(config.init)
    if (model := tuned_model(config)) is not None:
        return _from_model(model)
    check_encoder(config.init, "--from")
    directory = encoder_directory(config.init)
    assert directory is not None
    name, arguments, data, sound = _read_hub(directory)
    channels, height, width = data["input_size"]
    weights = load_file(directory / "model.safetensors")
    return Origin(name, arguments, (height, width), channels, tuple(data["mean"]), tuple(data["std"]), weights, sound)


def _from_model(directory: Path) -> Origin:
    """Read a fine-tuned detector or segmenter."""
    told = read_json(directory / "config.json")
    height, width = told["image_size"]
    colours = tuple(told["mean"]), tuple(told["std"])
    weights = load_file(directory / "model.safetensors")
    return Origin(told["model"], told["model_args"], (height, width), told["channels"], *colours, weights)


def _read_hub(directory: Path) -> tuple[str, dict[str, Any], dict[str, Any], Sound | None]:
    """Return timm's name of a hub directory's model, its arguments, how it takes images, and its front end."""
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    told = settings.get("model_args", {})
    arguments = {name: value for name, value in told.items() if name not in ("in_chans", "img_size", "num_classes")}
    sound = Sound(**settings["sound"]) if "sound" in settings else None
    return settings["architecture"], arguments, settings.get("pretrained_cfg", settings), sound


def _from_timm(source: str) -> Origin:
    """Read a model that timm describes; `load_timm` raises for one that is not there."""
    if source.startswith("timm:"):
        name, arguments = source.removeprefix("timm:"), {}
        find_family(name)  # before weights are fetched
        model = load_timm(source, option="--from")
    else:
        model = load_timm(source, option="--from")
        name, arguments, *_ = _read_hub(Path(source.removeprefix("local-dir:")))
        find_family(name)
    cfg: Any = model.pretrained_cfg
    channels, height, width = cfg["input_size"]
    mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
    return Origin(name, arguments, (height, width), channels, mean, std, model.state_dict())


def with_encoder_facts(
    config: FinetuneConfig, origin: Origin, images: ImageSource, world: World | None = None, **machine: Any
) -> FinetuneConfig:
    """Return the configuration with the encoder's facts filled in. Only the warm-up stays open.

    `images` are those to train on. Raises `UserError` for a `--model` that is not that of the weights.
    """
    if config.model not in ("auto", origin.model) and config.model.split(".")[0] != origin.model.split(".")[0]:
        raise UserError(
            f"--model {config.model} is not the encoder of --from {config.init}, which is {origin.model}; leave it out"
        )
    size = SPECTROGRAM if config.input == "sounds" and origin.mean is None else origin.image_size
    size = config.image_size or size
    config = dataclasses.replace(config, channels=config.channels or origin.channels, image_size=size)
    mean, std = _colours(config, origin, images, world)
    config = dataclasses.replace(config, mean=mean, std=std)
    config.check_colours()
    config = dataclasses.replace(
        config,
        model=origin.model,
        model_args={**origin.model_args, **config.model_args},
        layer_decay=config.layer_decay or find_family(origin.model).layer_decay,
        **machine,
    )
    return dataclasses.replace(config, lr=config.lr or _usual_rate(config))


def _usual_rate(config: FinetuneConfig) -> float:
    """Return the learning rate of a fine-tuning that leaves it open; a resumed run keeps its own."""
    begun = recall(config)
    if begun is not None and begun.lr is not None:
        return begun.lr
    assert config.image_size is not None
    width = sketch_encoder(config.model, config.image_size, config.model_args).width
    return finetune_lr(config.batch_size, width)


def _colours(config: FinetuneConfig, origin: Origin, images: ImageSource, world: World | None) -> tuple[Any, ...]:
    """Return mean and std, (C,) each: as given, else those of the encoder, else ImageNet's, else measured.

    ImageNet's are for 8-bit colour images only. An encoder's do not apply to another number of channels. A resumed run
    keeps what it measured, and rank 0 measures for all.
    """
    if isinstance(config.mean, tuple) and isinstance(config.std, tuple):
        return config.mean, config.std
    if config.mean is None and origin.mean is not None and origin.channels == config.channels:
        return origin.mean, origin.std
    dtype = sniff(images, channels=config.channels)
    if config.mean is None and config.channels == 3 and dtype == np.uint8:
        return IMAGENET_MEAN, IMAGENET_STD
    begun = recall(config)
    how: dict[str, Any] = {"channels": config.channels, "dtype": dtype, "seed": config.seed}
    numbers = measured_once(
        begun and (begun.mean, begun.std),
        lambda: measure_mean_std(images, **how, spectrogram=config.spectrogram),
        (2, config.channels),
        world,
    )
    return tuple(tuple(row) for row in numbers.tolist())


def create_task_backbone(config: FinetuneConfig, weights: dict[str, Tensor] | None, **head: Any) -> nn.Module:
    """Create the timm module of an encoder for a task and load `weights`. `head` gives arguments such as num_classes.

    As in the official fine-tuning, a ViT averages its tokens and applies a new norm after that, and a relative bias
    that all blocks share is copied to each block (SimMIM, appendix A).
    """
    family = find_family(config.model)
    arguments: dict[str, Any] = dict(config.model_args)
    if family.takes_image_size:
        arguments["img_size"] = config.image_size
    arguments |= {"drop_path_rate": config.drop_path} | head
    if config.model_args.get("use_shared_rel_pos_bias"):
        arguments |= {"use_shared_rel_pos_bias": False, "use_rel_pos_bias": True}
    backbone = timm.create_model(config.model, in_chans=config.channels, **arguments)
    if weights is not None:
        load_backbone(backbone, weights)
    return backbone


def encoder_alone(weights: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Return the encoder's part of the weights of an `Origin`, under timm's names."""
    whole = {name: tensor for name, tensor in (weights or {}).items() if _ENCODER in name}
    return {name.partition(_ENCODER)[2]: tensor for name, tensor in whole.items()} if whole else weights


def take_head(
    model: nn.Module, config: FinetuneConfig, weights: dict[str, Tensor] | None, *, of_classes: tuple[str, ...]
) -> None:
    """Load what follows the encoder from the weights of an `Origin` that has it, where shapes fit.

    `of_classes` begins the names of the last layers, which are kept for the same classes only. A pyramid may look at
    fewer or more of the finest levels than the one of the weights; those of one stride belong together.
    """
    directory = tuned_model(config) if weights and any(_ENCODER in name for name in weights) else None
    if directory is None or weights is None:
        return
    told = read_json(directory / "config.json")
    same, own = tuple(told["label_names"]) == config.classes, model.state_dict()
    finer = count_levels(weights) - count_levels(own)
    renamed = {_LEVEL.sub(lambda found: f"{found[1]}{int(found[2]) - finer}.", name): name for name in weights}
    taken = {
        name: weights[old]
        for name, old in renamed.items()
        if name in own and own[name].shape == weights[old].shape and _ENCODER not in name
        if same or not name.startswith(of_classes)
    }
    model.load_state_dict(own | taken)


def count_levels(weights: Mapping[str, Tensor]) -> int:
    """Count the levels of the encoder's pyramid that a saved model looks at, from its names."""
    return len({found[2] for name in weights if (found := _LEVEL.search(name))})


def load_backbone(backbone: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights of an encoder into a module that may have another head or size. Raises `UserError` on a misfit.

    Parameters that only the task has keep their random values. Weights that only the encoder has are left out.
    """
    own = backbone.state_dict()
    kept = {name: tensor for name, tensor in weights.items() if name in own or name == SHARED_BIAS}
    for name, tensor in own.items():
        if name.startswith(("head", "fc.", "fc_norm.")) and (name not in kept or kept[name].shape != tensor.shape):
            kept[name] = tensor
    try:
        backbone.load_state_dict(fit_backbone(kept, backbone)[0])
    except UserError as error:
        raise UserError(f"the encoder's weights do not fit {type(backbone).__name__}: {error}") from None
