"""What endangers a run on an NVIDIA GPU, for `simmim doctor`."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

_DRIVER = Path("/proc/driver/nvidia/version")


def describe_nvidia() -> dict[str, str]:
    """Say whether the driver is new enough for PyTorch, and nvJPEG works; nothing where there is no GPU or no CUDA."""
    built = torch.version.cuda
    if built is None:
        return {}
    if torch.cuda.is_available():
        return {"nvJPEG": _try_nvjpeg()}
    return {"driver": _describe_driver(built, _driver_version())} if _DRIVER.exists() else {}


def _try_nvjpeg() -> str:
    jpeg = np.frombuffer(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8)), np.uint8)
    try:
        importlib.import_module("torchvision.io").decode_jpeg(torch.from_numpy(jpeg.copy()), device="cuda")
    except Exception as error:  # not built in, or its library is missing
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"DANGER: does not work: {reason}; do not use --decode gpu"
    return "works"


def _driver_version() -> int:
    """Return the newest CUDA that the driver supports, such as 12040 for 12.4; 0 where it does not say."""
    private: Any = torch._C
    try:
        return private._cuda_getDriverVersion()
    except (AttributeError, RuntimeError):  # PyTorch for the CPU, or another version
        return 0


def _describe_driver(built: str, number: int) -> str:
    """Say what is wrong with a driver by which PyTorch, built for a CUDA, sees no GPU."""
    known = f"{number // 1000}.{number % 1000 // 10}"
    if number and number // 1000 < int(built.split(".")[0]):
        return f"DANGER: it is for CUDA {known}, and torch for {built}; update it, or install a torch for CUDA {known}"
    return f"DANGER: it is there, and torch, built for CUDA {built}, sees no GPU; look at nvidia-smi"
