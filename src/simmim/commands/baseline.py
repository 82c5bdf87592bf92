"""`simmim baseline`: train a fine-tuned model from random weights too, so that its report tells what pretraining gave.

A baseline trains exactly as the fine-tuning did, but from random weights, without layer decay (which is for pretrained
layers) and at several learning rates. For a classifier, what needs no training is judged too: classifiers on the frozen
features that it began from, on raw pixels and on an untrained encoder.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from simmim.config.commands import BaselineConfig
from simmim.config.tasks import ClassifyConfig, FinetuneConfig
from simmim.engines import finetune
from simmim.errors import TrainingDivergedError, UserError
from simmim.output import say
from simmim.report.baselines import read_baselines, read_frozen, write_frozen
from simmim.report.facts import Facts
from simmim.report.labels import judge_by_labels
from simmim.report.page import ReportConfig, report
from simmim.report.verdict import Finding, judge_baselines
from simmim.training.loop import code_of_signal


def train_baselines(config: BaselineConfig) -> tuple[list[str], int]:
    """Train the baselines, or resume them, and write RUN/report.html.

    Returns lines that compare them with the run, and the exit code: 0, or that of a training which a signal or
    `max_hours` stopped. Processes of torchrun other than the first return no lines. Raises `UserError` for anything but
    a finished fine-tuning of a pretrained encoder.
    """
    facts, code, late = Facts.read(Path(config.run)), 0, None
    main = os.environ.get("RANK", "0") == "0"  # of torchrun
    for number, settings in enumerate(settings_of(config, facts), 1):
        if main:
            which = f"baseline {number} of {len(config.rates)}"
            say(f"{which}: random weights, learning rate {settings.batch_lr:.2e}")
        try:
            _, outcome = finetune(settings)
        except TrainingDivergedError as error:  # too high a rate is an answer too
            say(f"warning    {error}")
            continue
        late, more = outcome.late_signal, number < len(config.rates)
        if code := outcome.exit_code or (code_of_signal(late) if late and more else 0):
            break
    if not main:
        return [], code
    page = report(ReportConfig(runs=(config.run,)))
    if not code and not late and _judge_frozen(facts):
        page = report(ReportConfig(runs=(config.run,)))
    found = read_baselines(facts)
    lines = [*found.describe(), *map(_line, judge_baselines(found))] if found else []
    return [*lines, f"the report is {page}"], code


def _judge_frozen(facts: Facts) -> bool:
    """Judge the features that a classifier began from, unless that is done; return whether it was."""
    base, known = facts.config, read_frozen(facts)
    if not isinstance(base, ClassifyConfig) or (known and not any(each.flaw for each in known)):
        return False
    assert base.init is not None and base.data is not None
    same = ("frames", "labels_per_class", "label_seed", "val_fraction", "seed", "max_bad_fraction", "device", "workers")
    say("judging the frozen features")
    try:
        judged = judge_by_labels(base.init, base.data, **{name: getattr(base, name) for name in same})
    except (UserError, MemoryError, RuntimeError) as error:  # gone, or too large: the trainings count without
        say(f"warning    the frozen features are not judged: {str(error) or 'out of memory'}")
        return False
    write_frozen(facts, judged)
    return True


def _line(finding: Finding) -> str:
    return f"{finding.title}: {finding.figure}" + (f"; {finding.remedy}" if finding.remedy else "")


def settings_of(config: BaselineConfig, facts: Facts) -> Iterator[FinetuneConfig]:
    """Yield the configuration of each baseline. Raises `UserError` as `train_baselines` does."""
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
    assert base.lr is not None
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
            milestones=tuple(epoch * steps / total for epoch in base.milestones),
            extend=False,
            fresh=False,
        )
