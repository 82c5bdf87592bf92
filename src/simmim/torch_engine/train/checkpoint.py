"""Save and load training states of the torch engine; `simmim.training.checkpoint_directory` publishes them.

`RUN/checkpoints/step-00001000/` holds a torch.distributed.checkpoint and `extra.json`.
"""

import io
import json
import pickle
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from simmim.errors import TrainingFailedError, UserError
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
_AT_ONCE = StagingOptions(
    use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
)
_MISFITS = ("Size mismatch", "Missing key")  # how PyTorch's reasons begin for weights of other shapes and names


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
    saver = CheckpointSaver(directory, world, keep=keep)
    saver.save(step, model, optimizer, extra)
    return checkpoint_path(directory, step)


class CheckpointSaver:
    """Write training states; with `background`, while the training goes on.

    In the background a state is copied to the host's memory first, which takes that much of it. A thread writes the
    copy, its checksums and its name, so that a kill at any moment leaves this checkpoint or those before it. One state
    is written at a time.
    """

    def __init__(self, directory: Path, world: World, *, keep: int, background: bool = False):
        """Prepare; all processes call it together, since the threads of several have a group of their own."""
        self._directory, self._world, self._keep = directory, world, keep
        # It says that it runs on one process, which we know. Filters are the process's: a thread must not change them.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self._stager = DefaultStager(_AT_ONCE) if background else None
        self._group: dist.ProcessGroup | None = None
        if background and world.size > 1:
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._writing: Future[None] | None = None

    @property
    def failed(self) -> bool:
        """Whether what is written in the background could not be; `settle` raises why."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None, extra: dict[str, Any]) -> None:
        """Write a state, or begin to. Raises `WriteError` where the disk takes it, or the one before, no more."""
        self.settle()
        with filling(self._directory, step):
            if self._world.is_main:
                begin(self._directory, step)
            self._world.barrier()
            model_state, optimizer_state = get_state_dict(model, optimizer or ())
            state = {"model": model_state, "optimizer": optimizer_state}
        if self._thread is None or self._stager is None:
            self._write(step, state, extra)
        else:
            copy = cast(dict[str, Any], self._stager.stage(state))
            self._writing = self._thread.submit(self._write, step, copy, extra)

    def settle(self) -> None:
        """Wait until nothing is being written. Raises `WriteError` where that failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, state: dict[str, Any], extra: dict[str, Any]) -> None:
        with filling(self._directory, step) as aside:
            if self._world.size > 1 and not dist.is_initialized():  # each rank would write a checkpoint of its own
                raise TrainingFailedError("the ranks have parted while a checkpoint was being written")
            save(state, checkpoint_id=aside, process_group=self._group, no_dist=self._world.size == 1)
            self._world.barrier(self._group)
            if self._world.is_main:
                (aside / EXTRA).write_text(json.dumps(extra), encoding="utf-8")
                publish(self._directory, step, keep=self._keep)
            self._world.barrier(self._group)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load model and optimizer in place; returns `extra` as saved. Raises `UserError` for those of another model."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    _read(state, path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return json.loads((path / EXTRA).read_text(encoding="utf-8"))


def load_model_state(path: Path, model: nn.Module) -> None:
    """Load the model's weights alone, in place, whichever engine wrote them. Raises `UserError` for another model's."""
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
        try:
            load(state, checkpoint_id=path, no_dist=not torch.distributed.is_initialized())
        except CheckpointException as error:
            reasons = {str(reason) for reason, _ in error.failures.values()}
            if any(reason.startswith(_MISFITS) for reason in reasons):
                raise UserError(
                    f"{path} is of another model ({min(reasons)}); finish the run with the version of simmim that "
                    "began it, or start again with --fresh"
                ) from None
            raise


class _Description(pickle.Unpickler):
    """Reads a checkpoint's description, and refuses to name anything that it does not need."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _DESCRIBES or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _find_member
        raise UnsafePickleError(f"it asks for {module}.{name}, which no checkpoint needs")


def _find_member(kind: Any, name: str) -> Any:
    """Find an enumeration's member, which Python before 3.11.4 pickles as a call of getattr (gh-105332)."""
    if kind is not _MEM_FORMAT_ENCODING or name not in kind.__members__:
        raise UnsafePickleError(f"it asks for {name} of {kind}, which no checkpoint needs")
    return kind[name]


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
