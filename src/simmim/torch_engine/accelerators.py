"""One row of capabilities for each kind of device. To add an accelerator, add a row to `ACCELERATORS`.

`mps` and `xpu` follow PyTorch's documentation; no training has been run on either.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from simmim.errors import UserError
from simmim.hardware.host import cpu_cores, cpu_has_bf16, cpu_name
from simmim.torch_engine.tpu.device import exact_fp32, find_tpu, fit_for_tpu


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A kind of device. `name` is PyTorch's device type, and what `--device` takes."""

    name: str
    find: Callable[[], str | None]
    """Return why the device cannot be used, with the remedy; `None` if it can."""
    has_bf16: Callable[[], bool] = lambda: False
    """Whether the hardware multiplies bf16, so that `--precision auto` takes it."""
    autocasts: tuple[str, ...] = ("bf16", "fp16")
    """Precisions that autocast supports besides fp32."""
    automatic: bool = False
    """Whether `--device auto` may choose it. The first row that is found wins."""
    compiles: bool = False
    """Whether steps are compiled by default."""
    numbered: bool = False
    """Whether a process sees several devices, so that it takes the one of its local rank."""
    pins: bool = False
    """Whether batches go through pinned memory, from which copies run beside the computation."""
    backend: str | None = None
    """`torch.distributed` backend; `None` if only one process can train."""
    syncs_batch_norm: bool = False
    """Whether batch norms of several processes can share their statistics."""
    copies_states: bool = False
    """Whether PyTorch's stager copies training states to the host (`--async-save`)."""
    rate_is_tensor: bool = False
    """Whether the learning rate is a tensor on the device: TorchTPU compiles AdamW again for each other number."""
    decodes_jpegs: bool = False
    """Whether nvJPEG runs on it (`--decode gpu`)."""
    built_for: Callable[[], str | None] | None = None
    """What this PyTorch is built for, such as CUDA 13.0, for `simmim doctor`. `None` for devices that are no GPU."""
    profiled_as: str | None = None
    """The device's name in `torch.profiler.ProfilerActivity`."""
    device_name: Callable[[torch.device], str] = lambda device: device.type
    """Name of the hardware."""
    total_memory: Callable[[torch.device], int] | None = None
    """Bytes of the device's own memory; `None` if it uses the host's, or PyTorch cannot tell."""
    peak_memory: Callable[[torch.device], int] | None = None
    """Most bytes that tensors have occupied on the device; `None` as above."""
    timed_event: Callable[[], torch.Event] | None = None
    """Make an event that marks a place in the device's work, and the milliseconds to another; `None` if not known."""
    synchronize: Callable[[], None] = lambda: None
    """Wait until the device has finished its work."""
    prepare: Callable[[], None] = lambda: None
    """Set what every command needs on the device, once it is chosen."""
    arithmetic: Callable[[str], contextlib.AbstractContextManager[None]] = lambda precision: contextlib.nullcontext()
    """Set how fp32 numbers are multiplied in a training of this precision; restore it at the end."""
    fit: Callable[[nn.Module], None] = lambda module: None
    """Change a model to what the device supports."""

    @property
    def is_gpu(self) -> bool:
        return self.built_for is not None


def find_accelerator(device: torch.device | str) -> Accelerator:
    """Return the row of a device. Raises `UserError` for an unknown name."""
    name = device if isinstance(device, str) else device.type
    if name not in ACCELERATORS:
        raise UserError(f"--device {name!r} is not known; choose from auto, {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name]


def choose_device(wanted: str) -> str:
    """Resolve `auto` to the first automatic device found, and prepare it. Raises `UserError` if it is not here."""
    if wanted == "auto":
        wanted = next(row.name for row in ACCELERATORS.values() if row.automatic and row.find() is None)
    if fault := find_accelerator(wanted).find():
        raise UserError(f"device {wanted!r} {fault}")
    ACCELERATORS[wanted].prepare()
    return wanted


def choose_precision(wanted: str, device: str) -> str:
    """Resolve `auto` to bf16 where the hardware multiplies it, else fp32. Raises `UserError` if autocast lacks it."""
    row = find_accelerator(device)
    if wanted == "auto":
        return "bf16" if row.has_bf16() else "fp32"
    if wanted != "fp32" and wanted not in row.autocasts:
        remedy = " or ".join((*row.autocasts, "fp32"))
        raise UserError(f"--precision {wanted} is not for --device {device}; use {remedy}")
    return wanted


def _gpu(module: str, missing: str) -> Callable[[], str | None]:
    """Look for a device by its PyTorch module, such as `torch.cuda`."""
    fault = f"is not here: PyTorch sees no {missing}; use --device cpu, or see `simmim doctor`"
    return lambda: None if getattr(torch, module).is_available() else fault


def _version(name: str, number: str | None) -> str | None:
    return None if number is None else f"{name} {number}"


@contextlib.contextmanager
def _without_tf32(precision: str) -> Iterator[None]:
    """Turn TF32 off for cuBLAS, and in an fp32 training for cuDNN's convolutions, which use it by default."""
    backends = [torch.backends.cuda.matmul, *([torch.backends.cudnn] if precision == "fp32" else [])]
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


@contextlib.contextmanager
def _exact_on_tpu(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    exact_fp32()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


ACCELERATORS: dict[str, Accelerator] = {
    row.name: row
    for row in (
        Accelerator(  # NVIDIA, and AMD by ROCm, which PyTorch calls cuda too
            name="cuda",
            find=_gpu("cuda", "NVIDIA or AMD GPU"),
            has_bf16=lambda: torch.cuda.is_bf16_supported(including_emulation=False),
            automatic=True,
            copies_states=True,
            compiles=True,
            numbered=True,
            pins=True,
            backend="cpu:gloo,cuda:nccl",
            syncs_batch_norm=True,
            decodes_jpegs=True,
            built_for=lambda: _version("ROCm", torch.version.hip) or _version("CUDA", torch.version.cuda),
            profiled_as="CUDA",
            device_name=torch.cuda.get_device_name,
            total_memory=lambda device: torch.cuda.get_device_properties(device).total_memory,
            peak_memory=torch.cuda.max_memory_allocated,
            timed_event=lambda: torch.cuda.Event(enable_timing=True),
            synchronize=torch.accelerator.synchronize,
            # PyTorch prefers cuDNN's attention on new GPUs; it has given wrong results with a learned bias in bf16.
            prepare=lambda: torch.backends.cuda.enable_cudnn_sdp(False),
            arithmetic=_without_tf32,
        ),
        Accelerator(
            name="xpu",
            find=_gpu("xpu", "Intel GPU"),
            has_bf16=lambda: torch.xpu.is_bf16_supported(including_emulation=False),
            automatic=True,
            numbered=True,
            pins=True,
            backend="cpu:gloo,xpu:xccl",
            syncs_batch_norm=True,
            built_for=lambda: _version("XPU", torch.version.xpu),
            profiled_as="XPU",
            device_name=torch.xpu.get_device_name,
            total_memory=lambda device: torch.xpu.get_device_properties(device).total_memory,
            peak_memory=torch.xpu.max_memory_allocated,
            synchronize=torch.accelerator.synchronize,
        ),
        Accelerator(
            name="mps",
            find=_gpu("mps", "Apple GPU"),
            automatic=True,
            built_for=lambda: "Metal" if torch.backends.mps.is_built() else None,
            device_name=lambda device: f"{cpu_name()} (GPU)",
            synchronize=torch.accelerator.synchronize,
        ),
        Accelerator(
            name="tpu",
            find=find_tpu,
            has_bf16=lambda: True,
            autocasts=("bf16",),
            compiles=True,
            backend="cpu:gloo,tpu:tpu_dist",
            rate_is_tensor=True,
            arithmetic=_exact_on_tpu,
            fit=fit_for_tpu,
        ),
        Accelerator(
            name="cpu",
            find=lambda: None,
            has_bf16=cpu_has_bf16,
            automatic=True,
            copies_states=True,
            backend="gloo",
            device_name=lambda device: f"{cpu_name()} ({cpu_cores()} core{'s' * (cpu_cores() > 1)})",
        ),
    )
}


def describe_device(device: torch.device) -> str:
    """Return the name of a device's hardware."""
    return find_accelerator(device).device_name(device)


def describe_gpus() -> dict[str, str]:
    """Return a line for each kind of GPU that this PyTorch is built for: the GPUs found, or that none is seen."""
    found = {}
    for name, row in ACCELERATORS.items():
        built = row.built_for() if row.built_for else None
        if built is None:
            continue
        if row.find() is None:
            count = torch.get_device_module(name).device_count()
            found[name] = f"{count} × {row.device_name(torch.device(name, 0))}, {built}"
        else:
            found[name] = f"none seen (torch is built for {built})"
    return found or {"gpu": "none (torch is built for the CPU)"}
