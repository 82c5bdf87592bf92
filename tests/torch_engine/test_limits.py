from typing import Any

import pytest

from simmim.torch_engine.perf.limits import compare, judge


def figures(**changes: Any) -> dict[str, Any]:
    """Figures of a GPU whose step arithmetic limits; `step__seconds=1` changes one of the step's."""
    found: dict[str, Any] = {
        "kind": "cuda",
        "memory_gib": 80.0,
        "cores": 16,
        "has_bf16": True,
        "image_size": [224, 224],
        "batch_size": 256,
        "precision": "bf16",
        "compile": True,
        "decode": "cpu",
        "readers": "processes",
        "antialias": False,
        "step": {
            "images_per_second": 5000.0,
            "seconds": 0.051,
            "expected_seconds": 0.045,
            "arithmetic_share": 0.7,
            "memory_bytes": 20 * 2**30,
        },
        "input": {"images_per_second": 6000.0, "workers": 16, "data": "images/", "stored": "files"},
        "end_to_end": {"share_of_slower": 0.99},
    }
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        (found[part] if part else found)[key] = value
    return found


RAW = {"input__images_per_second": 900.0, "input__stored": "raw"}


def test_a_step_that_waits_for_nothing_is_limited_by_arithmetic() -> None:
    verdict = judge(figures())
    assert verdict["limit"] == "arithmetic"
    assert "simmim advise" in verdict["suggestion"]


@pytest.mark.parametrize(
    ("changes", "limit", "suggestion"),
    [
        ({"input__images_per_second": 900.0, "input__workers": 4}, "input", "--workers 16: 4 of 16 cores read now"),
        ({"input__images_per_second": 900.0}, "input", "simmim pack images/ --out SHARDS --short-side 291 --form jpeg"),
        ({"input__images_per_second": 900.0, "input__stored": "jpeg"}, "input", "--form raw: pixels need no decoding"),
        (RAW, "input", "more CPU cores"),
        (RAW | {"readers": "threads"}, "input", "--readers processes"),
        (RAW | {"antialias": True}, "input", "--no-antialias"),
        ({"end_to_end__share_of_slower": 0.8}, "contention", "--workers 8"),
        ({"end_to_end__share_of_slower": 0.8, "readers": "threads"}, "contention", "--readers processes"),
        (
            {"end_to_end__share_of_slower": 0.8, "readers": "threads", "decode": "gpu"},
            "contention",
            "--workers 8",
        ),
        ({"step__seconds": 0.1}, "overhead", "--batch-size 512"),
        ({"step__seconds": 0.1, "compile": False}, "overhead", "--compile"),
        ({"step__seconds": 0.1, "step__memory_bytes": 50 * 2**30}, "overhead", "--profile FILE"),
        ({"precision": "fp32"}, "arithmetic", "--precision bf16"),
        ({"step__arithmetic_share": 0.3}, "memory bandwidth", "a device of more bandwidth"),
        ({"step__arithmetic_share": 0.3, "compile": False}, "memory bandwidth", "--compile"),
        ({"step__arithmetic_share": 0.3, "precision": "fp32"}, "memory bandwidth", "--precision bf16"),
    ],
)
def test_the_suggestion_follows_from_the_figures(changes: dict[str, Any], limit: str, suggestion: str) -> None:
    verdict = judge(figures(**changes))
    assert verdict["limit"] == limit
    assert suggestion in verdict["suggestion"]
    assert "\n" not in verdict["suggestion"]


def test_bf16_is_not_suggested_where_the_hardware_has_none() -> None:
    assert "bf16" not in judge(figures(precision="fp32", has_bf16=False))["suggestion"]


def test_step_and_input_that_share_cores_are_not_called_contention() -> None:
    assert judge(figures(kind="cpu", end_to_end__share_of_slower=0.8))["limit"] == "arithmetic"


def test_on_the_same_cores_a_run_takes_the_time_of_step_and_input_together() -> None:
    assert compare(8.0, 10.0, 40.0, shared_cores=True) == {
        "slower_images_per_second": 10.0,
        "share_of_slower": 0.8,
        "shared_images_per_second": 8.0,
        "share_of_shared": 1.0,
    }


def test_an_accelerator_waits_for_the_slower_of_step_and_input_only() -> None:
    assert compare(30.0, 40.0, 30.0, shared_cores=False) == {"slower_images_per_second": 30.0, "share_of_slower": 1.0}
