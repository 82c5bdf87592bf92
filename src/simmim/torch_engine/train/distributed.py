"""Devices and processes: what is found, and how a model is spread over it. What one accelerator needs is here."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from simmim.config.pretraining import PretrainConfig
from simmim.config.training import TrainingConfig
from simmim.errors import UserError
from simmim.hardware.host import cpu_cores, cpu_has_bf16, cpu_name
from simmim.torch_engine.models.family import blocks_to_shard

_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "tpu": "cpu:gloo,tpu:tpu_dist"}


def choose_device(wanted: str) -> str:
    """`auto` → cuda where there is one, else cpu. One-line `ValueError` for a device that is not here."""
    cuda = torch.cuda.is_available()
    if wanted == "auto":
        return "cuda" if cuda else "cpu"
    if wanted == "cuda" and not cuda:
        raise UserError(
            "device 'cuda' is not here: PyTorch sees no NVIDIA GPU; use --device cpu, or see `simmim doctor`"
        )
    if wanted == "tpu":
        if importlib.util.find_spec("torch_tpu") is None:
            raise UserError("device 'tpu' needs TorchTPU: pip install 'simmim[tpu]' on a Cloud TPU machine")
        check_tpu_launch(os.environ)
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "1"  # without, importing it does not make the device known
        importlib.import_module("torch_tpu")
        found = torch.accelerator.current_accelerator(check_available=True)
        if found is None or found.type != "tpu":
            raise UserError("device 'tpu' is not here: TorchTPU sees no TPU; use --device cpu, or see `simmim doctor`")
    return wanted


def check_tpu_launch(environment: Mapping[str, str]) -> None:
    """One-line `ValueError` unless TorchTPU was told of as many processes as there are.

    It joins the devices of a slice by a list of addresses, one a process, which all must have before they start
    (`python -m torch.tpu.distributed` prints it).
    """
    processes = int(environment.get("WORLD_SIZE", "1"))
    addresses = [address for address in environment.get("TORCH_TPU_SLICEBUILDER_ADDRESSES", "").split(",") if address]
    if processes != max(len(addresses), 1):
        raise UserError(
            f"{processes} processes on TPUs have {len(addresses)} addresses in TORCH_TPU_SLICEBUILDER_ADDRESSES; start "
            "one for each TPU device, as docs/tpu.md shows"
        )


def choose_precision(wanted: str, device: str) -> str:
    """`auto` → bf16 where the hardware multiplies it, else fp32."""
    if wanted != "auto":
        return wanted
    has_bf16 = {"cpu": cpu_has_bf16, "cuda": torch.cuda.is_bf16_supported, "tpu": lambda: True}[device]()
    return "bf16" if has_bf16 else "fp32"


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all that train together."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any process. Goes through the CPU, so that no accelerator waits."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags[0])

    def main_says(self, number: int) -> int:
        """The main process's number, on every process."""
        if self.size == 1:
            return number
        told = torch.tensor([number])
        dist.broadcast(told, src=0)
        return int(told[0])

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes of a tensor on the device."""
        if self.size > 1:
            dist.all_reduce(value)
            value = value / self.size
        return value


@contextlib.contextmanager
def join(device: str) -> Iterator[World]:
    """This process's `World`: alone, or among those that `torchrun` started; left again at the end."""
    size, rank, local = (int(os.environ.get(name, default)) for name, default in _TORCHRUN)
    # On a TPU each process sees one device, its own.
    place = torch.device(device, local) if device == "cuda" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
        torch.backends.cuda.matmul.allow_tf32 = False
    if place.type == "tpu":
        exact_fp32_on_tpu()
    started = size > 1 and not dist.is_initialized()
    if started:
        dist.init_process_group(_BACKENDS[device], rank=rank, world_size=size)
    try:
        yield World(device=place, rank=rank, size=size)
    finally:
        if started:
            dist.destroy_process_group()


_TORCHRUN = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))


def check_world(config: TrainingConfig, world: World) -> None:
    parts = world.size * config.accumulate_steps
    if config.batch_size % parts:
        raise UserError(
            f"batch size {config.batch_size} does not divide among {world.size} processes × {config.accumulate_steps} "
            f"accumulation steps; use a multiple of {parts}"
        )
    if isinstance(config, PretrainConfig) and config.shard and world.size == 1:
        raise UserError(
            "--shard spreads a model over processes and there is one; start it with torchrun, or leave it out"
        )


def place(module: nn.Module, device: torch.device) -> None:
    """Put a module on its device, and make it fit for it."""
    module.to(device)
    if device.type == "tpu":
        fit_for_tpu(module)


def exact_fp32_on_tpu() -> None:
    """Multiply fp32 numbers as such; TorchTPU would round them to bf16 first."""
    torch.set_float32_matmul_precision("highest")


def fit_for_tpu(module: nn.Module) -> None:
    """Norms as TorchTPU 0.2.0 can take them.

    Layer norms take and give fp32, as under CUDA's autocast: it has none of bf16 with weights in fp32. Batch norms keep
    their statistics themselves: those that TorchTPU records as StableHLO do not change them.
    """
    for norm in module.modules():
        if isinstance(norm, nn.LayerNorm):  # timm's too
            norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        elif isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            norm.track_running_stats = False  # so that a training pass is not given them; an evaluating one is
            norm.register_forward_pre_hook(_track_statistics)


@torch.no_grad()
def _track_statistics(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
    """What a batch norm in training does with its statistics."""
    if norm.training:
        assert norm.momentum is not None and norm.num_batches_tracked is not None
        assert norm.running_mean is not None and norm.running_var is not None
        variance, mean = torch.var_mean(inputs[0].float(), dim=(0, 2, 3))
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance, norm.momentum)
        norm.num_batches_tracked.add_(1)


def spread(model: nn.Module, world: World, *, shard: bool) -> nn.Module:
    """The model on every process: copied (DDP) or sharded (FSDP2). Batch norms see the whole batch on CUDA."""
    if world.size == 1:
        return model
    if world.device.type == "cuda":
        # timm's conversion: PyTorch's would leave out the activation in timm's layers that join it to the norm.
        model = convert_sync_batchnorm(model)
    if shard:
        for block in blocks_to_shard(model):
            fully_shard(block)
        fully_shard(model)
        return model
    if world.device.type == "cuda":
        return DistributedDataParallel(model, device_ids=[world.device.index], gradient_as_bucket_view=True)
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


@contextlib.contextmanager
def gradient_sync(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Exchange gradients in this backward pass, or (but for the last accumulation step) not yet."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield


def full_tensor(value: Tensor) -> Tensor:
    """A sharded scalar (FSDP2's gradient norm) as a plain tensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local_part(value: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()} ({cpu_cores()} cores)" if device.type == "cpu" else device.type


def describe_cuda() -> str:
    """What PyTorch sees of NVIDIA, in one line."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return f"none seen (torch is built for CUDA {built})" if built else "none (torch is built for the CPU)"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{len(names)} × {names[0]}, CUDA {torch.version.cuda}"
