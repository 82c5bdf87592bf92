"""What `make bench-gpu` runs, on the CPU with very small models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_script_for_gpus_runs_every_case_to_its_end(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
    environment = os.environ | {"PYTHON": sys.executable, "RESULTS": str(tmp_path), "WHEELS": str(tmp_path / "none")}
    done = subprocess.run([script, "--smoke"], env=environment, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "does not run" not in done.stdout
    assert {path.name for path in (tmp_path / "profiles_tiny").iterdir()} == {
        "step_vit_cpu.txt",
        "step_swin_cpu.txt",
        "step_resnet_cpu.txt",
    }
