"""Reading processes: the threads' batches to the bit, and processes that end when they should."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simmim.commands.pack import PackConfig, pack
from simmim.data.augment import RandomResizedCrop
from simmim.data.bad_images import BadImages, TooManyBadImages
from simmim.data.pipeline import Batch, Reading, train_batches
from simmim.data.readers.processes import stream_from_processes
from simmim.data.sources import ArrayImages, ImageSource, open_source
from simmim.errors import UserError


def batches(source: ImageSource, folder: Path, *, processes: bool, **changes: Any) -> Any:
    bad = BadImages(folder / "bad_images.txt", total=len(source), max_fraction=changes.pop("max_bad", 0.5))
    options: dict[str, Any] = {"batch_size": 6, "seed": 0, "start_step": 0, "total_steps": 5, "threads": 2}
    reading = Reading(**options | {"bad_images": bad} | changes)
    views: dict[str, Any] = {"crop": RandomResizedCrop(size=(16, 24)), "channels": 3, "dtype": np.uint8}
    return train_batches(source, reading, **views, stream=stream_from_processes if processes else None)


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def noise(count: int) -> ArrayImages:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 40, 50, 3), np.uint8)
    return ArrayImages(pixels, "noise")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images, of which one is broken."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 256, (40 + number, 50, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    (images / "3.png").write_bytes(b"no image")
    return images


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"start_step": 3, "total_steps": 7, "seed": 5},
        {"rank": 1, "world": 2},
        {"threads": 3, "batch_size": 7},
        {"threads": 5, "batch_size": 2, "total_steps": 1},
    ],
    ids=["plain", "resumed", "of two ranks", "uneven", "more processes than images"],
)
def test_processes_give_the_batches_of_threads(tmp_path: Path, changes: dict[str, Any]):
    expected = list(batches(noise(20), tmp_path, processes=False, **changes))
    assert_same(list(batches(noise(20), tmp_path, processes=True, **changes)), expected)


@pytest.mark.parametrize("form", [None, "original", "raw"])
def test_files_and_shards_are_read_and_broken_images_are_listed(folder: Path, tmp_path: Path, form: Any):
    data = folder
    if form:
        data = tmp_path / "shards"
        pack(PackConfig(images=str(folder), out=str(data), form=form, max_bad_fraction=0.5))
    source = open_source(str(data))
    next(batches(source, tmp_path, processes=False))  # of shards a file is open by now
    found = {}
    for processes in (False, True):
        here = tmp_path / str(processes)
        here.mkdir()
        found[processes] = list(batches(source, here, processes=processes))
        assert [line.split("\t")[0][-5:] for line in (here / "bad_images.txt").read_text().splitlines()] == ["3.png"]
    assert_same(found[True], found[False])


def test_too_many_broken_images_end_the_run_with_the_line_of_the_threads(folder: Path, tmp_path: Path):
    with pytest.raises(TooManyBadImages, match=r"^1 of 10 images \(10.0%\) cannot be read") as refusal:
        list(batches(open_source(str(folder)), tmp_path, processes=True, max_bad=0.0))
    assert "in _read" in refusal.value.__notes__[0]  # where in the process


class Locked(ArrayImages):
    """Images that cannot be sent to another process."""

    def __init__(self):
        super().__init__(np.zeros((10, 20, 20, 3), np.uint8), "locked")
        self.lock = threading.Lock()


def test_images_that_cannot_be_sent_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^these images cannot be sent to processes \(.*\); use --readers threads$"):
        next(batches(Locked(), tmp_path, processes=True))


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[Any, list[int]]]:
    """An endless reading of which one batch was taken, and its processes."""
    stream = batches(noise(20), tmp_path, processes=True, total_steps=10**6)
    next(stream)
    [children] = Path(f"/proc/{os.getpid()}/task/{os.getpid()}").glob("children")
    mine = [child for child in map(int, children.read_text().split()) if b"spawn_main" in command(child)]
    assert len(mine) == 2
    yield stream, mine
    stream.close()


def command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def wait_for_the_end(processes: list[int]) -> None:
    end = time.monotonic() + 20
    while any(map(command, processes)):
        assert time.monotonic() < end
        time.sleep(0.05)


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@linux
def test_closing_ends_the_processes(running: tuple[Any, list[int]]):
    running[0].close()
    wait_for_the_end(running[1])


@linux
def test_a_signal_to_stop_is_left_to_the_process_that_trains(running: tuple[Any, list[int]]):
    for process in running[1]:
        os.kill(process, signal.SIGINT)
        os.kill(process, signal.SIGTERM)
    for _ in range(20):
        assert len(next(running[0])["image"]) == 6


@linux
def test_a_process_that_was_killed_is_said_in_one_line(running: tuple[Any, list[int]]):
    os.kill(running[1][1], signal.SIGKILL)
    with pytest.raises(UserError, match=r"^a reading process ended with exit code -9.*--readers threads$"):
        list(islice(running[0], 20))


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_processes import batches, noise
if __name__ == "__main__":
    stream = batches(noise(20), Path({folder!r}), processes=True, total_steps=10**6)
    next(stream)
    print(Path("/proc/self/task").joinpath(str(__import__("os").getpid()), "children").read_text(), flush=True)
    {ending}
"""


@linux
@pytest.mark.parametrize("ending", ["sys.exit(3)", "for _ in stream: pass"], ids=["its end", "kill -9"])
def test_no_process_outlives_the_one_that_trains(tmp_path: Path, ending: str):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path), ending=ending))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout
        children = list(map(int, training.stdout.readline().split()))
        assert len(children) >= 2
        if "for" in ending:
            training.kill()
        try:
            assert training.wait(20) == (-9 if "for" in ending else 3)
        finally:
            training.kill()
    wait_for_the_end(children)
