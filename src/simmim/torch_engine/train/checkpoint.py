"""Save and load training states of the torch engine; `simmim.training.checkpoint_directory` publishes them.

`RUN/checkpoints/step-00001000/` holds a torch.distributed.checkpoint and `extra.json`.
"""

import io
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from simmim.errors import UserError
from simmim.interop.pickles import UnsafePickleError
from simmim.torch_engine.train.distributed import World
from simmim.training.checkpoint_directory import ARRAYS, begin, checkpoint_path, filling, publish

EXTRA = "extra.json"
_DESCRIPTION = ".metadata"
_DESCRIBES = {
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    "torch.distributed.checkpoint.filesystem._StorageInfo", "torch.Size", "torch.serialization._get_layout",
    "pathlib.PosixPath", "pathlib.WindowsPath",
}  # fmt: skip
"""What a checkpoint's description, which is a pickle, may name."""


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
    with filling(directory, step) as aside:
        if world.is_main:
            begin(directory, step)
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
            publish(directory, step, keep=keep)
        world.barrier()
    return checkpoint_path(directory, step)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load model and optimizer in place; returns `extra` as saved."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    _read(state, path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return json.loads((path / EXTRA).read_text(encoding="utf-8"))


def load_model_state(path: Path, model: nn.Module) -> None:
    """Load the model's weights alone, in place, whichever engine wrote them."""
    if (path / ARRAYS).is_file():
        arrays = load_file(path / ARRAYS)
        model.load_state_dict({name: arrays.get(name, tensor) for name, tensor in model.state_dict().items()})
        return
    state = {"model": model.state_dict()}
    _read(state, path)
    model.load_state_dict(state["model"])


def _read(state: dict[str, Any], path: Path) -> None:
    check_harmless(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        load(state, checkpoint_id=path, no_dist=not torch.distributed.is_initialized())


class _Description(pickle.Unpickler):
    """Reads a checkpoint's description, and refuses to name anything that it does not need."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _DESCRIBES or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        raise UnsafePickleError(f"it asks for {module}.{name}, which no checkpoint needs")


def check_harmless(path: Path) -> None:
    """Raise `UserError` if reading a checkpoint would run code: PyTorch reads pickles in it without a restriction.

    Looks at the description, and at every value that is no tensor (rates, betas).
    """
    try:
        with (path / _DESCRIPTION).open("rb") as file:
            found = _Description(file).load()
        for index, place in found.storage_data.items():
            if isinstance(found.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
                with (path / place.relative_path).open("rb") as file:
                    file.seek(place.offset)
                    torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
    except (UnsafePickleError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"checkpoint {path} is refused: {reason}; use runs of those whom you trust") from None
