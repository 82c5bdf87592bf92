"""`simmim doctor`: what is on this machine, what works and what is missing."""

import importlib.metadata
import os
import platform
import re
import shutil
from pathlib import Path

from simmim.commands.dangers import find_dangers
from simmim.commands.tpu_check import try_compiler
from simmim.hardware.host import cpu_cores, cpu_has_bf16, cpu_name, describe_tpu

# What each optional package is for.
_OPTIONAL = {
    "transformers": "to load encoders with transformers.AutoModel",
    "datasets": "for --data hf:NAME",
    "pyarrow": "for simmim embed --out FILE.parquet",
    "lmdb": "for --data lmdb:PATH",
    "av": "for clips (video)",
    "tifffile": "for TIFF with many bands or deep colour",
    "torch_tpu": "for --device tpu and simmim tpu-check",
    "libtpu": "for --device tpu and simmim tpu-check",
    "keras": "for --engine keras",
    "wandb": "for --log wandb",
    "trackio": "for --log trackio",
}

_NOT_INSTALLED = "not installed, so what it needs is not known; pip install . in its checkout"


def examine(directory: str = ".") -> dict[str, str]:
    """Return findings by name, one line each. Tries a very small training step on each device, and times kernels.

    `directory` is where runs are to be written. What endangers a run begins with "DANGER".
    """
    bf16 = "bf16 in hardware" if cpu_has_bf16() else "no bf16, so fp32 is used"
    findings = {
        "simmim": _version("simmim") or _NOT_INSTALLED,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cpu": f"{cpu_name()}, {cpu_cores()} cores, {bf16}",
        "memory": _memory(),
        "compiler": _compiler(),
        **find_dangers(Path(directory)),
    }
    try:
        from simmim.torch_engine.accelerators import describe_gpus
        from simmim.torch_engine.perf.kernel_choice import try_kernels
        from simmim.torch_engine.perf.nvidia import describe_nvidia
        from simmim.torch_engine.perf.trial import try_devices
    except ImportError as error:
        findings["training"] = f"does not work: {error}; install simmim again"
    else:
        findings |= describe_gpus() | describe_nvidia() | try_devices() | try_kernels()
    findings["tpu"] = describe_tpu()
    findings["compiling for TPUs"] = try_compiler()
    findings |= {name: _version(name) or "MISSING; install simmim again" for name in _required()}
    findings |= {name: _version(name) or f"not installed ({use})" for name, use in _OPTIONAL.items()}
    return findings


def _required() -> list[str]:
    """List the packages that simmim cannot work without, from its own metadata, if it is installed."""
    try:
        requirements = importlib.metadata.requires("simmim") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements if "extra ==" not in line]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError, AttributeError):  # not a Unix
        return "not known"


def _compiler() -> str:
    for name in ("g++", "clang++", "cl"):
        if path := shutil.which(name):
            return f"{path} (for --compile on the CPU)"
    return "none found; --compile on the CPU needs one, such as g++"
