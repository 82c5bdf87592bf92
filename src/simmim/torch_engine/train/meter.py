"""What training with PyTorch takes besides time."""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from simmim.torch_engine.accelerators import find_accelerator
from simmim.training.meter import Meter


class TorchMeter(Meter):
    """Measure a device by PyTorch.

    A CPU waits when its process does. A GPU does not, as long as it has work: it waited in the gap between the end of a
    step and the begin of the next, which a pair of events on its stream measures without waiting for it.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self._device, self._row = device, find_accelerator(device)
        self._gaps: list[tuple[Any, Any]] = []  # events at the end of a step and at the begin of the next
        self._ended: Any = None
        self._counter = energy_counter(device)
        self._joules = self._counter() if self._counter else None

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        if self._row.timed_event is None:
            yield
            return
        if self._ended is not None:
            self._gaps.append((self._ended, self._now(self._row.timed_event)))
        yield
        self._ended = self._now(self._row.timed_event)

    def read(self, waits: Sequence[float], seconds: float) -> dict[str, float]:
        found = super().read(waits, seconds)
        before, self._joules = self._joules, self._counter() if self._counter else None
        if before is not None and self._joules is not None and self._joules >= before:
            found["energy_joules"] = self._joules - before
        return found

    def waited(self, waits: Sequence[float]) -> float | None:
        if self._device.type == "cpu":
            return sum(waits)
        if self._row.timed_event is None:
            return None
        first, *others = waits  # before the first the device was idle: its figures had been fetched
        idle = [begun.elapsed_time(begin) / 1000 for begun, begin in self._gaps]
        self._gaps.clear()
        self._ended = None
        # Whatever of a gap the host did not spend waiting for images is overhead of its own.
        return first + sum(map(min, idle, others))

    def memory(self) -> dict[str, float]:
        if self._row.peak_memory is None:
            return super().memory()
        return {"device_memory_gib": self._row.peak_memory(self._device) / 2**30}

    @staticmethod
    def _now(event: Callable[[], Any]) -> Any:
        made = event()
        made.record()
        return made


def energy_counter(device: torch.device) -> Callable[[], float | None] | None:
    """Return what reads the joules that an NVIDIA GPU took since its driver was loaded, or `None`.

    That is NVML's counter (nvmlDeviceGetTotalEnergyConsumption), of Volta and newer, if `nvidia-ml-py` is installed.
    """
    if device.type != "cuda":
        return None
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")

        def read() -> float | None:
            try:
                return nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
            except nvml.NVMLError:  # a training goes on without
                return None

        return read if read() is not None else None
    except Exception:  # no such package, no NVIDIA driver, a slice of a GPU: nothing is said of energy
        return None
