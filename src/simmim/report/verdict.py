"""Judge a run by stated rules: each finding has the figure that it stands on, and the remedy."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from simmim.method.collapse import LEAST_RANK, LEAST_STD, collapsed
from simmim.report.baselines import Baselines, Gain
from simmim.report.facts import Facts, Point, best, part_mean
from simmim.report.labels import Judged, difference
from simmim.report.resources import input_wait
from simmim.training.origins import is_timms

_NOT_FINITE, _AT_THE_END = 0.1, 5  # of all steps; steps in a row at the end
_FEWEST = 20  # logged steps
_START, _END = (0, 0.02), (0.9, 1)  # of the curve
_DIVERGED, _UNSTABLE = 2, 3  # times the first loss: at the end, in between
_LEARNT = 0.02  # of the first loss
_ENDED, _FEW_PASSES = 0.05, 20  # of the peak rate; passes over the images
_STILL_FALLING = 0.05  # of the whole fall, in the second half
_OVER = 0.02  # of an accuracy, or of a loss as a share
_WAITS = 0.2  # of the time
_MOVING = ("ema", "clusters", "infonce")
"""Objectives whose target moves with the encoder, so that their loss may well rise."""

Level = Literal["bad", "watch", "good", "note"]


@dataclass(frozen=True)
class Finding:
    """What was found, why it is said, and what to do about it."""

    level: Level
    title: str
    figure: str
    remedy: str = ""


def judge(facts: Facts, judged: Sequence[Judged] = (), baselines: Baselines | None = None) -> list[Finding]:
    """Return findings, the gravest first: of the training, of its speed, of its features, of its baselines."""
    found = [*_training(facts), *_speed(facts), *_features(facts, judged)]
    if baselines is not None:
        found += judge_baselines(baselines)
    order: list[Level] = ["bad", "watch", "good", "note"]
    return sorted(found, key=lambda finding: order.index(finding.level))


def _training(facts: Facts) -> Iterator[Finding]:
    loss = facts.series.get("loss", [])
    skipped = facts.not_finite / max(facts.steps, facts.not_finite, 1)
    first, last = (part_mean(loss, *part) for part in (_START, _END)) if loss else (0.0, 0.0)
    moving = _moving(facts)
    diverged = skipped > _NOT_FINITE or facts.ends_not_finite >= _AT_THE_END
    risen = len(loss) >= _FEWEST and not moving and last > _DIVERGED * abs(first)
    unfinished = facts.total_steps is not None and facts.steps < facts.total_steps
    if diverged:
        figure = f"{skipped:.0%} of the steps had a loss or gradient that was not finite"
        if facts.ends_not_finite:
            figure += f", the last {facts.ends_not_finite} among them"
        remedy = "start again (--fresh) with a lower --lr, or --precision fp32"
        yield Finding("bad", "Diverged", figure, remedy)
    elif risen:
        figure = f"loss {first:.4f} at the start, {last:.4f} in the last tenth"
        yield Finding("bad", "Diverged", figure, "start again (--fresh) with a lower --lr")
    elif not loss:
        yield Finding("watch", "Nothing is logged yet", "metrics.jsonl holds no loss", "wait for the first steps")
    else:
        yield _of_loss(facts, loss, unfinished)
    if unfinished and loss and not (diverged or risen):
        done = f"step {facts.steps} of {facts.total_steps}"
        if facts.running:
            yield Finding("note", "Not finished", f"{done} when this was written, and the training went on")
        else:
            yield Finding("watch", "Not finished", done, f"go on by simmim resume {shlex.quote(str(facts.run.path))}")
    # A classifier's may rise, and a loss whose target moves says nothing.
    held = facts.series.get("val_loss") if facts.task == "pretraining" and not moving else None
    if held and held[-1][1] > best(held, min)[1] * (1 + _OVER):
        step, least = best(held, min)
        figure = f"the loss of images kept aside was {least:.4f} at step {step} and is {held[-1][1]:.4f}"
        yield Finding("watch", "Over-trained", figure, f"stop near step {step}, or train on more images")


def _moving(facts: Facts) -> list[str]:
    """Name the objectives whose target moves."""
    return [each.kind for each in getattr(facts.config, "objectives", ()) if each.kind in _MOVING]


def _of_loss(facts: Facts, loss: Sequence[Point], unfinished: bool) -> Finding:
    """Judge the curve of the loss."""
    rates = facts.series.get("lr", [])
    warming = unfinished and bool(rates) and best(rates, max)[0] == rates[-1][0]
    if len(loss) < _FEWEST or warming:
        why = "the learning rate still rises" if warming else f"{len(loss)} steps are logged, of {_FEWEST} at least"
        return Finding("watch", "Too early to say", why)
    if moving := _moving(facts):
        figure = f"the target of {', '.join(moving)} moves with the encoder, so that the loss says little"
        return Finding("note", "Loss not judged", figure, "look at the effective rank, or use --probe")
    first, middle, last = (part_mean(loss, *part) for part in (_START, (0.4, 0.6), _END))
    fall, figure = first - last, f"loss {first:.4f} at the start, {last:.4f} in the last tenth"
    peak = max(part_mean(loss, part / 50, (part + 1) / 50) for part in range(50))
    if peak > _UNSTABLE * abs(first):
        figure += f", {peak:.4f} in between"
        return Finding("bad", "Unstable", figure, "start again (--fresh) with a lower --lr")
    if last > first * 1.05:
        return Finding("bad", "The loss rose", figure, "start again with a lower --lr")
    if fall <= _LEARNT * abs(first):
        return Finding("bad", "Learnt nothing", figure, "raise --lr or the number of steps; look at the data")
    share = f"its second half brought {max(middle - last, 0) / fall:.0%} of the fall"
    if middle - last > _STILL_FALLING * fall:
        remedy = "" if unfinished else "train longer: more --epochs, in a new --out"
        return Finding("watch", "Still falling", f"{figure}; {share}", remedy)
    # A rate that falls to 0 flattens any curve: of a short run that says nothing.
    if facts.task == "pretraining" and rates and rates[-1][1] < _ENDED * best(rates, max)[1]:
        passes = facts.last("epoch") or 0.0
        if passes < _FEW_PASSES:
            why = f"{figure}; it levelled off as the learning rate fell to 0, after {passes:.3g} passes over the images"
            return Finding("watch", "Levelled off early", why, "try more --epochs, in a new --out")
    return Finding("good", "Converged", f"{figure}; {share}")


def _speed(facts: Facts) -> Iterator[Finding]:
    waits = input_wait(facts)
    if waits is None or waits <= _WAITS or len(facts.series.get("loss", [])) < _FEWEST:
        return
    remedies = [f"raise --workers above {facts.config.workers or 1}"]
    if getattr(facts.config, "readers", None) == "threads" and getattr(facts.config, "decode", None) == "cpu":
        remedies.append("try --readers processes")
    remedies.append("pack the images (simmim pack)")
    figure = f"the training waited for images in {waits:.0%} of its time (median)"
    yield Finding("watch", "Slowed down by reading images", figure, f"{', '.join(remedies[:-1])}, or {remedies[-1]}")


def _features(facts: Facts, judged: Sequence[Judged]) -> Iterator[Finding]:
    std, rank = facts.last("feature_std"), facts.last("effective_rank")
    if std is not None and rank is not None and collapsed(std, rank):
        yield Finding(
            "bad",
            "Features collapsed",
            f"effective rank {rank:.1f} (limit {LEAST_RANK:g}), deviation {std:.3f} of 1 (limit {LEAST_STD:g})",
            "start again with a lower --lr, or add --objective descriptor=1",
        )
    if accuracies := facts.series.get("knn_top1"):
        step, most = best(accuracies, max)
        if most - accuracies[-1][1] > _OVER:
            figure = f"k-NN accuracy was {most:.3f} at step {step} and is {accuracies[-1][1]:.3f}"
            yield Finding("watch", "Over-trained", figure, f"stop near step {step}")
        if (pixels := facts.last("knn_raw_pixels")) is not None and not judged:
            apart = accuracies[-1][1] - pixels  # of how many images is not logged; none is "no better"
            yield _against("raw pixels", accuracies[-1][1], pixels, (apart, apart or -1.0), method="k-NN")
    if facts.task == "pretraining" and not judged and not facts.series.get("knn_top1"):
        yield Finding(
            "note", "Features not judged", "no labelled images were given", "add --labels LABELLED to simmim report"
        )
    for each in judged:
        for name, floor in each.floors.items():
            interval = difference(each.features, floor)[1:]
            yield _against(name, each.features.value, floor.value, interval, method=each.method)
    if judged and judged[0].missing:
        yield Finding("note", "Starting weights not judged", judged[0].missing)


def _against(name: str, features: float, floor: float, interval: tuple[float, float], method: str) -> Finding:
    """Compare features with a floor; `interval` holds their difference, as far as the images can tell."""
    figure = f"{method} accuracy {features:.3f}, {name} {floor:.3f}"
    low, high = interval
    if low > 0:
        return Finding("good", f"Better than {name}", figure)
    if high < 0:
        return Finding(
            "bad",
            f"No better than {name}",
            figure,
            "train longer, on more images, or by --recipe default-small; fine-tune rather than use the features",
        )
    within = f"{figure}; the difference is within chance ({low:+.3f} to {high:+.3f})"
    return Finding("watch", f"Not clearly better than {name}", within, "judge by more labelled images")


def judge_baselines(baselines: Baselines) -> Iterator[Finding]:
    """Compare a fine-tuning with training from scratch, and with its encoder's features as they are."""
    yield from map(judge_gain, baselines.gains)
    if baselines.over_frozen:
        mine, other = baselines.over_frozen
        apart = difference(mine, other.accuracy)
        figure = f"top-1 {mine.value:.3f}, {other.name} {other.accuracy.value:.3f}: {apart.text}"
        name, more = "the frozen features", "fine-tune for more steps, or at another --lr"
        if apart.low > 0:
            yield Finding("good", f"Better than {name}", figure)
        elif apart.high < 0:
            config = baselines.run.config
            assert config.init is not None and config.data is not None
            command = (
                f"simmim probe {shlex.quote(config.init)} --data {shlex.quote(config.data)} --method linear --out DIR"
            )
            keep = "use these" if is_timms(config.init) else f"keep a classifier of these: {command}"
            yield Finding("bad", f"Worse than {name}", figure, f"{more}, or {keep}")
        else:
            yield Finding("watch", f"Not clearly better than {name}", figure, f"{more}, or evaluate on more images")


def judge_gain(gain: Gain) -> Finding:
    """Compare a fine-tuning with its best baseline. Another seed can differ by more than the interval says."""
    name, seeds = gain.other_name, "repeat with other --seed"
    search = [gain.search] if gain.search else []
    if gain.difference is None:
        if gain.mine > gain.other:
            return Finding("note", f"Ahead of {name}", gain.figure, "; ".join([seeds, *search]))
        return Finding("watch", f"Not ahead of {name}", gain.figure, f"{seeds}, or pretrain longer or on more images")
    if gain.difference.low > 0:
        return Finding("good", f"Better than {name}", gain.figure, *search)
    if gain.difference.high < 0:
        more = "pretrain longer or on more images, or train from scratch"
        return Finding("bad", f"Worse than {name}", gain.figure, more)
    remedy = f"evaluate on more images, {seeds}, or pretrain longer"
    return Finding("watch", f"Not clearly better than {name}", gain.figure, remedy)
