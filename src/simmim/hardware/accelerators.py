"""Facts about accelerators that one may own or rent."""

import os
import re
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from simmim.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A row of facts about one device; `accelerators.toml` says what each means and where it comes from."""

    name: str
    title: str
    memory_gb: float
    bandwidth_gb_s: float
    source: str
    driver: str | None = None
    device: str | None = None
    topology: str | None = None
    link_gb_s: float | None = None
    linked: int = 1
    tflops: dict[str, float] = field(default_factory=dict)
    checked: str | None = None
    fitted: bool = False
    vcpus: int | None = None
    price: float | None = None
    spot: float | None = None
    price_source: str | None = None
    price_date: str | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All of `accelerators.toml`."""

    accelerators: dict[str, Accelerator]
    reached: dict[str, Any]
    input: dict[str, float]

    def usable_gib(self, memory: float) -> float:
        """Return how many GiB of a device's memory a step may use."""
        return memory * (1 - self.reached["memory_kept_free"]) - self.reached["memory_kept_free_gib"]


def read_facts(own: str | os.PathLike[str] | None = None) -> Facts:
    """Read the package's facts; rows of a user's own file of the same form replace them.

    Raises `UserError` for a file that cannot be read or has other fields.
    """
    table = tomllib.loads((resources.files("simmim.hardware") / "accelerators.toml").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in table["accelerator"]}
    if own is not None:
        for row in _read_own(own):
            if "name" not in row:
                raise UserError(f'{own} has an accelerator without a name; write name = "my-card"')
            rows[row["name"]] = rows.get(row["name"], {"title": row["name"], "source": str(own)}) | row
    try:
        accelerators = {name: Accelerator(**row) for name, row in rows.items()}
    except TypeError as error:
        raise UserError(
            f"{own}: {str(error).partition('() ')[2]}; see simmim/hardware/accelerators.toml for the form"
        ) from None
    return Facts(accelerators=accelerators, reached=table["reached"], input=table["input"])


def _read_own(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8")).get("accelerator", [])
    except OSError as error:
        raise UserError(f"accelerators {path} cannot be read: {error.strerror}; give a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"accelerators {path} is not TOML: {error}") from None


def find_gpu(driver_name: str) -> Accelerator | None:
    """Return the facts of a GPU by the name that its driver reports; `None` for an unknown GPU."""
    found = [
        row
        for row in read_facts().accelerators.values()
        if row.driver and re.search(rf"(?<!\w){row.driver}(?!\w| Ti| SUPER| Laptop)", driver_name)
    ]
    return max(found, key=lambda row: len(row.driver or ""), default=None)


def gpu_peak_flops(name: str) -> float | None:
    """Return the peak dense bf16 FLOP/s of a GPU by the name that its driver reports; `None` where it is unknown."""
    row = find_gpu(name)
    return row.tflops["bf16"] * 1e12 if row and "bf16" in row.tflops else None
