"""Save and load models of a run: the encoder under timm's names for other tools, the whole model for ours."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from simmim.config.pretraining import PretrainConfig
from simmim.errors import UserError
from simmim.keras_engine import weights
from simmim.keras_engine.architectures import Architecture
from simmim.keras_engine.checkpoint import load_weights
from simmim.keras_engine.encoders import BACKBONE
from simmim.keras_engine.model import MaskedImageModel, architecture_of
from simmim.keras_engine.optim import State
from simmim.training.checkpoint_directory import newest_checkpoint
from simmim.training.run_directory import Run
from simmim.training.whole_files import written_whole

_PREFIX = f"{BACKBONE}."
# Arguments of each family in the hub's file besides the user's, as the PyTorch engine builds it.
_FIXED: dict[str, dict[str, Any]] = {
    "vit": {"fc_norm": False},
    "beit": {"use_fc_norm": False},
    "swin": {},
    "resnet": {},
}
_CLASSIFIERS = {"vit": "head", "beit": "head", "swin": "head.fc", "resnet": "fc"}


def encoder_weights(model: MaskedImageModel, state: State) -> weights.State:
    """Return the backbone's weights under timm's names."""
    named = weights.export(model.trainable_variables, state.parameters)
    named |= weights.export(model.non_trainable_variables, state.statistics)
    backbone = {name.removeprefix(_PREFIX): array for name, array in named.items() if name.startswith(_PREFIX)}
    for name in [name for name in backbone if name.endswith(".running_var")]:  # PyTorch's batch norms count
        backbone[f"{name.removesuffix('running_var')}num_batches_tracked"] = np.array(int(state.updates), np.int64)
    return backbone


def save_encoder(directory: Path, model: MaskedImageModel, state: State, config: PretrainConfig) -> None:
    """Write a timm hub directory, which timm and Transformers load; each file atomically."""
    with written_whole(directory / "model.safetensors") as path:
        save_file(encoder_weights(model, state), path)
    with written_whole(directory / "config.json") as path:
        settings = hub_settings(architecture_of(config), config, model.encoder.num_features)
        path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def hub_settings(architecture: Architecture, config: PretrainConfig, features: int) -> dict[str, Any]:
    """Build the config.json of timm's hub format, which timm cannot write without PyTorch."""
    assert config.image_size is not None
    sized = architecture.family != "resnet"
    arguments = {"in_chans": config.channels, "global_pool": "avg"} | _FIXED[architecture.family]
    arguments |= ({"img_size": config.image_size} if sized else {}) | config.model_args
    windows = {"crop": config.crop} if config.crop == "pixels" else {}
    return {
        **windows,
        "architecture": architecture.name,
        "num_classes": 0,
        "num_features": features,
        "global_pool": "avg",
        "model_args": arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": (config.channels, *config.image_size),
            "fixed_input_size": sized,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": config.mean,
            "std": config.std,
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj" if sized else "conv1",
            "classifier": _CLASSIFIERS[architecture.family],
        },
    }


def initialize(model: MaskedImageModel, source: str) -> str:
    """Load the weights of `--init-from`, a run or a safetensors file with timm's names; returns a summary.

    A run of this engine also provides mask token and head if their shapes fit. Raises `UserError` if
    the encoder's weights do not fit.
    """
    if source.startswith("timm:"):
        raise UserError(
            f"--init-from {source} needs timm; use --engine torch, or give local-dir:PATH of a model that timm saved"
        )
    path = Path(source.removeprefix("local-dir:"))
    if path.is_file():
        encoder, rest = load_file(path), {}
    elif (path / "model.safetensors").is_file():
        encoder, rest = load_file(path / "model.safetensors"), {}
    elif (path / "config.toml").is_file():
        encoder, rest = _read_run(Run(path))
    else:
        raise UserError(f"--init-from {source} is neither a run, nor an encoder directory, nor a safetensors file")
    shapes = {weights.torch_name(variable): weights.torch_shape(variable) for variable in model.variables}
    own = {name.removeprefix(_PREFIX): shape for name, shape in shapes.items() if name.startswith(_PREFIX)}
    skipped = ("head.", "fc.")
    encoder = {
        name: array
        for name, array in encoder.items()
        if name in own or not (name.startswith(skipped) or name.endswith(".num_batches_tracked"))
    }
    if set(own) != set(encoder):
        odd = min(set(own) ^ set(encoder))
        raise UserError(f"--init-from {source} does not fit the encoder: {odd!r} is in one and not in the other")
    if odd := [name for name in own if own[name] != encoder[name].shape]:
        shape = f"{encoder[odd[0]].shape} instead of {own[odd[0]]}"
        raise UserError(f"--init-from {source} does not fit the encoder: {odd[0]} is {shape}")
    fitting = {name: array for name, array in rest.items() if shapes.get(name) == array.shape}
    named = weights.read(model) | {_PREFIX + name: array for name, array in encoder.items()} | fitting
    weights.assign(model, named)
    return f"{len(encoder)} encoder tensors" + (f", {len(fitting)} of mask token and head" if fitting else "")


def _read_run(run: Run) -> tuple[weights.State, weights.State]:
    """Read a run's encoder and, if this engine wrote it, the rest of its model."""
    file = run.encoder / "model.safetensors"
    if not file.is_file():
        raise UserError(f"--init-from {run.path} has no encoder yet; wait for its first --save-every-steps")
    rest: weights.State = {}
    if run.read_config(PretrainConfig).engine == "keras" and (checkpoint := newest_checkpoint(run.checkpoints)):
        named = load_weights(checkpoint)
        rest = {name: array for name, array in named.items() if not name.startswith(_PREFIX)}
    return load_file(file), rest
