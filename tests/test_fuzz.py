"""Damaged and hostile files are read or refused in one line (benchmarks/fuzz.py), and what else happens is noticed."""

import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simmim.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("fuzz")


def test_no_damaged_file_does_harm(fuzz: Any, tmp_path: Path) -> None:
    for number, (name, kind) in enumerate(fuzz.make_kinds(tmp_path).items()):
        tally = fuzz.fuzz(kind, range(number * 1000, number * 1000 + 60), tmp_path / "trial")
        assert not tally.faults, (name, tally.faults)
        assert sum(tally.outcomes.values()) == 60


def crash(folder: Path) -> None:
    os.abort()


def hang(folder: Path) -> None:
    time.sleep(60)


def write_beside(folder: Path) -> None:
    (folder.parent / "beside").write_text("")


def run_program(folder: Path) -> None:
    os.system("true")


def fail(folder: Path) -> None:
    raise KeyError("bytes")


def refuse_in_two_lines(folder: Path) -> None:
    raise UserError("one\ntwo")


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (crash, "no answer: the process ended with -6"),
        (hang, "no answer"),
        (write_beside, "to write"),
        (run_program, "os.system"),
        (fail, "KeyError"),
        (refuse_in_two_lines, "several lines"),
    ],
)
def test_harm_is_noticed(
    fuzz: Any, read: Callable[[Path], None], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "_SECONDS", 1)
    tally = fuzz.fuzz(fuzz.Kind(read, {"a": b"content"}), range(2), tmp_path / "trial")
    assert len(tally.faults) == 3 and all(fault in each for each in tally.faults)  # the first is without damage
