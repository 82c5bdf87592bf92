"""What a run took, on the page: only what was measured, and money by a price that is given or known."""

import json
from pathlib import Path
from typing import Any

import pytest

from simmim.cli import main
from simmim.report.facts import Facts
from simmim.report.resources import taken
from simmim.report.verdict import judge

from .test_report import write_run

WINDOW = {"wall_seconds": 1800.0, "input_wait": 0.25, "images_per_second": 100.0}


def lines(facts: Facts, price: float | None = None) -> dict[str, str]:
    return dict(taken(facts, price))


def trained_on(facts: Facts, *devices: tuple[str, int]) -> Facts:
    begun = [{"step": 0, "device": name, "devices": count} for name, count in devices]
    facts.run.machine.write_text(json.dumps({"begun": begun}), encoding="utf-8")
    return facts


def test_what_was_measured_is_said(tmp_path: Path) -> None:
    figures = {"device_memory_gib": 3.5, "energy_joules": 900_000.0}
    facts = write_run(tmp_path / "run", [{"loss": 1.0, **WINDOW, **figures}] * 4)
    assert lines(facts) == {
        "Training time": "3s, without evaluations and saving",
        "Time in all": "2h00m, with them",
        "Speed": "100.0 images/s (median)",
        "Waiting for images": "25.0% of the time (median)",
        "Peak memory": "3.50 GiB of tensors on the device",
        "Energy": "1 kWh of the GPU, by its own counter",
    }
    assert lines(write_run(tmp_path / "other", [{"loss": 1.0}])) == {}


def test_money_is_by_the_price_that_is_given_or_of_a_known_gpu(tmp_path: Path) -> None:
    facts = write_run(tmp_path / "run", [{"loss": 1.0, **WINDOW}] * 4)
    assert lines(facts, 2.5)["Cost"] == "5.00 USD at 2.5 USD an hour"
    assert lines(facts, 0.001)["Cost"] == "less than 0.01 USD at 0.001 USD an hour"
    assert "Cost" not in lines(trained_on(facts, ("Intel(R) Xeon(R) Processor (2 cores)", 1)))
    cost = lines(trained_on(facts, ("NVIDIA H200", 1)))["Cost"]
    assert cost.startswith("about 9.18 USD at 4.59 USD an hour (NVIDIA H200") and "RunPod" in cost
    assert "about 36.72 USD at 4 × 4.59 USD" in lines(trained_on(facts, ("NVIDIA H200", 4)))["Cost"]
    assert "Cost" not in lines(trained_on(facts, ("NVIDIA H200", 1), ("NVIDIA L4", 1)))
    facts.run.machine.write_text('{"begun": [{}]}', encoding="utf-8")
    assert "Cost" not in lines(facts)


@pytest.mark.parametrize(("share", "steps", "found"), [(0.21, 20, True), (0.2, 20, False), (0.9, 19, False)])
def test_much_waiting_for_images_is_told_with_its_remedies(
    tmp_path: Path, share: float, steps: int, found: bool
) -> None:
    rows: list[dict[str, Any]] = [{"loss": 1.0}] * (steps - 2) + [{"loss": 1.0, "input_wait": share}] * 2
    findings = {each.title: each for each in judge(write_run(tmp_path / "run", rows, workers=3))}
    assert ("Slowed down by reading images" in findings) == found
    if found:
        told = findings["Slowed down by reading images"]
        assert told.figure == "the training waited for images in 21% of its time (median)"
        assert told.remedy == "raise --workers above 3, try --readers processes, or pack the images (simmim pack)"


def test_the_price_is_an_option_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = write_run(tmp_path / "run", [{"loss": 1.0, **WINDOW}] * 4)
    assert main(["report", str(facts.run.path), "--price-per-hour", "2.5"]) == 0
    page = (facts.run.path / "report.html").read_text(encoding="utf-8")
    assert "5.00 USD at 2.5 USD an hour" in page and "Share of the time waiting for images" in page
    assert main(["report", str(facts.run.path), "--price-per-hour", "-1"]) == 2
    assert "price" in capsys.readouterr().err
