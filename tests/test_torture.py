"""Commands that are disturbed at random moments end in the bits of undisturbed ones (benchmarks/torture.py)."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

TORTURE = Path(__file__).parents[1] / "benchmarks/torture.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc"),
]


@pytest.mark.parametrize("command", ["pack", "embed", "convert", "export to timm", "report", "finetune segment"])
def test_a_disturbed_command_ends_in_the_bits_of_an_undisturbed_one(command: str) -> None:
    words = [sys.executable, str(TORTURE), "--kills", "6", "--seed", "2", "--only", command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"| {command} |" in done.stdout


def test_a_hanging_process_writes_where_it_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TORTURE.parent))
    from torture import explain

    code = """if True:
        import threading, torture
        from pathlib import Path

        def wait_for_what_never_comes():
            threading.Event().wait()

        folder = Path.cwd()
        job = torture.Job("hang", "", "json", outcome=dict)
        torture.set_up(job, torture.place_of(job, folder))
        print("ready", flush=True)
        wait_for_what_never_comes()
    """
    log = tmp_path / "log"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(TORTURE.parent), "OMP_NUM_THREADS": "1"}
    )
    try:
        end = time.monotonic() + 120
        while not (log.exists() and "ready" in log.read_text()) and time.monotonic() < end:
            time.sleep(0.1)
        told = explain([process.pid], log)
    finally:
        process.kill()
        process.wait()
    assert "in wait_for_what_never_comes" in log.read_text()
    assert f"process {process.pid}, child of" in told and "MainThread" not in told
    assert f"thread {process.pid} python" in told
