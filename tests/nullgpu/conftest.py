"""A GPU that computes nothing, built once for each version of torch and of its source."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from . import build

TRIED = ("2.11.0", "2.14.1")
"""Versions of torch whose CUDA calls nullgpu.c is known to answer."""


@pytest.fixture(scope="session")
def library() -> Path:
    """The preloaded library; skips where it cannot be."""
    import torch

    if shutil.which("gcc") is None or shutil.which("nm") is None:
        pytest.skip("gcc and nm build the GPU that computes nothing; one is missing")
    if torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} has no CUDA")
    if torch.__version__.split("+")[0] not in TRIED:
        pytest.skip(f"nullgpu.c was tried with torch {', '.join(TRIED)}, not {torch.__version__}")
    sources = b"".join((build.HERE / name).read_bytes() for name in ("nullgpu.c", "build.py"))
    digest = hashlib.sha256(sources + torch.__file__.encode() + torch.__version__.encode()).hexdigest()[:16]
    kept = Path(tempfile.gettempdir()) / f"simmim-nullgpu-{os.getuid()}-{digest}"
    if not kept.exists():
        building = Path(tempfile.mkdtemp(prefix="simmim-nullgpu-"))
        try:
            build.build(building)
        except subprocess.CalledProcessError as error:
            pytest.fail(f"{error}: {error.stderr}")
        try:
            building.rename(kept)
        except OSError:  # another process was first
            shutil.rmtree(building)
    return kept / "libcuda.so.1"


@pytest.fixture(scope="session")
def on_null_gpu(library: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python with that GPU: `on_null_gpu("-m", "simmim", "doctor", NULLGPU_BYTES="8000000000")`."""

    def run(*arguments: str, timeout: float = 550, **environment: str) -> subprocess.CompletedProcess[str]:
        known = {
            "LD_PRELOAD": str(library),
            "TRITON_LIBCUDA_PATH": str(library.parent),
            "TORCH_CUDNN_V8_API_DISABLED": "1",
            "TPU_SKIP_MDS_QUERY": "1",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=build.HERE.parent,
            env={**os.environ, **known, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
