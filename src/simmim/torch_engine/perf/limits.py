"""Rules that derive a training's limit and a remedy from the figures of `simmim bench`."""

from typing import Any

_NEAR = 0.95
"""Expected end-to-end speed, as a share of the slower of step and input."""
_SLACK = 1.5
"""A step this many times slower than its roofline is limited by overhead."""
_MEMORY = 0.9
"""Share of the device's memory that a larger batch may use."""


def compare(end_to_end: float, step: float, source: float, *, shared_cores: bool) -> dict[str, float]:
    """Compare end-to-end images/s with the slower of step and input.

    On a CPU, step and input share the cores: the best possible rate is 1 / (1 / step + 1 / input).
    """
    slower = min(step, source)
    found = {"slower_images_per_second": slower, "share_of_slower": end_to_end / slower}
    if shared_cores:
        both = 1 / (1 / step + 1 / source)
        found |= {"shared_images_per_second": both, "share_of_shared": end_to_end / both}
    return found


def judge(figures: dict[str, Any]) -> dict[str, str]:
    """Return `limit` (input, contention, overhead, arithmetic or memory bandwidth), `because` and a `suggestion`.

    A step's operations need the longer of their FLOP by the rate of a large product and their bytes by the rate of a
    copy (`simmim.hardware.roofline`): `expected_seconds`, of which `arithmetic_share` goes to those that FLOP limit.
    """
    step, source, whole = figures["step"], figures["input"], figures["end_to_end"]
    if source["images_per_second"] < step["images_per_second"]:
        because = (
            f"reading gives {source['images_per_second']:.3g} images/s, the step takes {step['images_per_second']:.3g}"
        )
        return {"limit": "input", "because": because, "suggestion": _read_faster(figures)}
    if figures["kind"] != "cpu" and whole["share_of_slower"] < _NEAR:
        because = f"together they reach {whole['share_of_slower']:.0%} of the step alone"
        fewer = max(source["workers"] // 2, 1)
        suggestion = f"--workers {fewer}: readers compete with the thread that feeds the accelerator"
        if _may_be_processes(figures):
            suggestion = (
                "--readers processes: reading threads contend for the GIL with the thread that feeds the accelerator"
            )
        return {"limit": "contention", "because": because, "suggestion": suggestion}
    times = step["seconds"] / step["expected_seconds"]
    if times > _SLACK:
        because = f"the step takes {times:.1f} times its roofline on this machine"
        return {"limit": "overhead", "because": because, "suggestion": _wait_less(figures)}
    share = step["arithmetic_share"]
    if share >= 0.5:
        because = f"matrix products take {share:.0%} of the step"
        return {"limit": "arithmetic", "because": because, "suggestion": _compute_less(figures)}
    because = f"memory-bound operations take {1 - share:.0%} of the step"
    return {"limit": "memory bandwidth", "because": because, "suggestion": _move_less(figures)}


def _read_faster(figures: dict[str, Any]) -> str:
    source, cores = figures["input"], figures["cores"]
    if source["workers"] < cores:
        return f"--workers {cores}: {source['workers']} of {cores} cores read now"
    short = round(1.3 * min(figures["image_size"]))
    pack = f"simmim pack {source['data']} --out SHARDS --short-side {short} --form"
    if source["stored"] == "files":
        return f"{pack} jpeg, or raw where disk is at hand, and --data SHARDS"
    if source["stored"] in ("original", "jpeg", "webp"):
        return f"{pack} raw: pixels need no decoding"
    if _may_be_processes(figures):
        return "--readers processes: threads contend for the GIL if images need no decoding"
    if figures["antialias"]:
        return "--no-antialias: a third less work, but fine patterns alias"
    return "more CPU cores: these images need no decoding, and every core reads"


def _may_be_processes(figures: dict[str, Any]) -> bool:
    return figures["readers"] == "threads" and figures["decode"] == "cpu"


def _wait_less(figures: dict[str, Any]) -> str:
    if figures["kind"] != "cpu" and not figures["compile"]:
        return "--compile: fewer and larger operations"
    batch, memory = figures["batch_size"], figures["step"]["memory_bytes"]
    if 2 * memory < _MEMORY * figures["memory_gib"] * 2**30:
        return f"--batch-size {2 * batch}: the same operations for more images, and memory suffices"
    return "profile the step: --profile FILE"


def _compute_less(figures: dict[str, Any]) -> str:
    if figures["precision"] == "fp32" and figures["has_bf16"]:
        return "--precision bf16: products are faster in it here"
    return "a smaller --model or --image-size, or another accelerator: simmim advise compares them"


def _move_less(figures: dict[str, Any]) -> str:
    if figures["precision"] == "fp32" and figures["has_bf16"]:
        return "--precision bf16: half the bytes"
    if not figures["compile"]:
        return "--compile: fused operations read and write less"
    return "a device of more bandwidth: simmim advise compares them"
