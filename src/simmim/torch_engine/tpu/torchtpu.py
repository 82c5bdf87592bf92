"""Trace PyTorch code to StableHLO by TorchTPU, without a TPU and on tensors without data.

Only this file touches TorchTPU's private API, for which the extra [tpu] pins its version: `tracing` turns the
device into a name without hardware and records TorchTPU's operations.
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
    """Recorded operations, with inputs by name in order of creation."""

    def __init__(self, recorder: Any):
        self._recorder = recorder
        self.names: list[str] = []
        self._inputs: list[Tensor] = []

    def input(self, name: str, like: Tensor) -> Tensor:
        """Create a TPU tensor that stands for an input of this shape and dtype; it may be modified in place."""
        held = self._recorder.placeholder(list(like.shape), like.dtype, False)
        self.names.append(name)
        self._inputs.append(held)
        return held.clone()

    def stablehlo(self, outputs: Sequence[Tensor]) -> str:
        """Return the module that computes `outputs` from all inputs."""
        return self._recorder.serialize_mlir_text(self._recorder.build_mlir(list(outputs), self._inputs))


@contextlib.contextmanager
def tracing() -> Iterator[Trace]:
    """Record operations on `torch.device("tpu")`.

    Needs its own process with `tpu_compiler.ENVIRONMENT`: the change is permanent, and TorchTPU may abort as the
    process exits. Raises `UserError` for another TorchTPU version.
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
    """Replace TorchTPU's device guard, which would look for a TPU, by one that does nothing.

    PyTorch offers no way to replace a registered guard, hence the access to its C++ table by symbol name.
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
