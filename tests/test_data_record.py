"""The record of a run's images, and what a resume says of images that changed."""

import gzip
import json
from pathlib import Path

import pytest

from simmim.data.files import PathList
from simmim.training.data_record import check_data
from simmim.training.run_directory import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that began with the images a, b and c."""
    check(Run(tmp_path), "a", "b", "c")
    return Run(tmp_path)


def check(run: Run, *names: str, val: str = "v", accept: bool = False) -> str | None:
    return check_data(run, {"train": PathList(names), "val": PathList([val])}, accept=accept)


def test_the_same_images_pass(run: Run) -> None:
    assert check(run, "a", "b", "c") is None


def test_counts_and_names_are_recorded(run: Run) -> None:
    assert {part: facts["images"] for part, facts in json.loads(run.data.read_text()).items()} == {"train": 3, "val": 1}
    assert json.loads(gzip.decompress(run.data_names.read_bytes())) == {"train": ["a", "b", "c"], "val": ["v"]}


@pytest.mark.parametrize(
    ("names", "val", "message"),
    [
        ("abcde", "v", "changed since it began: 2 added, such as d, e; bring"),
        ("ac", "v", "changed since it began: 1 removed, such as b; bring"),
        ("abx", "v", "changed since it began: 1 added, such as x and 1 removed, such as c; bring"),
        ("acb", "v", "changed since it began: the same 4 in another order or split; bring"),
        ("avc", "b", "changed since it began: the same 4 in another order or split; bring"),
    ],
)
def test_changed_images_are_refused(run: Run, names: str, val: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(run, *names, val=val)


def test_accepted_changes_are_told_once_and_recorded(run: Run) -> None:
    assert check(run, "a", "b", accept=True) == "1 removed, such as c"
    assert check(run, "a", "b") is None


def test_accepted_changes_survive_a_kill_between_the_two_files(run: Run) -> None:
    before = run.data.read_bytes()
    check(run, "a", "c", "b", accept=True)
    recorded = run.data.read_bytes()
    run.data.write_bytes(before)
    assert check(run, "a", "c", "b") is None
    assert run.data.read_bytes() == recorded


def test_names_that_are_no_utf8_are_recorded(run: Run) -> None:
    assert check(run, "a\udcff", "b", "c", accept=True) == "1 added, such as a\udcff and 1 removed, such as a"
    with pytest.raises(ValueError, match="1 removed, such as a\udcff"):
        check(run, "b", "c")
