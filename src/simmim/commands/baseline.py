"""`simmim baseline`: train a fine-tuned model from random weights too, so that its report tells what pretraining gave.

A baseline trains exactly as the fine-tuning did, but from random weights, without layer decay (which is for pretrained
layers) and at several learning rates.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from simmim.config.commands import BaselineConfig
from simmim.config.tasks import FinetuneConfig
from simmim.engines import finetune
from simmim.errors import TrainingDivergedError, UserError
from simmim.output import say
from simmim.report.baselines import Gain, read_baselines
from simmim.report.facts import Facts
from simmim.report.page import ReportConfig, report
from simmim.report.verdict import judge_gain


def train_baselines(config: BaselineConfig) -> tuple[list[str], int]:
    """Train the baselines, or resume them, and write RUN/report.html.

    Returns lines that compare them with the run, and the exit code: 0, or that of a training which a signal or
    `max_hours` stopped. Processes of torchrun other than the first return no lines. Raises `UserError` for anything but
    a finished fine-tuning of a pretrained encoder.
    """
    facts = Facts.read(Path(config.run))
    main = os.environ.get("RANK", "0") == "0"  # of torchrun
    for number, settings in enumerate(_settings(config, facts), 1):
        if main:
            say(f"baseline {number} of {len(config.rates)}: random weights, --lr {settings.lr:g}")
        try:
            _, outcome = finetune(settings)
        except TrainingDivergedError as error:  # too high a rate is an answer too
            say(f"warning    {error}")
            continue
        if outcome.exit_code:
            return [], outcome.exit_code
    if not main:
        return [], 0
    page = report(ReportConfig(runs=(config.run,)))
    found = read_baselines(facts)
    lines = [*found.describe(), *map(_line, found.gains)] if found else []
    return [*lines, f"the report is {page}"], 0


def _line(gain: Gain) -> str:
    finding = judge_gain(gain)
    return f"{finding.title}: {finding.figure}" + (f"; {finding.remedy}" if finding.remedy else "")


def _settings(config: BaselineConfig, facts: Facts) -> Iterator[FinetuneConfig]:
    """Yield the configuration of each baseline."""
    run, base = facts.run, facts.config
    if not isinstance(base, FinetuneConfig):
        raise UserError(f"{run.path} is a pretraining; give a fine-tuning that began from it")
    if base.init == "scratch":
        raise UserError(f"{run.path} began from random weights itself; give a fine-tuning of a pretrained encoder")
    total = facts.total_steps
    if not facts.kept or total is None or facts.steps < total:
        raise UserError(
            f"{run.path} is not finished, at step {facts.steps} of {total or '?'}; run simmim resume {run.path} first"
        )
    steps = max(1, round(total * config.longer))
    for rate in config.rates:
        lr = base.lr * rate
        yield dataclasses.replace(
            base,
            init="scratch",
            out=str(run.baselines / f"lr-{lr:g}-steps-{steps}"),
            lr=lr,
            layer_decay=1.0,
            steps=steps,
            warmup_epochs=base.warmup_epochs and base.warmup_epochs * steps / total,
            extend=False,
            fresh=False,
        )
