"""Standard output and error that are closed, broken or full."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simmim.cli import COMMANDS, main
from simmim.output import SafeStream, printable, say, show
from simmim.training.tracking import Console

SIMMIM = [sys.executable, "-m", "simmim"]


class Broken(io.StringIO):
    """A stream that fails from its first text on."""

    def __init__(self, number: int):
        super().__init__()
        self.number, self.calls = number, 0

    def write(self, text: str) -> int:
        self.calls += 1
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.EBADF])
@pytest.mark.parametrize("keeps_results", [False, True])
def test_a_stream_that_no_one_reads_goes_silent(number: int, keeps_results: bool) -> None:
    broken = Broken(number)
    stream = SafeStream(broken, keeps_results=keeps_results)
    assert stream.write("one") == 3
    stream.write("two")
    stream.flush()
    assert broken.calls == 1


def test_on_a_full_disk_progress_is_dropped_and_results_are_an_error() -> None:
    SafeStream(Broken(errno.ENOSPC)).write("step 1")
    with pytest.raises(OSError, match="standard output cannot be written: No space left on device"):
        SafeStream(Broken(errno.ENOSPC), keeps_results=True).write("0.95")


def test_a_stream_takes_what_its_encoding_does_not_hold() -> None:
    held = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(held, encoding="ascii"))
    stream.write("a → b \udcff")
    stream.flush()
    assert held.getvalue() == b"a \\u2192 b \\udcff"


@pytest.mark.parametrize("stream", [None, Broken(errno.EPIPE)])
def test_a_line_is_said_to_no_one(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    say("step 1")


def test_what_would_control_a_terminal_is_escaped() -> None:
    assert printable("Häuser\x1b[2J\nimage.png\udcff") == "Häuser\\x1b[2J\\nimage.png\\udcff"


def test_a_command_whose_output_is_closed_does_all_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(argv: list[str]) -> int:
        for number in range(3):
            print(number, flush=True)
            print(number, file=sys.stderr, flush=True)
        (tmp_path / "done").touch()
        return 143

    monkeypatch.setitem(COMMANDS, "pack", work)
    monkeypatch.setattr(sys, "stdout", Broken(errno.EPIPE))
    monkeypatch.setattr(sys, "stderr", Broken(errno.EPIPE))
    assert main(["pack"]) == 143
    assert (tmp_path / "done").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_results_on_a_full_disk_end_with_one_line_and_an_error_code() -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([*SIMMIM, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (
        2,
        "simmim: standard output cannot be written: No space left on device\n",
    )


def test_files_do_not_take_the_place_of_a_closed_output(tmp_path: Path) -> None:
    script = (
        "import os, simmim.cli as cli\n"
        f"cli.COMMANDS['pack'] = lambda argv: os.open({str(tmp_path / 'file')!r}, os.O_WRONLY | os.O_CREAT) <= 2\n"
        "raise SystemExit(cli.main(['pack']))\n"
    )
    closed = f'exec {sys.executable} -c "$0" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", closed, script], check=False).returncode == 0


NAME = "a\x1b[2J\nb.png"
SAFE = r"a\x1b[2J\nb.png"


def test_names_in_results_and_messages_cannot_control_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"looking at {NAME}")
    show([f"{NAME} is packed", Path(NAME)])
    found = capsys.readouterr()
    assert (found.out, found.err) == (f"{SAFE} is packed\n{SAFE}\n", f"looking at {SAFE}\n")


def test_a_training_s_lines_cannot_either(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (False, True):
        monkeypatch.setattr(SafeStream, "isatty", lambda _stream, terminal=terminal: terminal)
        console = Console(total=1, start=0, enabled=True)
        console.say(f"writes {NAME}")
        console.close()
        assert f"writes {SAFE}" in capsys.readouterr().err


def test_commands_show_names_safely(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / NAME.partition(".")[0]
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    (folder / "run").mkdir()
    (folder / "run/config.toml").write_text('model = "resnet18"\n')
    assert main(["pack", str(folder), "--out", f"{folder}/shards"]) == 0
    assert main(["runs", str(folder)]) == 0
    assert main(["probe", str(folder), "--data", "demo"]) == 2
    found = capsys.readouterr()
    text = found.out + found.err
    assert "\x1b" not in text and text.count(r"a\x1b[2J\nb") >= 4
