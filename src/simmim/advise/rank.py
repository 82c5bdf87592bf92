"""`simmim advise`: the ways to do a training, ranked, and what would make it cheaper.

`simmim.advise.estimate` finds what each way takes; here they are chosen among, explained and shown.
"""

import dataclasses
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from simmim.advise.estimate import Measure, Study, config_of
from simmim.advise.request import Option, Wish
from simmim.commands.tpu_check import TpuCheckConfig, memory_line, tpu_check
from simmim.config.training import from_settings
from simmim.errors import UserError
from simmim.hardware.accelerators import read_facts
from simmim.hardware.tpu_compiler import CompilerReport


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The answer: options from the best on, and in words what was assumed and what would be cheaper."""

    wish: Wish
    work: dict[str, Any]
    options: list[Option]
    left_out: dict[str, str]
    """Accelerators that are no option, and why."""
    hints: list[str]
    compiled: dict[str, CompilerReport] = dataclasses.field(default_factory=dict)
    """What the TPU compiler says of an option's step, by accelerator; see `compile_for_tpus`."""

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


def advise(wish: Wish, measure: Measure | None = None) -> Advice:
    """Options ranked by cost under the deadline, or by time under the budget. One-line `ValueError` where none is left.

    `measure` finds a step's work; by default it runs the real model without data.
    """
    wish = from_settings(Wish, vars(wish))
    study = Study(wish, measure)
    found, left_out = [], {}
    for row in study.rows.values():
        options = [option for devices in study.counts(row) if (option := study.option(row, devices))]
        found += options
        if not options:
            left_out[row.name] = study.why_not(row)
    if not found:
        raise UserError(study.nothing_fits(left_out))
    allowed = [option for option in found if _allowed(option, wish)]
    if not allowed:
        raise UserError(_too_dear(found, wish))
    best: dict[str, Option] = {}
    for option in sorted(allowed, key=lambda option: _rank(option, wish)):
        best.setdefault(option.accelerator, option)
    for row in study.rows.values():
        if row.name not in best and row.name not in left_out:
            usd = row.spot if wish.spot else row.price
            unknown = wish.budget is not None and usd is None
            left_out[row.name] = "price not known: give --price NAME=USD" if unknown else "over budget or deadline"
    ranked = list(best.values())[: wish.top]
    return Advice(
        wish=wish, work=study.describe(), options=ranked, left_out=left_out, hints=_hints(ranked[0], found, study)
    )


def compile_for_tpus(advice: Advice, say: Callable[[str], None] = lambda line: None) -> Advice:
    """The advice with the TPU compiler's report on the step of every option that is a TPU; `say` hears of each.

    Of the kinds whose chip is one device; the gradient exchange is not in it. One-line `ValueError` where there is none
    of them, or where this machine cannot compile.
    """
    wish, reports = advice.wish, {}
    facts = read_facts(wish.accelerators).accelerators
    topologies = {name: row.topology for name, row in facts.items() if row.topology}
    for option in advice.options:
        if option.accelerator in topologies:
            config = TpuCheckConfig(
                **vars(config_of(wish))
                | {
                    "topology": topologies[option.accelerator],
                    "batch_size": option.images_at_a_time * option.accumulate_steps,
                    "accumulate_steps": option.accumulate_steps,
                    "precision": option.precision,
                    "checkpoint_activations": option.checkpoint_activations,
                }
            )
            reports[option.accelerator] = tpu_check(config, say)
    if not reports:
        raise UserError(
            f"--tpu-check finds no {' or '.join(topologies)} among the options; ask for them by --accelerator"
        )
    return dataclasses.replace(advice, compiled=reports)


def _allowed(option: Option, wish: Wish) -> bool:
    if wish.deadline is not None and option.hours[1] > wish.deadline:
        return False
    return wish.budget is None or (option.usd is not None and option.usd[1] <= wish.budget)


def _rank(option: Option, wish: Wish) -> tuple[float, ...]:
    """By time under a budget alone, else by cost in steps of 5 % and then by time; what has no price comes last."""
    if wish.budget is not None and wish.deadline is None:
        return (option.hours[1],)
    if option.usd is None:
        return (math.inf, option.hours[1])
    free = option.usd[1] == 0
    return (-math.inf if free else round(math.log(option.usd[1]) / math.log(1.05)), option.hours[1])


def _too_dear(found: Sequence[Option], wish: Wish) -> str:
    """One line: the wish, and the nearest that is possible."""
    priced = [option for option in found if option.usd is not None]
    if wish.budget is not None and not priced:
        return f"budget {wish.budget:g} USD cannot be judged: no price is known; give --price NAME=USD"
    if wish.budget is not None and all(option.usd and option.usd[1] > wish.budget for option in priced):
        near = min(priced, key=lambda option: option.usd[1] if option.usd else math.inf)
        assert near.usd is not None
        epochs = wish.epochs * wish.budget / near.usd[1]
        return (
            f"budget {wish.budget:g} USD is too little: the cheapest way costs about {near.usd[1]:.3g} USD "
            f"({near.devices} × {near.accelerator}, {near.hours[1]:.3g} h); raise it, or train {epochs:.2g} epochs"
        )
    under = [option for option in found if wish.budget is None or (option.usd and option.usd[1] <= wish.budget)]
    near = min(under, key=lambda option: option.hours[1])
    return (
        f"deadline {wish.deadline:g} h cannot be met: the fastest way takes about {near.hours[1]:.3g} h "
        f"({near.devices} × {near.accelerator}); give it longer, more --devices or a larger budget"
    )


def _hints(best: Option, found: Sequence[Option], study: Study) -> list[str]:
    """What would make it cheaper, and what would stand in the way."""
    wish, row, hints = study.wish, study.rows[best.accelerator], []
    if best.usd is not None:
        if not wish.spot and row.spot is not None and row.price and row.spot < row.price:
            hints.append(f"--spot: about {best.usd[1] * row.spot / row.price:.3g} USD instead of {best.usd[1]:.3g}")
        cheaper = [option for option in found if option.usd and option.usd[1] < 0.9 * best.usd[1]]
        if cheaper:
            slow = min(cheaper, key=lambda option: option.usd[1] if option.usd else math.inf)
            assert slow.usd is not None
            hints.append(f"{slow.hours[1]:.3g} h on {slow.devices} × {slow.accelerator}: about {slow.usd[1]:.3g} USD")
        if wish.epochs > 100:
            hints.append(f"--epochs 100: about {best.usd[1] * 100 / wish.epochs:.3g} USD")
    if study.config.image_size == (224, 224) and best.limit != "reading images":
        hints.append("--image-size 192: about 0.73 of the time for a ViT or a convolutional net, by the area")
    if study.cores(row) is None and best.input_cores > 4 * best.devices:
        hints.append(f"reading as fast takes {best.input_cores:.0f} CPU cores; say --cores if a device has fewer")
    return hints


def show(advice: Advice) -> str:
    """The advice as a person reads it."""
    from rich.console import Console
    from rich.table import Table

    work, wish = advice.work, advice.wish
    size = "x".join(map(str, work["image_size"]))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("option", "hours", "USD", "images/s", "GiB", "at a time", "limit", "CPU cores"):
        table.add_column(name, justify="left" if name in ("option", "limit") else "right")
    for number, option in enumerate(advice.options, 1):
        extras = [
            option.precision,
            "checkpointing" if option.checkpoint_activations else "",
            "sharded" if option.shard else "",
        ]
        table.add_row(
            f"{number}. {option.devices} × {option.accelerator}, {', '.join(filter(None, extras))}",
            _spread(option.hours),
            "not known" if option.usd is None else _spread(option.usd),
            f"{option.images_per_second:.0f}",
            f"{option.memory_gib:.1f}",
            f"{option.images_at_a_time} × {option.accumulate_steps}",
            option.limit,
            f"{option.input_cores:.1f}",
        )
    console = Console(file=io.StringIO(), width=140)
    console.print(
        f"{work['model']} at {size}: {work['parameters'] / 1e6:.1f} M parameters, "
        f"{work['forward_gflop_per_image']:.1f} GFLOP forward, {work['step_gflop_per_image']:.1f} a step for an image; "
        f"{wish.images} images × {wish.epochs:g} epochs, {work['steps']} steps of {work['batch_size']}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(table, highlight=False)
    for number, option in enumerate(advice.options, 1):
        console.print(f"{number}. {option.command}\n   {option.price}", highlight=False, soft_wrap=True, markup=False)
        if report := advice.compiled.get(option.accelerator):
            console.print(f"   TPU compiler: {memory_line(report)}", highlight=False, soft_wrap=True, markup=False)
    for hint in advice.hints:
        console.print(f"note  {hint}", highlight=False, soft_wrap=True, markup=False)
    for why in dict.fromkeys(advice.left_out.values()):
        names = ", ".join(name for name, reason in advice.left_out.items() if reason == why)
        console.print(f"left out  {names}: {why}", highlight=False, soft_wrap=True, markup=False)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _spread(values: tuple[float, float, float]) -> str:
    low, likely, high = (f"{value:.0f}" if value >= 100 else f"{value:.2g}" for value in values)
    return f"{likely} ({low} to {high})"


def plot(advice: Advice, path: str) -> None:
    """Time against cost of the options whose price is known, as a picture; a `ValueError` where there is none."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    if all(option.usd is None for option in advice.options):
        names = ", ".join(option.accelerator for option in advice.options)
        raise UserError(f"{path} is not drawn: no price of {names} is known; give --price NAME=USD")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for option in advice.options:
        if option.usd is not None:
            low, likely, high = option.hours
            axes.errorbar(likely, option.usd[1], xerr=[[likely - low], [high - likely]], fmt="o", capsize=3)
            name = f"{option.devices} × {option.accelerator}"
            axes.annotate(name, (likely, option.usd[1]), (0, 6), textcoords="offset points", ha="center")
    axes.set(xscale="log", yscale="log", xlabel="hours (likely, from low to high)", ylabel="USD (likely)")
    axes.set_title(f"{advice.wish.model}, {advice.wish.images} images × {advice.wish.epochs:g} epochs")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    axes.margins(0.1)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
