"""This machine as an accelerator, from steps that `simmim bench --save-calibration` measured."""

import json
from pathlib import Path

from simmim.advise.kept_work import Measure
from simmim.config.pretraining import PretrainConfig
from simmim.errors import UserError
from simmim.hardware.accelerators import Accelerator
from simmim.hardware.roofline import Rates, fit_rates

OWN = "this-machine"


def read_own_machine(path: str, measure: Measure) -> tuple[Accelerator, Rates]:
    """Describe this machine as an accelerator, from steps measured by `simmim bench --save-calibration`.

    Uses the precision with the most measured steps. Raises `UserError` for too few steps.
    """
    try:
        steps = json.loads(Path(path).read_text(encoding="utf-8"))["steps"]
        precisions = [step["precision"] for step in steps]
        used = [step for step in steps if step["precision"] == max(set(precisions), key=precisions.count)]
        taken = [(step["batch_size"], step["step"]["seconds"]) for step in used]
        configs = [
            PretrainConfig(
                model=step["model"],
                image_size=tuple(step["image_size"]),
                device=step["kind"],
                precision=step["precision"],
                mean=(0.5,) * 3,
                std=(0.5,) * 3,
            )
            for step in used
        ]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"calibration {path} cannot be read; write one with simmim bench --save-calibration") from None
    rates = fit_rates([(measure(config), *what) for config, what in zip(configs, taken, strict=True)])
    row = Accelerator(
        name=OWN,
        title=used[0]["device"],
        device=used[0]["kind"],
        memory_gb=used[0]["memory_gib"],
        bandwidth_gb_s=rates.bandwidth / 1e9,
        tflops={configs[0].precision: rates.flops / 1e12},
        source=path,
    )
    return row, rates
