"""Rank the ways to run a training and suggest what would make it cheaper.

`simmim.advise.estimate` estimates each way; `simmim.advise.report` prints and plots the result.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from simmim.advise.estimate import Estimator, config_of
from simmim.advise.kept_work import Measure
from simmim.advise.request import Option, Request
from simmim.commands.tpu_check import TpuCheckConfig, tpu_check
from simmim.config.validation import from_settings
from simmim.errors import UserError
from simmim.hardware.accelerators import read_facts
from simmim.hardware.tpu_compiler import CompilerReport


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Ranked options, best first, with the assumptions and hints that a person needs."""

    request: Request
    work: dict[str, Any]
    options: list[Option]
    left_out: dict[str, str]
    """Rejected accelerators and the reason for each."""
    hints: list[str]
    compiled: dict[str, CompilerReport] = dataclasses.field(default_factory=dict)
    """The TPU compiler's report on an option's step, by accelerator; see `compile_for_tpus`."""

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


def advise(request: Request, measure: Measure | None = None) -> Advice:
    """Rank options by cost under a deadline, or by time under a budget.

    `measure` returns a step's work; by default it runs the real model on tensors without data. Raises `UserError` if no
    option is left.
    """
    request = from_settings(Request, vars(request))
    estimator = Estimator(request, measure)
    found, left_out = [], {}
    for row in estimator.rows.values():
        options = [option for devices in estimator.counts(row) if (option := estimator.option(row, devices))]
        found += options
        if not options:
            left_out[row.name] = estimator.why_not(row)
    if not found:
        raise UserError(estimator.nothing_fits(left_out))
    allowed = [option for option in found if _allowed(option, request)]
    if not allowed:
        raise UserError(_too_dear(found, request))
    best: dict[str, Option] = {}
    for option in sorted(allowed, key=lambda option: _rank(option, request)):
        best.setdefault(option.accelerator, option)
    for row in estimator.rows.values():
        if row.name not in best and row.name not in left_out:
            usd = row.spot if request.spot else row.price
            unknown = request.budget is not None and usd is None
            left_out[row.name] = "price not known: give --price NAME=USD" if unknown else "over budget or deadline"
    ranked = list(best.values())[: request.top]
    return Advice(
        request=request,
        work=estimator.describe(),
        options=ranked,
        left_out=left_out,
        hints=_hints(ranked[0], found, estimator),
    )


def compile_for_tpus(advice: Advice, say: Callable[[str], None] = lambda line: None) -> Advice:
    """Add the TPU compiler's report for every option that is a TPU; `say` receives a line for each.

    Covers TPUs whose chip is one device, without the gradient exchange. Raises `UserError` if no option is such a TPU
    or this machine cannot compile.
    """
    request, reports = advice.request, {}
    facts = read_facts(request.accelerators).accelerators
    topologies = {name: row.topology for name, row in facts.items() if row.topology}
    for option in advice.options:
        if option.accelerator in topologies:
            config = TpuCheckConfig(
                **vars(config_of(request))
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


def _allowed(option: Option, request: Request) -> bool:
    if request.deadline is not None and option.hours[1] > request.deadline:
        return False
    return request.budget is None or (option.usd is not None and option.usd[1] <= request.budget)


def _rank(option: Option, request: Request) -> tuple[float, ...]:
    """Sort by time under a budget alone, else by cost in steps of 5 %, then by time; unknown prices come last."""
    if request.budget is not None and request.deadline is None:
        return (option.hours[1],)
    if option.usd is None:
        return (math.inf, option.hours[1])
    free = option.usd[1] == 0
    return (-math.inf if free else round(math.log(option.usd[1]) / math.log(1.05)), option.hours[1])


def _too_dear(found: Sequence[Option], request: Request) -> str:
    """Explain in one line what was asked and the nearest possible option."""
    priced = [option for option in found if option.usd is not None]
    if request.budget is not None and not priced:
        return f"budget {request.budget:g} USD cannot be judged: no price is known; give --price NAME=USD"
    if request.budget is not None and all(option.usd and option.usd[1] > request.budget for option in priced):
        near = min(priced, key=lambda option: option.usd[1] if option.usd else math.inf)
        assert near.usd is not None
        epochs = request.epochs * request.budget / near.usd[1]
        return (
            f"budget {request.budget:g} USD is too little: the cheapest way costs about {near.usd[1]:.3g} USD "
            f"({near.devices} × {near.accelerator}, {near.hours[1]:.3g} h); raise it, or train {epochs:.2g} epochs"
        )
    under = [option for option in found if request.budget is None or (option.usd and option.usd[1] <= request.budget)]
    near = min(under, key=lambda option: option.hours[1])
    return (
        f"deadline {request.deadline:g} h cannot be met: the fastest way takes about {near.hours[1]:.3g} h "
        f"({near.devices} × {near.accelerator}); give it longer, more --devices or a larger budget"
    )


def _hints(best: Option, found: Sequence[Option], estimator: Estimator) -> list[str]:
    """List what would make the training cheaper and what would slow it down."""
    request, row, hints = estimator.request, estimator.rows[best.accelerator], []
    if best.usd is not None:
        if not request.spot and row.spot is not None and row.price and row.spot < row.price:
            hints.append(f"--spot: about {best.usd[1] * row.spot / row.price:.3g} USD instead of {best.usd[1]:.3g}")
        cheaper = [option for option in found if option.usd and option.usd[1] < 0.9 * best.usd[1]]
        if cheaper:
            slow = min(cheaper, key=lambda option: option.usd[1] if option.usd else math.inf)
            assert slow.usd is not None
            hints.append(f"{slow.hours[1]:.3g} h on {slow.devices} × {slow.accelerator}: about {slow.usd[1]:.3g} USD")
        if request.epochs > 100:
            hints.append(f"--epochs 100: about {best.usd[1] * 100 / request.epochs:.3g} USD")
    if estimator.config.image_size == (224, 224) and best.limit != "reading images":
        hints.append("--image-size 192: about 0.73 of the time for a ViT or a convolutional net, by the area")
    if estimator.cores(row) is None and best.input_cores > 4 * best.devices:
        hints.append(f"reading as fast takes {best.input_cores:.0f} CPU cores; say --cores if a device has fewer")
    return hints
