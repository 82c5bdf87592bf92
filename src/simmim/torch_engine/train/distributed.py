"""Processes that train together, and how a model is spread over them."""

import contextlib
import ctypes
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from simmim.config.pretraining import PretrainConfig
from simmim.config.training import TrainingConfig
from simmim.errors import TrainingFailedError, UserError
from simmim.torch_engine.accelerators import find_accelerator
from simmim.torch_engine.models.family import blocks_to_shard

T = TypeVar("T")
_PR_SET_PDEATHSIG = 1  # prctl(2)
_GROUPS = itertools.count()  # of this process, one for each training


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes that train together, as one of them sees them."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self, group: dist.ProcessGroup | None = None) -> None:
        if self.size > 1:
            dist.barrier(group)

    def largest(self, number: int) -> int:
        """Return the largest number of all ranks. Uses the CPU, so that no accelerator waits."""
        if self.size == 1:
            return number
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return int(numbers[0])

    def main_says(self, number: int) -> int:
        """Broadcast a number from rank 0."""
        if self.size == 1:
            return number
        told = torch.tensor([number])
        dist.broadcast(told, src=0)
        return int(told[0])

    def share(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """Broadcast rank 0's numbers, which have the same shape on every rank."""
        told = torch.from_numpy(numbers.copy())
        if self.size > 1:
            dist.broadcast(told, src=0)
        return told.numpy()

    def mean(self, value: Tensor) -> Tensor:
        """Average a tensor on the device over all ranks."""
        if self.size > 1:
            dist.all_reduce(value)
            value = value / self.size
        return value

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Copy rank 0's tensors into those of the other ranks, such as the statistics of batch norms."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def collect(self, compute: Callable[[], T]) -> list[T]:
        """Return on every rank what `compute` returns on each, by rank; it can be pickled, and travels over the CPU.

        What a rank cannot compute is an error on every rank, so that none waits for it: `UserError` for bad images and
        disks, after which a training can save, and `TrainingFailedError` where memory runs out.
        """
        if self.size == 1:
            return [compute()]
        found, error = None, None
        try:
            found = compute()
        except (UserError, OSError, torch.OutOfMemoryError) as raised:
            error = raised
        lines = self._gather(None if error is None else (str(error), isinstance(error, torch.OutOfMemoryError)))
        if error is not None:
            raise error
        for rank, line in enumerate(lines):
            if line is not None:
                raise (TrainingFailedError if line[1] else UserError)(f"rank {rank}: {line[0]}")
        return cast(list[T], self._gather(found))

    def _gather(self, value: object) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def join(device: str, precision: str = "fp32") -> Iterator[World]:
    """Yield this process's `World`: alone, or one of those that `torchrun` started. Leave the group at the end.

    Numbers are multiplied as a training of `precision` does. Raises `UserError` for several processes on a device that
    trains in one only, and `TrainingFailedError` where another rank is lost.
    """
    row = find_accelerator(device)
    size, rank, local = (int(os.environ.get(name, default)) for name, default in _TORCHRUN)
    place = torch.device(device, local) if row.numbered else torch.device(device)
    if row.numbered:
        torch.get_device_module(device).set_device(place)
    started = size > 1 and not dist.is_initialized()
    if started and row.backend is None:
        raise UserError(f"--device {device} trains in one process, not {size}; start it without torchrun")
    if started:
        _end_with_torchrun()
    with row.arithmetic(precision):
        try:
            if started:
                dist.init_process_group(row.backend, store=_meeting_place(rank, size), rank=rank, world_size=size)
            yield World(device=place, rank=rank, size=size)
        except RuntimeError as error:
            if size > 1 and _tells_of_a_lost_rank(error):
                raise TrainingFailedError(
                    f"rank {rank} lost another rank, which ended or cannot be reached; what that rank wrote says why; "
                    "the last checkpoint is intact: repeat the command to go on"
                ) from error
            raise
        finally:
            if started and dist.is_initialized():
                dist.destroy_process_group()


def _end_with_torchrun() -> None:
    """Have Linux send SIGTERM to this rank when torchrun dies: a lone rank would wait for half an hour, or train on."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _meeting_place(rank: int, size: int) -> Store:
    """Return the store in which the ranks find each other's addresses.

    On one machine torchrun keeps its store over restarts, so that a rank might take the address of one that is dead.
    On several, each restart has a new store, and the agents count restarts differently. A process that trains several
    times finds the addresses of its last time there, too.
    """
    store, _, _ = next(iter(rendezvous("env://", rank, size)))
    alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
    return PrefixStore(f"start {restarts}, group {next(_GROUPS)}", store)


def _tells_of_a_lost_rank(error: RuntimeError) -> bool:
    lost = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "Connection was likely closed")
    lost += ("Connection refused", "connectFullMesh failed")
    return isinstance(error, dist.DistError) or any(words in str(error) for words in lost)


_TORCHRUN = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))


def check_world(config: TrainingConfig, world: World) -> None:
    parts = world.size * config.pieces
    if config.batch_size % parts:
        raise UserError(
            f"batch size {config.batch_size} does not divide among {world.size} processes × {config.pieces} "
            f"accumulation steps; use a multiple of {parts}, or to resume, processes and --accumulate-steps whose "
            f"product divides it"
        )
    if config.async_save and not find_accelerator(world.device).copies_states:
        raise UserError(f"--async-save is for --device cuda or cpu, not {world.device.type}; leave it out")
    if isinstance(config, PretrainConfig) and config.shard and world.size == 1:
        raise UserError(
            "--shard spreads a model over processes and there is one; start it with torchrun, or use --no-shard"
        )


def place(module: nn.Module, device: torch.device) -> None:
    """Move a module to a device, and change what the device does not support."""
    module.to(device)
    find_accelerator(device).fit(module)


def spread(model: nn.Module, world: World, *, shard: bool) -> nn.Module:
    """Copy (DDP) or shard (FSDP2) the model over all processes. Batch norms see the whole batch where they can."""
    if world.size == 1:
        return model
    row = find_accelerator(world.device)
    if row.syncs_batch_norm:
        # timm's conversion: PyTorch's would leave out the activation in timm's layers that join it to the norm.
        model = convert_sync_batchnorm(model)
    if shard:
        for block in blocks_to_shard(model):
            fully_shard(block)
        fully_shard(model)
        return model
    devices = [world.device.index] if row.numbered else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


@contextlib.contextmanager
def gradient_sync(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Exchange gradients in the backward pass if enabled: in the last accumulation step only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield


def full_tensor(value: Tensor) -> Tensor:
    """Gather a sharded scalar (FSDP2's gradient norm) into a plain tensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local_part(value: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be sharded."""
    return value.to_local() if isinstance(value, DTensor) else value
