"""What training on a device takes: waiting for images, memory, energy."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simmim.torch_engine.accelerators import ACCELERATORS, Accelerator
from simmim.torch_engine.train.meter import TorchMeter, energy_counter


def test_a_cpu_waits_whenever_its_process_does() -> None:
    figures = TorchMeter(torch.device("cpu")).read([0.1, 0.2], 1.0)
    assert figures["input_wait"] == pytest.approx(0.3)
    assert 0.01 < figures["process_memory_gib"] < 100
    assert "energy_joules" not in figures


class Stream:
    """A device whose steps take 10 ms and begin when the host has come, or when the step before has ended."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def event(self) -> Any:
        stream, at = self, []

        def record() -> None:
            stream.device = max(stream.device, stream.host)
            at.append(stream.device)

        return SimpleNamespace(record=record, at=at, elapsed_time=lambda other: other.at[0] - at[0])


def test_a_gpu_waits_only_while_it_has_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    row = Accelerator(name="meta", find=lambda: None, timed_event=stream.event, peak_memory=lambda device: 2**30)
    monkeypatch.setitem(ACCELERATORS, "meta", row)
    meter = TorchMeter(torch.device("meta"))

    def window(*waits: float) -> dict[str, float]:
        """Steps of 10 ms for which the host waits so many, and then fetches figures."""
        begun = stream.host = stream.device = max(stream.host, stream.device)
        for wait in waits:
            stream.host += wait
            with meter.step():
                stream.device = max(stream.device, stream.host) + 10
        return meter.read([wait / 1000 for wait in waits], (stream.device - begun) / 1000)

    assert window(0, 0, 0)["input_wait"] == 0
    assert window(5, 8, 9)["input_wait"] == pytest.approx(5 / 35)  # what comes during a step is no wait
    assert window(0, 30, 30)["input_wait"] == pytest.approx(40 / 70)
    assert window(30)["input_wait"] == pytest.approx(30 / 40)
    assert window(0)["device_memory_gib"] == 1


def test_energy_is_read_from_nvml_and_nothing_is_said_without(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    joules = iter([5000.0, 5000.0, 7500.0, None])

    def energy(handle: str) -> float:
        assert handle == "handle of GPU-1234"
        if (found := next(joules)) is None:
            raise NVMLError
        return found * 1000

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: f"handle of {uuid}",
        nvmlDeviceGetTotalEnergyConsumption=energy,
        NVMLError=NVMLError,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    meter = TorchMeter(torch.device("cuda"))
    monkeypatch.setattr(meter, "memory", dict)
    assert meter.read([0.0], 1.0)["energy_joules"] == 2500
    assert "energy_joules" not in meter.read([0.0], 1.0)
    assert energy_counter(torch.device("cpu")) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_counter(torch.device("cuda")) is None
