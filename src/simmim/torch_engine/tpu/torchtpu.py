"""TorchTPU where there is no TPU: PyTorch code runs on tensors without data and becomes StableHLO.

This file alone touches TorchTPU's private parts, for which the extra [tpu] pins its version: `tracing` turns the
tensors' device into a name behind which nothing is, and TorchTPU's own operations into a recording.
"""

import contextlib
import ctypes
import importlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simmim.errors import UserError

TORCH_TPU = "0.2.0"


class Trace:
    """What was recorded: inputs by name, in the order in which they came."""

    def __init__(self, recorder: Any):
        self._recorder = recorder
        self.names: list[str] = []
        self._inputs: list[Tensor] = []

    def input(self, name: str, like: Tensor) -> Tensor:
        """A tensor on the TPU that stands for an input of this shape and dtype; it may be changed in place."""
        held = self._recorder.placeholder(list(like.shape), like.dtype, False)
        self.names.append(name)
        self._inputs.append(held)
        return held.clone()

    def stablehlo(self, outputs: Sequence[Tensor]) -> str:
        """The module that computes `outputs` from all inputs."""
        return self._recorder.serialize_mlir_text(self._recorder.build_mlir(list(outputs), self._inputs))


@contextlib.contextmanager
def tracing() -> Iterator[Trace]:
    """Within it, operations on `torch.device("tpu")` are recorded.

    For a process of its own, in `tpu_compiler.ENVIRONMENT`: it cannot be undone, and TorchTPU may abort as the process
    ends. One-line `ValueError` where TorchTPU is another version.
    """
    found = importlib.metadata.version("torch_tpu")
    moved = (
        f"TorchTPU {found} is not the {TORCH_TPU} whose private parts this needs; pip install torch-tpu=={TORCH_TPU}"
    )
    if found != TORCH_TPU:
        raise UserError(moved)
    try:
        importlib.import_module("torch_tpu._loader")._init_device("tpu")
        _take_over_device()
        recorder = importlib.import_module("torch_tpu._internal.compile.tpu_torch_compile")
        modes = importlib.import_module("torch_tpu._internal.execution_mode")
        recording = modes.set_eager_mode(modes.EagerMode._INTERNAL_COMPILE_FX_GRAPH)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{moved} ({error})") from error
    with recording:
        yield Trace(recorder)


def _take_over_device() -> None:
    """Put a device guard that does nothing in the place of TorchTPU's, which would look for a TPU.

    PyTorch lets no one replace a guard that is registered, hence its C++ table by its name.
    """
    kind = torch._C._autograd.DeviceType.PrivateUse1  # type: ignore[attr-defined]
    torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (int(kind) + 1)).in_dll(torch_library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[int(kind)] = None

    class Guard(torch._C._acc.DeviceGuard):  # type: ignore[name-defined]
        def type_(self) -> Any:
            return kind

    guard = Guard()
    _KEPT.append(guard)  # PyTorch holds no reference
    torch._C._acc.register_python_privateuseone_device_guard(guard)  # type: ignore[attr-defined]


_KEPT: list[Any] = []
