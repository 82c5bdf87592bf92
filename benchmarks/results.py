"""Where the benchmarks' figures go: `benchmarks/results/NAME.json`, with date, machine and versions."""

import datetime
import importlib.metadata
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from simmim.hardware.host import cpu_cores, cpu_name


def machine() -> dict[str, Any]:
    packages = ("torch", "torchvision", "timm", "transformers", "numpy", "pillow", "grain")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.date.today().isoformat(),
        "command": "python " + shlex.join(["benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "cpu": cpu_name(),
        "cores": cpu_cores(),
        "versions": versions,
    }


def save(name: str, figures: dict[str, Any], *, quiet: bool = False) -> Path:
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if not quiet:
        print(f"wrote {path}")
    return path
