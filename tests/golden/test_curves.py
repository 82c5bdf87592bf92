"""Nothing that a training computes changes unnoticed: runs of every kind of configuration against recorded ones.

`python tests/golden/record.py --write` records anew, where a change is meant to train something else.
"""

import importlib.util
from pathlib import Path

import pytest

from . import record

KERAS_IS_HERE = all(importlib.util.find_spec(library) for library in ("keras", "jax"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("keras")) for name in record.names()]
)
def test_a_run_ends_as_it_was_recorded(name: str, tmp_path: Path) -> None:
    if name.startswith("keras") and not KERAS_IS_HERE:
        pytest.skip("keras or jax not installed: pip install 'simmim[keras]'")
    found = record.train_golden(name, tmp_path)
    expected = record.read(record.CURVES / f"{name}.json")
    tolerance = record.DETECTION_TOLERANCE if name.startswith("detect") else record.CURVE_TOLERANCE
    assert record.differences(found, expected, tolerance) == []
