"""Draws what the benchmarks saved into docs/speed.png, as far as they ran: python benchmarks/chart.py."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
CHART = Path(__file__).parents[1] / "docs" / "speed.png"
OURS, OTHERS, THIRD = "#1f5f8b", "#b9c4cc", "#e08e45"
GIB = 2**30


def rows_of(figures: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """What `scaling.py` measured; cases that failed are left out."""
    return [row for row in figures["parts"][part] if "error" not in row]


def draw_peers(axes: Axes, figures: dict[str, Any]) -> None:
    bars = []
    for case, found in reversed(figures["cases"].items()):
        rows = [(name, row["ratio"]) for name, row in found["contenders"].items() if "ratio" in row]
        bars += [(f"{case}  {name}", ratio) for name, ratio in reversed(rows)]
    names, ratios = zip(*bars, strict=True)
    drawn = axes.barh(names, ratios, color=[OURS if "simmim" in name else OTHERS for name in names])
    axes.bar_label(drawn, fmt="%.2f", padding=2, fontsize=7)
    axes.set(title="Step: speed, Transformers in fp32 = 1", xlim=(0, 1.15 * max(ratios)))


def draw_both(axes: Axes, figures: dict[str, Any]) -> None:
    cases = [(f"{case}\n{form}", row) for case, forms in figures["cases"].items() for form, row in forms.items()]
    names, rows = zip(*cases, strict=True)
    places = range(len(names))
    shares = [[100 * row[key] for row in rows] for key in ("share_of_slower", "share_of_shared") if key in rows[0]]
    labels = ("of the slower of step and input", "of what both reach on the same cores")
    for number, (values, label, colour) in enumerate(zip(shares, labels, (OTHERS, OURS), strict=False)):
        drawn = axes.bar([place + 0.4 * number for place in places], values, 0.38, label=label, color=colour)
        axes.bar_label(drawn, fmt="%.0f", fontsize=7)
    axes.set_xticks([place + 0.2 for place in places], names, fontsize=7)
    axes.set(title="Training end to end, %", ylim=(0, 135))
    axes.legend(fontsize=7, loc="upper center")


def draw_processes(axes: Axes, figures: dict[str, Any]) -> None:
    rows = rows_of(figures, "processes")
    names = [f"{row['processes']} process{'es' * (row['processes'] > 1)}\n× {row['threads']} threads" for row in rows]
    speeds = [1 / row["seconds_an_image"] for row in rows]
    drawn = axes.bar(names, speeds, color=OURS)
    axes.bar_label(drawn, [f"{speed / speeds[0]:.2f} ×" for speed in speeds], fontsize=8)
    axes.set(title="ViT-S/16, 16 images a step: images/s", ylim=(0, 1.2 * max(speeds)))


def draw_lines(axes: Axes, rows: list[dict[str, Any]], name: str, key: str, scale: float, title: str) -> None:
    axes.plot([row[name] for row in rows], [row[key] / scale for row in rows], "o-", color=OURS)
    axes.set(title=title, xlabel=name)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def draw_size(axes: Axes, figures: dict[str, Any]) -> None:
    draw_lines(axes, rows_of(figures, "size"), "size", "seconds_an_image", 1, "ViT-S/16, batch 8: seconds an image")
    axes.set_xlabel("pixels of a side")


def draw_batch(axes: Axes, figures: dict[str, Any]) -> None:
    draw_lines(axes, rows_of(figures, "batch"), "batch", "memory_bytes", GIB, "ViT-S/16 at 224: memory, GiB")
    axes.set_xlabel("images of a step")


def draw_files(axes: Axes, figures: dict[str, Any]) -> None:
    rows = rows_of(figures, "files")
    draw_lines(axes, rows, "files", "seconds", 1, "Until the first batch")
    axes.plot([row["files"] for row in rows], [row["memory_bytes"] / GIB for row in rows], "s-", color=THIRD)
    axes.legend(["seconds", "GiB"], fontsize=7)
    axes.set(xscale="log", xlabel="images of the data set")


PANELS: list[tuple[str, str, Callable[[Axes, dict[str, Any]], None]]] = [
    ("step_vs_peers_cpu", "cases", draw_peers),
    ("end_to_end", "cases", draw_both),
    ("scaling", "processes", draw_processes),
    ("scaling", "size", draw_size),
    ("scaling", "batch", draw_batch),
    ("scaling", "files", draw_files),
]


def main() -> None:
    plt.rcParams |= {"font.size": 8, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}
    saved = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}
    panels = [
        (saved[name], draw)
        for name, part, draw in PANELS
        if name in saved and (saved[name] | saved[name].get("parts", {})).get(part)
    ]
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    size = (4.4 * columns, 3.6 * rows)
    figure, places = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in places.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (figures, draw) in zip(places.flat, panels, strict=False):
        draw(axes, figures)
        axes.text(1, -0.2, figures["date"], transform=axes.transAxes, ha="right", fontsize=6, color="grey")
    figure.suptitle(f"{figures['cores']} cores of an {figures['cpu']}", fontsize=9)
    figure.savefig(CHART, dpi=80)
    print(f"wrote {CHART}")


if __name__ == "__main__":
    main()
