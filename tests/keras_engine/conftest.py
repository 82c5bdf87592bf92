"""Keras takes one backend a process, so what needs Keras runs in processes of its own, which print JSON."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    "CUDA_VISIBLE_DEVICES": "",
    # Compiling is most of a small test's time.
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
}


def have(*libraries: str) -> pytest.MarkDecorator:
    missing = [library for library in libraries if importlib.util.find_spec(library) is None]
    extras = "keras,tpu" if "libtpu" in missing else "keras"
    reason = f"{', '.join(missing)} not installed: pip install 'simmim[{extras}]'"
    return pytest.mark.skipif(bool(missing), reason=reason)


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="session")
def report() -> Callable[..., Any]:
    """What a script of this folder prints, as JSON; run once for the same arguments."""
    known: dict[tuple[str, ...], Any] = {}

    def run(script: str, *arguments: str, **environment: str) -> Any:
        key = (script, *arguments, *environment.values())
        if key not in known:
            done = run_python(str(HERE / script), *arguments, **environment)
            assert done.returncode == 0, done.stderr
            known[key] = json.loads(done.stdout.splitlines()[-1])
        return known[key]

    return run
