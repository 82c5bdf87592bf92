"""`simmim doctor`: what is on this machine, what works and what is missing."""

import importlib.metadata
import importlib.util
import platform
import sys

from simmim.accelerators import cpu_cores, cpu_has_bf16, cpu_name

# What each optional package is for.
_OPTIONAL = {
    "transformers": "load encoders with transformers.AutoModel",
    "datasets": "--data hf:NAME",
    "tifffile": "multi-band and 16-bit RGB TIFF",
    "torch_tpu": "--device tpu",
    "wandb": "--log wandb",
    "trackio": "--log trackio",
}
_REQUIRED = ("torch", "torchvision", "timm", "safetensors", "numpy", "pillow", "grain", "simplejpeg", "tensorboardX")


def examine() -> dict[str, str]:
    """Findings by name, one line each."""
    findings = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cpu": f"{cpu_name()}, {cpu_cores()} cores, {'bf16' if cpu_has_bf16() else 'no bf16: fp32 is used'}",
        "memory": _memory(),
        "cuda": _cuda(),
        "tpu": "TorchTPU is installed"
        if _found("torch_tpu")
        else "no TorchTPU: pip install 'simmim[tpu]' on a TPU machine",
    }
    findings |= {name: _version(name) or "MISSING: pip install --force-reinstall simmim" for name in _REQUIRED}
    findings |= {name: _version(name) or f"not installed (for {use})" for name, use in _OPTIONAL.items()}
    findings["compiler"] = _compiler()
    return findings


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> str:
    try:
        import os

        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError, AttributeError):
        return "not known"


def _cuda() -> str:
    from simmim.torch_engine.distributed import describe_cuda

    return describe_cuda()


def _compiler() -> str:
    import shutil

    for name in ("g++", "clang++", "cl"):
        if path := shutil.which(name):
            return f"{path}: --compile works on the CPU"
    return f"none found: --compile does not work on the CPU of {sys.platform}; install g++"
