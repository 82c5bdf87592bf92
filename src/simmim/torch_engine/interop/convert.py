"""Convert another package's checkpoint to a run directory (`simmim convert`).

Shapes: `O` outputs, `C` channels, `k` side of a kernel.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2

from simmim.config.commands import ConvertConfig
from simmim.config.pretraining import PretrainConfig
from simmim.config.strategies import parse_strategy
from simmim.config.toml import to_toml
from simmim.config.validation import from_settings
from simmim.data.statistics import IMAGENET_MEAN, IMAGENET_STD
from simmim.errors import UserError
from simmim.interop.checkpoints import Checkpoint, read_checkpoint
from simmim.interop.infer_model import TimmModel
from simmim.interop.weight_names import BACKBONE, MASK_TOKEN
from simmim.method.masks import PAPER_CELL, MaskStrategy
from simmim.torch_engine.models.encoders import default_image_size, sketch_encoder
from simmim.torch_engine.models.masked import Encoder, SwinEncoder
from simmim.torch_engine.train.checkpoint import save_checkpoint
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.storage import adopt, as_tensors, build_step, save_hub
from simmim.training.run_directory import Run
from simmim.training.whole_files import new_directory


def convert(config: ConvertConfig) -> list[str]:
    """Write the run; returns a line each on what was recognised, mapped, left out and resized.

    Raises `UserError` for a damaged, unknown or unsuitable checkpoint and for an `out` that exists.
    """
    config = from_settings(ConvertConfig, vars(config))
    if config.model_args and config.model is None:
        raise UserError("--model-args belong to a --model; give its timm name too")
    if Run(Path(config.out)).config.exists():
        raise UserError(f"{config.out} holds a run; give a new directory as --out")
    checkpoint = read_checkpoint(Path(config.checkpoint), model=config.model, model_args=config.model_args)
    plan = configure(checkpoint, config)
    torch.manual_seed(plan.seed)  # for what the checkpoint lacks
    step = build_step(plan)
    try:
        resized, fresh = adopt(step.model, as_tensors(checkpoint.mapped.state))
    except UserError as error:
        raise UserError(
            f"{config.checkpoint} does not fit {plan.model}: {error}; give the --model and --model-args that it is of"
        ) from None
    backbone = step.model.encoder.backbone
    with new_directory(config.out) as directory:
        run = Run(directory)
        run.config.write_text(to_toml(plan), encoding="utf-8")
        save_hub(run.encoder, backbone, backbone.state_dict(), plan)
        save_checkpoint(run.checkpoints, 0, step, None, {}, world=World(device=torch.device("cpu")), keep=1)
    return [*_report(checkpoint, plan, resized, fresh), f"wrote       {Path(config.out)}"]


def configure(checkpoint: Checkpoint, wanted: ConvertConfig) -> PretrainConfig:
    """Build the run's configuration from the checkpoint's, with the requested changes."""
    found = checkpoint.architecture
    if found is None:
        raise UserError(f"{wanted.checkpoint} does not tell which model it is of; give --model, its timm name")
    old_size = found.image_size or default_image_size(found.model)
    size = wanted.image_size or old_size
    encoder = sketch_encoder(found.model, old_size, found.model_args)
    old_channels = _channels(checkpoint, encoder)
    channels = wanted.channels or old_channels
    normal = (IMAGENET_MEAN, IMAGENET_STD) if old_channels == 3 else ((0.5,) * old_channels, (0.25,) * old_channels)
    settings = {"mean": normal[0], "std": normal[1], "mask": "random", **checkpoint.settings}
    mask = parse_strategy(MaskStrategy, settings["mask"])
    cell = _fitting_cell(mask.cell or PAPER_CELL, encoder.patch_size, size)
    settings["mask"] = dataclasses.replace(mask, cell=cell)
    settings |= {name: _in_turn(settings[name], channels) for name in ("mean", "std")}
    config = PretrainConfig(
        out=wanted.out,
        model=found.model,
        model_args=_with_window(encoder, found, size, wanted.window),
        image_size=size,
        channels=channels,
        **settings,
    )
    return from_settings(PretrainConfig, vars(config))


def _channels(checkpoint: Checkpoint, encoder: Encoder) -> int:
    """Return the input channels of the checkpoint's first convolution (O, C, k, k)."""
    name = f"{encoder.backbone.pretrained_cfg['first_conv']}.weight"
    if (weight := checkpoint.mapped.state.get(BACKBONE + name)) is None:
        raise UserError(f"the checkpoint lacks {name!r}; give the --model that it is of")
    return weight.shape[1]


def _fitting_cell(cell: int, patch: int, size: tuple[int, int]) -> int:
    """Return the largest mask cell up to `cell` that is whole patches and divides the image, else one patch."""
    cells = [n * patch for n in range(cell // patch, 0, -1)]
    return next((cell for cell in cells if all(side % cell == 0 for side in size)), patch)


def _in_turn(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Adapt per-channel values as the weights are adapted: cyclically, or the mean for one channel."""
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[c % len(values)] for c in range(channels))


def _with_window(encoder: Encoder, found: TimmModel, size: tuple[int, int], window: int | None) -> dict[str, Any]:
    """Change the window in the model's arguments.

    SwinV2 scales its biases by the window of the pretraining, which must be recorded.
    """
    arguments = dict(found.model_args) | ({} if window is None else {"window_size": window})
    if not isinstance(encoder, SwinEncoder):
        if window is not None:
            raise UserError(f"--window is for Swin and SwinV2, and {found.model} is neither; leave it out")
        return arguments
    if isinstance(encoder.backbone, SwinTransformerV2):
        old, new = _windows(encoder), _windows(sketch_encoder(found.model, size, arguments))
        if old != new and not any(arguments.get("pretrained_window_sizes", ())):
            arguments["pretrained_window_sizes"] = [side for side, _ in old]
    return arguments


def _windows(encoder: Encoder) -> list[tuple[int, int]]:
    """Window of each stage; a stage whose map is smaller than the window uses its map's size."""
    return [stage.blocks[0].window_size for stage in encoder.backbone.layers]


def _report(checkpoint: Checkpoint, config: PretrainConfig, resized: list[str], fresh: list[str]) -> list[str]:
    assert config.image_size is not None
    height, width = config.image_size
    arguments = "".join(f" {name}={value}" for name, value in config.model_args.items())
    mapped, left_out = checkpoint.mapped.state, checkpoint.mapped.left_out
    encoder = sum(name.startswith(BACKBONE) for name in mapped)
    parts = {"mask token": MASK_TOKEN in mapped, "prediction head": "head.weight" in mapped}
    lines = [
        f"recognised  {checkpoint.what}",
        f"model       {config.model}{arguments}, {height}x{width} pixels, {config.channels} channels",
        f"mapped      {encoder} arrays of the encoder"
        + "".join(f", the {part}" for part, there in parts.items() if there),
    ]
    for why in dict.fromkeys(left_out.values()):
        names = [name for name, reason in left_out.items() if reason == why]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"left out    {names[0]}{more}: {why}")
    lines += [f"resized     {what}" for what in resized]
    if fresh:
        lines.append(f"new         {' and '.join(fresh)}: random numbers, for pretraining to learn")
    if "mean" not in checkpoint.settings:
        lines.append(f"note        mean and std of the images are not told; {config.mean} and {config.std} are taken")
    return lines + ([f"note        {checkpoint.note}"] if checkpoint.note else [])
