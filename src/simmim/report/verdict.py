"""Judge a run by stated rules: each finding has the figure that it stands on, and the remedy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from simmim.method.collapse import LEAST_RANK, LEAST_STD, collapsed
from simmim.report.facts import Facts, best, part_mean
from simmim.report.labels import Judged

_NOT_FINITE = 0.1  # of all steps
_LEARNT = 0.02  # of the first loss
_STILL_FALLING = 0.02  # of the whole fall, in the last tenth
_OVER = 0.02  # of an accuracy, or of a loss as a share

Level = Literal["bad", "watch", "good"]


@dataclass(frozen=True)
class Finding:
    """What was found, why it is said, and what to do about it."""

    level: Level
    title: str
    figure: str
    remedy: str = ""


def judge(facts: Facts, judged: Sequence[Judged] = ()) -> list[Finding]:
    """Return findings, the gravest first: of the training, then of its features."""
    found = [*_training(facts), *_features(facts, judged)]
    order: list[Level] = ["bad", "watch", "good"]
    return sorted(found, key=lambda finding: order.index(finding.level))


def _training(facts: Facts) -> Iterator[Finding]:
    loss = facts.series.get("loss")
    if not loss:
        yield Finding("watch", "Nothing is logged yet", "metrics.jsonl holds no loss", "wait for the first steps")
        return
    skipped = facts.not_finite / max(facts.steps, 1)
    if skipped > _NOT_FINITE:
        yield Finding(
            "bad",
            "Diverged",
            f"{skipped:.0%} of the steps had a loss or gradient that was not finite",
            "start again with a lower --lr, or --precision fp32",
        )
    first, last = part_mean(loss, 0, 0.02), part_mean(loss, 0.9, 1)
    before = part_mean(loss, 0.8, 0.9)
    fall = first - last
    figure = f"loss {first:.4f} at the start, {last:.4f} in the last tenth"
    unfinished = facts.total_steps is not None and facts.steps < facts.total_steps
    if last > first * 1.05:
        yield Finding("bad", "The loss rose", figure, "start again with a lower --lr")
    elif fall < _LEARNT * abs(first):
        yield Finding("bad", "Learnt nothing", figure, "raise --lr or the number of steps; look at the data")
    elif before - last > _STILL_FALLING * fall:
        share = (before - last) / fall
        remedy = "" if unfinished else "train longer: more --epochs, in a new --out"
        yield Finding("watch", "Still falling", f"{figure}; that tenth brought {share:.0%} of the fall", remedy)
    else:
        yield Finding("good", "Converged", f"{figure}; that tenth brought less than {_STILL_FALLING:.0%} of the fall")
    if unfinished:
        done = f"step {facts.steps} of {facts.total_steps}"
        yield Finding("watch", "Not finished", done, "repeat its command to resume")
    if (held := facts.series.get("val_loss")) and held[-1][1] > best(held, min)[1] * (1 + _OVER):
        step, least = best(held, min)
        figure = f"the loss of images kept aside was {least:.4f} at step {step} and is {held[-1][1]:.4f}"
        yield Finding("watch", "Over-trained", figure, f"stop near step {step}, or train on more images")


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
            yield _against("raw pixels", accuracies[-1][1], pixels, margin=0.0, method="k-NN")
    if facts.task == "pretraining" and not judged and not facts.series.get("knn_top1"):
        yield Finding(
            "watch", "Features not judged", "no labelled images were given", "add --labels LABELLED to simmim report"
        )
    for each in judged:
        for name, floor in each.floors.items():
            yield _against(name, each.features.value, floor.value, each.margin(floor), method=each.method)


def _against(name: str, features: float, floor: float, margin: float, method: str) -> Finding:
    """Compare features with a floor; `margin` is what chance may make of the difference."""
    figure = f"{method} accuracy {features:.3f}, {name} {floor:.3f}"
    if features - floor > margin:
        return Finding("good", f"Better than {name}", figure)
    if floor - features > margin or not margin:
        return Finding(
            "bad",
            f"No better than {name}",
            figure,
            "train longer, on more images, or by --recipe default-small; fine-tune rather than use the features",
        )
    within = f"{figure}; the difference is within chance ({margin:.3f})"
    return Finding("watch", f"Not clearly better than {name}", within, "judge by more labelled images")
