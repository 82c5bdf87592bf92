"""Ten questions and their answers, reviewed by hand against `docs/advise.md`.

After a change of facts or arithmetic: `ADVISE_GOLDEN=write pytest -m '' tests/test_advise_golden.py`; then read the
difference.
"""

import json
import os
from pathlib import Path

import pytest

from simmim.cli import main

QUESTIONS = sorted((Path(__file__).parent / "golden" / "advise").glob("*.json"))
QUICK = {"few-cores"}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else pytest.mark.slow) for path in QUESTIONS],
)
def test_the_question_has_the_reviewed_answer(path, capsys):
    golden = json.loads(path.read_text(encoding="utf-8"))
    assert main(["advise", *golden["arguments"], "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    if os.environ.get("ADVISE_GOLDEN") == "write":
        path.write_text(json.dumps(golden | {"answer": answer}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        assert_alike(answer, golden["answer"])


def assert_alike(found, golden):
    """Numbers to 3 %, since another version of PyTorch may count an operation more; all else exactly."""
    if isinstance(golden, dict):
        assert found.keys() == golden.keys()
        for name, value in golden.items():
            assert_alike(found[name], value)
    elif isinstance(golden, list):
        assert len(found) == len(golden)
        for one, other in zip(found, golden, strict=True):
            assert_alike(one, other)
    elif isinstance(golden, float):
        assert found == pytest.approx(golden, rel=0.03)
    else:
        assert found == golden
