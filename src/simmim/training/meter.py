"""What training takes besides time: waiting for images, memory, energy."""

import contextlib
import time
from collections.abc import Sequence

from simmim.hardware.host import peak_process_memory


class Meter:
    """Measure the steps between two lines of progress. This one knows the process alone; engines add the device."""

    def __init__(self) -> None:
        self._read_at = time.monotonic()

    def step(self) -> contextlib.AbstractContextManager[None]:
        """Surround the work of one step."""
        return contextlib.nullcontext()

    def read(self, waits: Sequence[float], seconds: float) -> dict[str, float]:
        """Return figures of the steps since the last call, by the names under which they are logged.

        `waits` are the seconds that the host waited for the batch of each step, at least one, and `seconds` those of
        all of them. The device is idle: its figures were just fetched.

        - input_wait: share of the time in which the device waited for images, 0 to 1
        - device_memory_gib or process_memory_gib: the most so far, of tensors on the device or of this process
        - wall_seconds: since the last call, with whatever happened between
        - energy_joules: of the device, in the same time
        """
        now = time.monotonic()
        found = {"wall_seconds": now - self._read_at}
        self._read_at = now
        if (waited := self.waited(waits)) is not None:
            found["input_wait"] = min(waited / max(seconds, 1e-9), 1.0)
        return found | self.memory()

    def waited(self, waits: Sequence[float]) -> float | None:
        """Return the seconds that the device waited; `None` where nothing tells, as the host runs ahead of it."""
        return None

    def memory(self) -> dict[str, float]:
        peak = peak_process_memory()
        return {} if peak is None else {"process_memory_gib": peak / 2**30}
