"""Print and plot the advice of `simmim advise`."""

import io

from simmim.advise.rank import Advice
from simmim.commands.tpu_check import memory_line
from simmim.errors import UserError


def show(advice: Advice) -> str:
    """Format the advice as text."""
    from rich.console import Console
    from rich.table import Table

    work, request = advice.work, advice.request
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
        f"{request.images} images × {request.epochs:g} epochs, {work['steps']} steps of {work['batch_size']}",
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
    """Plot time against cost of the options with a known price. Raises `UserError` if no price is known."""
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
    axes.set_title(f"{advice.request.model}, {advice.request.images} images × {advice.request.epochs:g} epochs")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    axes.margins(0.1)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
