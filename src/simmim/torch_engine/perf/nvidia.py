"""What endangers a run on an NVIDIA GPU, for `simmim doctor`."""

import subprocess
import sys
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
    """Decode a JPEG in another process: a library that does not fit the driver may end it."""
    code = f"from {__name__} import decode_jpeg; decode_jpeg()"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not tried: {type(error).__name__}"
    if not done.returncode:
        return "works"
    reason = (done.stderr.strip().splitlines() or [f"it ended the process with code {done.returncode}"])[-1]
    return f"DANGER: does not work: {reason}; do not use --decode gpu"


def decode_jpeg(device: str = "cuda") -> None:
    """Decode a small JPEG as `--decode gpu` does. Raises what torchvision does where it has no nvJPEG."""
    from torchvision.io import decode_jpeg

    jpeg = np.frombuffer(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8)), np.uint8)
    decode_jpeg(torch.from_numpy(jpeg.copy()), device=device)


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
