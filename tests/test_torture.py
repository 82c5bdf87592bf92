"""Commands that are disturbed at random moments end in the bits of undisturbed ones (benchmarks/torture.py)."""

import subprocess
import sys
from pathlib import Path

import pytest

TORTURE = Path(__file__).parents[1] / "benchmarks/torture.py"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc")
@pytest.mark.parametrize("command", ["pack", "embed", "convert", "export to timm", "report", "finetune segment"])
def test_a_disturbed_command_ends_in_the_bits_of_an_undisturbed_one(command: str) -> None:
    words = [sys.executable, str(TORTURE), "--kills", "6", "--seed", "2", "--only", command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"| {command} |" in done.stdout
