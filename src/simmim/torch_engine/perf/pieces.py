"""`--accumulate-steps auto`: find in how many pieces a batch fits the device, by trying.

A trial has a model, an optimiser and a batch of its own, and ends before the training's are made: nothing of it stays.
"""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simmim.config.pretraining import PretrainConfig
from simmim.config.training import TrainingConfig
from simmim.errors import TrainingFailedError, UserError
from simmim.output import say
from simmim.torch_engine.accelerators import describe_device, find_accelerator
from simmim.torch_engine.models.collectives import apart
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.update import Batch, Update
from simmim.training.resume import recall
from simmim.training.run_directory import Run

Attempt = Callable[[int], tuple[Update, Batch]]
"""Build an update that takes its batches in so many pieces, on this process's device alone, and this rank's batch."""

_SPARE = 0.04  # of the memory: for the exchange of gradients, for pictures, and for boxes that are more than usual


def find_pieces(config: TrainingConfig, world: World, attempt: Attempt) -> int:
    """Return the accumulation steps of a complete configuration, the same on every rank.

    They are those that the user names; for `auto` those that the run began with, if on as many devices, or else the
    fewest with which two updates fit on every rank's device. Only a GPU that tells its memory is tried; elsewhere it
    is 1.

    Raises:
        UserError: a sharded model, of which no rank can try its part alone.
        TrainingFailedError: one image at a time is too much.
    """
    if config.accumulate_steps is not None:
        return config.accumulate_steps
    begun = recall(config) if _as_many_devices(config, world) else None
    share, rest = divmod(config.batch_size, world.size)
    assert not rest, "check_world"
    known = world.main_says(begun.pieces if begun else 0)
    if known and share % known == 0:
        pieces, why = known, "as the run began"
    elif find_accelerator(world.device).total_memory is None:
        pieces, why = 1, "only a GPU's memory is tried"
    elif isinstance(config, PretrainConfig) and config.shard:
        raise UserError("--accumulate-steps auto cannot try a part of a model; give a number with --shard")
    else:
        pieces, why = _try_all(config, world, attempt, share), f"what fits {describe_device(world.device)}"
    if world.is_main:
        say(f"memory     {pieces} accumulation step{'s' * (pieces > 1)} of {share // pieces} images a process: {why}")
    return pieces


def _as_many_devices(config: TrainingConfig, world: World) -> bool:
    """Tell whether a run trained last on as many devices as now: on fewer, its pieces may not fit."""
    begun = Run(Path(config.out)).machine_facts().get("begun", []) if config.out else []
    return not begun or begun[-1].get("devices") == world.size


def _try_all(config: TrainingConfig, world: World, attempt: Attempt, share: int) -> int:
    divisors = [pieces for pieces in range(1, share + 1) if share % pieces == 0]
    fit = next((pieces for pieces in divisors if _fits(pieces, config, world, attempt)), share + 1)
    pieces = world.largest(fit)
    if pieces > share:
        raise TrainingFailedError(
            f"out of memory: one image at a time is too much for {describe_device(world.device)}; use "
            f"{'' if config.checkpoint_activations else '--checkpoint-activations, '}a smaller --model or --image-size"
        )
    return pieces


def _fits(pieces: int, config: TrainingConfig, world: World, attempt: Attempt) -> bool:
    device: Any = torch.get_device_module(world.device)
    fits = True
    try:
        with apart():
            _update_twice(pieces, world, attempt)
    except torch.OutOfMemoryError:
        fits = False
    except UserError:  # a task takes no fewer images at a time
        if pieces == 1:
            raise
        fits = False
    # The error is gone, and with it the frames that held what was allocated.
    if config.compile:
        torch.compiler.reset()
    gc.collect()
    device.empty_cache()
    device.reset_peak_memory_stats()
    return fits


def _update_twice(pieces: int, world: World, attempt: Attempt) -> None:
    """Update twice: the optimiser's averages are there from the end of the first update on."""
    total = find_accelerator(world.device).total_memory
    assert total is not None
    held = [torch.empty(int(_SPARE * total(world.device)), dtype=torch.uint8, device=world.device)]
    update, batch = attempt(pieces)
    if world.size > 1 and pieces == 1:  # DDP keeps all gradients, as accumulation does
        held += [torch.empty_like(parameter) for parameter in _trained(update.model)]
    for step in range(2):
        update(step, batch)
    find_accelerator(world.device).synchronize()
    del held


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
