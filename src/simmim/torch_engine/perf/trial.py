"""Training steps with random weights and images, for measuring, counting and `simmim doctor`."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simmim.config.pretraining import PretrainConfig
from simmim.data.augment import FLIP_AXES
from simmim.data.statistics import IMAGENET_MEAN, IMAGENET_STD
from simmim.method.schedules import CosineSchedule
from simmim.torch_engine.accelerators import ACCELERATORS, choose_device, choose_precision
from simmim.torch_engine.models.masked_image_model import PretrainStep
from simmim.torch_engine.train import distributed
from simmim.torch_engine.train.optim import create_optimizer
from simmim.torch_engine.train.storage import build_step
from simmim.torch_engine.train.update import Batch, Update
from simmim.training.masks import draw_all_masks
from simmim.training.plan import drop_path_numbers
from simmim.training.pretrain_plan import VIEW


def build_update(config: PretrainConfig, world: distributed.World) -> tuple[PretrainStep, Update]:
    """Build a step and its update, with a small learning rate."""
    torch.manual_seed(0)
    step = build_step(config)
    return step, update_of(step, config, world)


def update_of(step: PretrainStep, config: PretrainConfig, world: distributed.World) -> Update:
    """Build the update of `step` on the device of `world`, compiled if configured, with a small learning rate."""
    distributed.place(step, world.device)
    if config.checkpoint_activations:
        step.model.encoder.backbone.set_grad_checkpointing(True)
    if config.compile:
        step.compile(dynamic=False)
    optimizer = create_optimizer(step, weight_decay=config.weight_decay, betas=config.betas, device=world.device)
    schedule = CosineSchedule(peak_lr=1e-5, warmup_lr=0, warmup_steps=0, min_lr=0, total_steps=10**6)
    return Update(step, optimizer, schedule, config=config, world=world, after=step.after_update)


def random_batch(config: PretrainConfig, size: int, step: PretrainStep) -> Batch:
    """Return what `step` takes: `size` noise images with their masks and numbers for drop path and views."""
    assert config.image_size is not None
    rng, index = np.random.default_rng(0), np.arange(size)
    encoder = step.model.encoder
    batch: Batch = {
        "image": _noise(rng, (size, *config.read_size, config.channels), sounds=config.input == "sounds"),
        "flip": rng.random((size, FLIP_AXES[config.flip or "horizontal"])) < 0.5,
    }
    if config.masks_images:
        batch |= draw_all_masks(config, 0, index, encoder.patch_size)
    if layers := encoder.drop_path_draws.layers:
        batch["drop_path"] = drop_path_numbers(config, 0, index, layers)
    batch |= {f"{VIEW}{view.name}": view.draw(config.seed, 0, index) for view in step.views.values()}
    return batch


def _noise(rng: np.random.Generator, shape: tuple[int, ...], *, sounds: bool) -> NDArray[Any]:
    dtype = np.dtype(np.int16 if sounds else np.uint8)
    bounds = np.iinfo(dtype)
    return rng.integers(bounds.min, bounds.max + 1, shape, dtype=dtype)


def try_devices() -> dict[str, str]:
    """Run a step of a tiny model on each device; returns `training on DEVICE` → result."""
    found = {}
    for device in [row.name for row in ACCELERATORS.values() if row.automatic and row.find() is None]:
        precision = choose_precision("auto", choose_device(device))
        config = PretrainConfig(
            model="vit_tiny_patch16_224",
            model_args={"depth": 1, "embed_dim": 48},
            image_size=(64, 64),
            batch_size=2,
            precision=precision,  # type: ignore[arg-type]
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )
        try:
            step, update = build_update(config, distributed.World(device=torch.device(device)))
            _, figures = update(0, random_batch(config, 2, step))
            found[f"training on {device}"] = f"works in {precision}, a step gave the loss {float(figures[0]):.3f}"
        except Exception as error:  # any driver or library error is a finding
            found[f"training on {device}"] = f"does not work: {' '.join(str(error).split())}"
    return found
