"""Whole training states on disk: written aside and renamed, with checksums; the newest that verifies is used.

`RUN/checkpoints/step-00001000/` holds a torch.distributed.checkpoint, `extra.json` and `manifest.json` (SHA-256 of
every other file). A directory without a manifest or with a file that does not match it is damaged, and the one before
it is used.
"""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from simmim.torch_engine.distributed import World

MANIFEST = "manifest.json"
EXTRA = "extra.json"


def save_checkpoint(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    extra: dict[str, Any],
    *,
    world: World,
    keep: int,
) -> Path:
    """Write the state after `step` steps; all processes call it together. Returns the checkpoint's directory.

    `extra` is what the trainer keeps on the host, as JSON can hold it. Without an optimiser the state is for looking at
    and starting from, not for resuming.
    """
    final = checkpoint_path(directory, step)
    aside = directory / f"writing-{step:08d}"
    if world.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    world.barrier()
    model_state, optimizer_state = get_state_dict(model, optimizer or ())
    with warnings.catch_warnings():  # it says that it runs on one process: we know
        warnings.simplefilter("ignore", UserWarning)
        save(
            {"model": model_state, "optimizer": optimizer_state},
            checkpoint_id=aside,
            no_dist=world.size == 1,
        )
    world.barrier()
    if world.is_main:
        (aside / EXTRA).write_text(json.dumps(extra), encoding="utf-8")
        digests = {path.name: _digest(path) for path in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps(digests, indent=1), encoding="utf-8")
        for path in (*aside.iterdir(), aside):
            _to_disk(path)
        if final.exists():  # a damaged one of the same step
            shutil.rmtree(final)
        aside.rename(final)
        _to_disk(directory)
        _forget_others(directory, final, keep)
    world.barrier()
    return final


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that verifies, or `None` where there is none; warns of damaged ones that it passes over.

    Raises `ValueError` where there are checkpoints and every one is damaged.
    """
    candidates = sorted(directory.glob("step-*"), reverse=True) if directory.is_dir() else []
    for path in candidates:
        if (damage := _damage(path)) is None:
            return path
        warnings.warn(f"checkpoint {path} is damaged ({damage}); using the one before it", stacklevel=2)
    if candidates:
        raise ValueError(f"every checkpoint in {directory} is damaged; start again with --fresh")
    return None


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load model and optimizer in place; returns `extra` as saved."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    _read(state, path)
    here = [{name: group[name] for name in ("fused", "capturable")} for group in optimizer.param_groups]
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for group, settings in zip(optimizer.param_groups, here, strict=True):
        group.update(settings)  # what suits this device, which need not be the one that saved
    return json.loads((path / EXTRA).read_text(encoding="utf-8"))


def load_model_state(path: Path, model: nn.Module) -> None:
    """Load the model's weights alone, in place."""
    state = {"model": model.state_dict()}
    _read(state, path)
    model.load_state_dict(state["model"])


def _read(state: dict[str, Any], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        load(state, checkpoint_id=path, no_dist=not torch.distributed.is_initialized())


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _damage(path: Path) -> str | None:
    try:
        for name, digest in json.loads((path / MANIFEST).read_text(encoding="utf-8")).items():
            if _digest(path / name) != digest:
                return f"{name} does not match its checksum"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, AttributeError):
        return f"{MANIFEST} is not what was written"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _forget_others(directory: Path, newest: Path, keep: int) -> None:
    """Leave `newest` and the `keep` - 1 before it. Later ones are damaged, or the run had not resumed before them."""
    kept = [path for path in sorted(directory.glob("step-*")) if path.name <= newest.name][-keep:]
    for path in (*directory.glob("step-*"), *directory.glob("writing-*")):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
