"""Facts about this machine: processor, cores and TPU chips."""

import importlib
import os
import platform
import sys
from functools import cache
from pathlib import Path


@cache
def _cpu_info() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in reversed(list(pairs))}


def cpu_name() -> str:
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def cpu_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reading_cores() -> int:
    """Count the cores of this process's share, if torchrun started several on this machine."""
    return max(1, cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def peak_process_memory() -> int | None:
    """Return the most bytes that this process had resident; `None` where the system does not tell (Windows)."""
    try:
        resource = importlib.import_module("resource")
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def cpu_has_bf16() -> bool:
    """Return whether the processor multiplies bf16 in hardware; without, bf16 is slower than fp32."""
    flags = (_cpu_info().get("flags") or _cpu_info().get("Features") or "").split()
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


# TPUs by their PCI numbers, as TorchTPU 0.2.0 and JAX 0.10.2 know them.
_GOOGLE = "0x1ae0"
_TPUS = {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "7x"}


def describe_tpu(devices: Path = Path("/sys/bus/pci/devices")) -> str:
    """Describe the TPU chips of this machine in one line. Read sysfs; opening the TPU would lock it."""
    found = [
        _TPUS[number]
        for place in sorted(devices.glob("*"))
        if _read(place / "vendor") == _GOOGLE and (number := _read(place / "device")) in _TPUS
    ]
    return f"{len(found)} × TPU {found[0]}" if found else "none seen"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def user_cache() -> Path:
    """Return the directory for files that may be deleted at any time: `SIMMIM_CACHE`, or as this platform has it.

    It may not exist.
    """
    if own := os.environ.get("SIMMIM_CACHE"):
        return Path(own)
    windows, given = os.environ.get("LOCALAPPDATA"), os.environ.get("XDG_CACHE_HOME")
    if platform.system() == "Windows" and windows:
        return Path(windows, "simmim", "Cache")
    if platform.system() == "Darwin":
        return Path("~/Library/Caches/simmim").expanduser()
    return Path(given or "~/.cache", "simmim").expanduser()
