"""What a run keeps of a model, in and out: the encoder for other tools, the whole model for ours."""

import json
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from simmim.config import PretrainConfig, TrainingConfig
from simmim.run import Run, written_whole
from simmim.torch_engine.checkpoint import load_model_state, newest_checkpoint
from simmim.torch_engine.model import MaskedImageModel, PretrainStep, build_model


def full_state(model: nn.Module, *, sharded: bool) -> dict[str, Any]:
    """The state of a model that may be compiled, copied or sharded over processes; all of them call this together."""
    options = StateDictOptions(full_state_dict=sharded, cpu_offload=sharded)
    return get_model_state_dict(model, options=options)


def save_hub(
    directory: Path,
    backbone: nn.Module,
    state: dict[str, Tensor],
    config: TrainingConfig,
    classes: tuple[str, ...] | None = None,
) -> None:
    """Write a timm hub directory, which timm and Transformers load with nothing of ours; each file whole or not at all.

    `state` holds the weights under timm's names; `backbone` says how to build the module again; `classes` are the
    names of what it tells apart.
    """
    assert config.image_size is not None and isinstance(config.mean, tuple) and isinstance(config.std, tuple)
    data_config = {
        "input_size": (config.channels, *config.image_size),
        "mean": config.mean,
        "std": config.std,
        "crop_pct": 1.0,
    }
    with written_whole(directory / "model.safetensors") as path:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path)
    with written_whole(directory / "config.json") as path:
        save_config_for_hf(backbone, str(path), data_config=data_config)
        settings = json.loads(path.read_text(encoding="utf-8"))
        # Transformers passes num_classes itself and would pass it twice.
        settings["model_args"].pop("num_classes", None)
        if classes is not None:
            settings["label_names"] = list(classes)
        path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def load_encoder(run: str | Path) -> nn.Module:
    """The encoder of a run, or of an encoder directory, as a plain timm module without classifier, ready to evaluate.

    `ValueError` where `run` has no saved encoder.
    """
    directory = Run(Path(run)).encoder
    if not directory.is_dir():
        directory = Path(run)
    if not (directory / "config.json").is_file():
        raise ValueError(f"{run} has no encoder directory; give the --out directory of a run that has saved")
    return timm.create_model(f"local-dir:{directory}", pretrained=True, num_classes=0).eval()


def load_model(run: str | Path) -> MaskedImageModel:
    """The `MaskedImageModel` of a run's newest checkpoint that verifies, on the CPU, in evaluation mode.

    `ValueError` where `run` is not a pretraining run or has no checkpoint yet.
    """
    return load_run(run)[0].model


def load_run(run: str | Path) -> tuple[PretrainStep, PretrainConfig]:
    """The model of a run, as `load_model`, with its normalisation, and its configuration."""
    directory = Run(Path(run))
    config = directory.read_config(PretrainConfig)
    checkpoint = newest_checkpoint(directory.checkpoints)
    if checkpoint is None:
        raise ValueError(f"{run} has no checkpoint yet; wait for its first --save-every-steps")
    step = build_step(config)
    load_model_state(checkpoint, step)
    return step.eval(), config


def build_step(config: PretrainConfig) -> PretrainStep:
    """What one step trains, of a complete configuration, with random weights."""
    assert isinstance(config.mean, tuple) and isinstance(config.std, tuple)
    return PretrainStep(build_model(config), config.mean, config.std)


def initialize(model: MaskedImageModel, source: str) -> str:
    """Load the weights of `--init-from`, a run or a safetensors file with timm's names; says what was loaded.

    From a run come the mask token and the head too, where their shapes fit. One-line `ValueError` where the encoder's
    weights do not fit.
    """
    path = Path(source)
    if path.is_file():
        try:
            encoder, rest = load_file(path), {}
        except SafetensorError as error:
            raise ValueError(f"--init-from {source} is no safetensors file: {error}; give one, or a run") from None
    elif (path / "config.toml").is_file():
        other = load_model(path)
        encoder = other.encoder.backbone.state_dict()
        rest = {name: tensor for name, tensor in other.state_dict().items() if not name.startswith("encoder.backbone.")}
    else:
        raise ValueError(f"--init-from {source} is neither a run nor a safetensors file; give one of them")
    own: dict[str, Tensor] = model.encoder.backbone.state_dict()
    encoder = {name: tensor for name, tensor in encoder.items() if name in own or not name.startswith(("head.", "fc."))}
    if set(own) != set(encoder):
        odd = min(set(own) ^ set(encoder))
        rule = f"{odd!r} is in one and not in the other"
        raise ValueError(f"--init-from {source} does not fit the encoder: {rule}; use the same --model")
    if odd := [name for name in own if own[name].shape != encoder[name].shape]:
        rule = f"{odd[0]} is {tuple(encoder[odd[0]].shape)} instead of {tuple(own[odd[0]].shape)}"
        raise ValueError(f"--init-from {source} does not fit the encoder: {rule}; use the same --model")
    model.encoder.backbone.load_state_dict(encoder)
    whole = model.state_dict()
    fitting = {name: tensor for name, tensor in rest.items() if name in whole and whole[name].shape == tensor.shape}
    model.load_state_dict(fitting, strict=False)
    return f"{len(encoder)} encoder tensors" + (f", {len(fitting)} of mask token and head" if fitting else "")
