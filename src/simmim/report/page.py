"""Write a report: one HTML file that needs nothing else."""

import functools
import os
import platform
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field
from tyro.conf import Positional, arg

from simmim.config.field_types import HINT, PositiveReal, Word, one_word
from simmim.config.frames import FRAMES
from simmim.config.validation import from_settings
from simmim.data.sources import open_source
from simmim.errors import UserError
from simmim.output import say
from simmim.report.baselines import Baselines, read_baselines
from simmim.report.charts import Chart, chart
from simmim.report.evaluation import FIGURE_NAMES, Evaluation, compare_classes, read_evaluation
from simmim.report.facts import Facts, Point
from simmim.report.gallery import Gallery, make_gallery
from simmim.report.labels import Difference, Judged, difference, judge_by_labels
from simmim.report.pictures import Panel, panels
from simmim.report.resources import taken
from simmim.report.verdict import Finding, judge
from simmim.training.run_lock import is_locked
from simmim.training.whole_files import written_whole

_CHARTS = (
    ("Loss", ("loss",), True),
    ("Loss of images kept aside", ("val_loss",), True),
    ("k-NN accuracy", ("knn_top1", "knn_balanced_accuracy", "knn_raw_pixels"), False),
    ("Accuracy", ("top1", "balanced_accuracy", "miou", "pixel_accuracy", "map", "map50"), False),
    ("Effective rank", ("effective_rank",), False),
    ("Deviation of features", ("feature_std",), False),
    ("Gradient norm", ("grad_norm",), True),
    ("Learning rate", ("lr",), False),
    ("Images per second", ("images_per_second",), False),
    ("Share of the time waiting for images", ("input_wait",), False),
    ("Peak memory, GiB", ("device_memory_gib", "process_memory_gib"), False),
)
_NAMES = {
    "knn_top1": "k-NN",
    "knn_balanced_accuracy": "k-NN, balanced over classes",
    "knn_raw_pixels": "k-NN of raw pixels",
    **{name: FIGURE_NAMES[name] for name in ("top1", "balanced_accuracy", "miou", "pixel_accuracy", "map", "map50")},
    "val_loss": "images kept aside",
    "lr": "of the step",
    "grad_norm": "before clipping",
    "images_per_second": "images per second",
    "input_wait": "share",
    "effective_rank": "effective rank",
    "feature_std": "deviation",
    "device_memory_gib": "tensors on the device",
    "process_memory_gib": "the process",
}
_FIGURES = {"loss": "training loss (last tenth)", "val_loss": "loss of images kept aside"}
_JUDGED_BY = ("objectives", "target", "loss", "mask", "data")
"""Settings without which figures of two runs are not of the same thing."""
_BYTES = 5_000_000
_FRAME, _LEAST = 100_000, 100_000  # style and script; curves and settings of a run


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """A report of one run, or of several side by side."""

    command: ClassVar[str] = "report"
    runs: Positional[Annotated[tuple[str, ...], arg(metavar="RUN...")]]
    """The --out directories of runs."""
    out: Word = None
    """HTML file to write (default: report.html in the run, or here for several)."""
    labels: Word = None
    """Labelled images to judge the features of pretrainings by, as simmim probe takes them."""
    data: Word = None
    """Images to show pretrainings by: neighbours, a map, likely duplicates. Takes what pretraining's --data does."""
    images: Annotated[int, Field(ge=2, le=4000)] = 1000
    """Images of --data to take, at most."""
    price_per_hour: Annotated[PositiveReal | None, one_word(float, "FLOAT"), HINT] = None
    """Price of the machine in USD an hour (default: that of a GPU which simmim advise knows)."""


@dataclass(frozen=True)
class Section:
    """What the page shows of one run."""

    facts: Facts
    findings: list[Finding]
    judged: list[Judged]
    charts: list[Chart]
    panels: list[Panel]
    feature_panels: list[Panel]
    gallery: Gallery | None
    evaluation: Evaluation | str | None
    """Of a fine-tuning; or why it is not there."""
    baselines: Baselines | None
    """Of a fine-tuning that has some."""
    about: dict[str, str]


def report(config: ReportConfig, *, running: bool = False) -> Path:
    """Write the report; return its path. Raises `UserError` for a directory that is not a run, or a bad `--out`.

    `running` says that the training goes on.
    """
    config = from_settings(ReportConfig, vars(config))
    if not config.runs:
        raise UserError("report names no run; give the --out directory of a training")
    every = [Facts.read(Path(run), running=running or is_locked(Path(run))) for run in config.runs]
    _check(config, every)
    alone = every[0].run.path / "report.html" if len(every) == 1 else Path("report.html")
    out = Path(config.out) if config.out else alone
    if out.suffix.lower() != ".html":
        raise UserError(f"--out {out} is not an .html file; name one")
    budget = (_BYTES - _FRAME) // len(every)
    if budget < _LEAST:
        most = (_BYTES - _FRAME) // _LEAST
        raise UserError(f"{len(every)} runs are too many for a report of {_BYTES:,} bytes; give {most} at most")
    sections = [section(facts, config, budget) for facts in every]
    text = render(sections, unique_names(every))
    size = len(text.encode(errors="backslashreplace"))
    if size > _BYTES:
        raise UserError(
            f"a report of {size:,} bytes is over the limit of {_BYTES:,}; lower --images, or give fewer runs"
        )
    with written_whole(out) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")  # names that are not UTF-8
    return out


def _check(config: ReportConfig, every: Sequence[Facts]) -> None:
    """Raise `UserError` for images or labels that cannot be read or used, before any work."""
    for option, given in (("--labels", config.labels), ("--data", config.data)):
        if given and not any(facts.task == "pretraining" for facts in every):
            raise UserError(f"{option} is for pretrainings; a fine-tuning's page has figures of its own: leave it out")
    if config.data:
        open_source(config.data)


def section(facts: Facts, config: ReportConfig, budget: int = _BYTES) -> Section:
    """Return what the page shows of a run; pictures take at most `budget` bytes, less what its curves need."""
    run = str(facts.run.path)
    encoder = facts.task == "pretraining"  # a fine-tuned model has no frozen features to judge
    if config.labels and encoder:
        say(f"judging {run} by {config.labels}")
    judged = judge_by_labels(run, config.labels) if config.labels and encoder else []
    spare = budget - _LEAST
    pictured, features = (
        panels(path, len(config.runs), most_bytes=spare // (5 if config.data else 2))
        for path in (facts.run.reconstructions, facts.run.feature_pictures)
    )
    spare -= sum(len(panel.uri) for panel in (*pictured, *features))
    if config.data and encoder:
        say(f"comparing images of {config.data} by {run}")
    gallery = None
    if config.data and encoder:
        frames = getattr(facts.config, "frames", FRAMES)
        gallery = make_gallery(run, config.data, most=config.images, most_bytes=spare, frames=frames)
    baselines = None if encoder else read_baselines(facts)
    charts = [drawn for title, names, log in _CHARTS if (drawn := chart(title, _curves(facts, names), logarithmic=log))]
    return Section(
        facts=facts,
        findings=judge(facts, judged, baselines),
        judged=judged,
        charts=charts,
        panels=pictured,
        feature_panels=features,
        gallery=gallery,
        evaluation=read_evaluation(facts),
        baselines=baselines,
        about=dict(about(facts, config.price_per_hour)),
    )


def _curves(facts: Facts, names: Sequence[str]) -> list[tuple[str, list[Point]]]:
    """Return the curves of a chart; a loss comes with its components."""
    if names == ("loss",):
        parts = [name for name in facts.series if name.startswith("loss/")]
        names = ("loss", *(parts if len(parts) > 1 else ()))
    return [(_NAMES.get(name, name.removeprefix("loss/")), facts.series.get(name, [])) for name in names]


def about(facts: Facts, price_per_hour: float | None = None) -> Iterator[tuple[str, str]]:
    """Yield lines about a run: how it was made, how far it is, what it took."""
    config = facts.config
    done = f"{facts.steps:,}" + (f" of {facts.total_steps:,}" if facts.total_steps else "")
    yield "Task", facts.task
    yield "Model", getattr(config, "model", None) or getattr(config, "init", None) or ""
    if objectives := getattr(config, "objectives", ()):
        yield "Objective", ", ".join(f"{each.weight:g} × {each.kind}" for each in objectives)
    yield "Steps", f"{done} of {config.batch_size} images"
    yield from taken(facts, price_per_hour)
    yield "Steps not finite", str(facts.not_finite)
    yield "Data", str(config.data)
    for part, record in facts.images.items():
        yield f"Images, {part}", f"{record['images']:,}; names SHA-256 {record['names_sha256'][:16]}…"
    yield "Unreadable images", str(facts.bad_images) + (" (bad_images.txt lists them)" if facts.bad_images else "")
    named = ", then ".join(name if devices == 1 else f"{devices} × {name}" for name, devices in facts.hardware)
    yield "Device", f"{config.device}{f' ({named})' if named else ''}, {config.precision}"
    command = "pretrain" if facts.task == "pretraining" else f"finetune {facts.task}"
    yield "Repeat it", f"simmim {command} --config {shlex.quote(str(facts.run.config))} --out NEW"
    yield "Encoder", str(facts.run.encoder if facts.task == "pretraining" else facts.run.model)
    yield "Written by", f"simmim {_version('simmim')}, torch {_version('torch')}, {platform.platform()}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a source tree
        return "of a source tree"


def unique_names(every: Sequence[Facts]) -> list[str]:
    """Return the shortest ends of the runs' paths that tell them apart."""
    paths = [facts.run.path.resolve() for facts in every]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = [os.path.join(*path.parts[-length:]) for path in paths]  # noqa: PTH118
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def comparison(sections: Sequence[Section], names: Sequence[str]) -> dict[str, Any]:
    """Return what several runs differ in, their figures, the best first, and their curves in one chart each."""
    settings = [each.facts.settings() for each in sections]
    keys = dict.fromkeys(key for found in settings for key in found)
    differing = {key: [found.get(key, "") for found in settings] for key in keys}
    differing = {key: values for key, values in differing.items() if len(set(values)) > 1}
    figures = ("knn_top1", "top1", "miou", "map", "val_loss", "loss")
    shared = [name for name in figures if any(each.facts.figure(name) is not None for each in sections)]
    drawn = [
        chart(title, [(name, each.facts.series.get(_first(names_, sections), [])) for name, each in
                      zip(names, sections, strict=True)], logarithmic=log)
        for title, names_, log in _CHARTS
    ]  # fmt: skip
    return {
        "differences": differences(sections, names),
        "differing": differing,
        "figures": [
            (_FIGURES.get(name) or _NAMES.get(name, name), [each.facts.figure(name) for each in sections])
            for name in shared
        ],
        "kept": any(each.facts.kept for each in sections),
        "classes": compare_classes([each.evaluation for each in sections]),
        "order": _order(sections, shared),
        "charts": [each for each in drawn if each],
    }


def differences(
    sections: Sequence[Section], names: Sequence[str]
) -> tuple[str, list[tuple[str, list[tuple[str, Difference | None]]]]] | None:
    """Return the first run that was judged by labels, and how each other one differs from it by each method.

    `None` where fewer than two were judged.
    """
    (first, base), *others = [(i, each.judged) for i, each in enumerate(sections) if each.judged] or [(0, [])]
    if not others:
        return None
    rows = [
        (names[i], [(mine.method, mine.against(other)) for mine, other in zip(judged, base, strict=True)])
        for i, judged in others
    ]
    return names[first], rows


def _first(names: Sequence[str], sections: Sequence[Section]) -> str:
    """Return the first of a chart's figures that any run has."""
    return next((name for name in names if any(name in each.facts.series for each in sections)), names[0])


def _order(sections: Sequence[Section], shared: Sequence[str]) -> list[int]:
    """Return the runs' numbers, the best first where all were trained for the same; else as they were given."""
    numbers = list(range(len(sections)))
    trained_for = {
        (each.facts.task, *(str(getattr(each.facts.config, name, "")) for name in _JUDGED_BY)) for each in sections
    }
    name = next((name for name in shared if all(each.facts.figure(name) is not None for each in sections)), None)
    if len(trained_for) > 1 or name is None:
        return numbers
    sign = 1 if name.endswith("loss") else -1
    return sorted(numbers, key=lambda i: sign * (sections[i].facts.figure(name) or 0))


def render(sections: Sequence[Section], names: Sequence[str]) -> str:
    """Return the page."""
    files = resources.files("simmim.report")
    return _template().render(
        sections=sections,
        names=names,
        difference=difference,
        comparison=comparison(sections, names) if len(sections) > 1 else None,
        style=(files / "page.css").read_text(encoding="utf-8"),
        script=(files / "page.js").read_text(encoding="utf-8"),
        date=time.strftime("%Y-%m-%d %H:%M"),
    )


@functools.cache
def _template() -> Any:
    """Compile the page once for a process, since that takes longer than to write a page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("simmim.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html")
