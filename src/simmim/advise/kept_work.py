"""Keep what a step was counted to be between calls: counting takes seconds, and PyTorch."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import simmim
from simmim.config.pretraining import PretrainConfig
from simmim.config.toml import to_toml
from simmim.errors import UserError
from simmim.hardware.host import user_cache
from simmim.hardware.roofline import StepWork
from simmim.method.objectives import FrozenTeacher
from simmim.output import say
from simmim.training.whole_files import written_whole

Measure = Callable[[PretrainConfig], StepWork]

_MOST = 100  # files, of some 10 KB


def measure_once(config: PretrainConfig) -> StepWork:
    """Count the work of a step as `simmim.torch_engine.perf.cost.measure_work`, or read what it counted before.

    What it counted is in the user's cache, by configuration, versions and source of this package. It is counted anew
    where there is a teacher, whose files may change. Says what it counts. Raises `UserError` for a model that cannot be
    built.
    """
    path = None if any(isinstance(each, FrozenTeacher) for each in config.objectives) else _place(config)
    if path and (known := _read(path)):
        return known
    from simmim.torch_engine.perf.cost import measure_work

    less = ", activations recomputed" if config.checkpoint_activations else ""
    say(f"counting the operations of a step on {config.device} in {config.precision}{less}")
    work = measure_work(config)
    if path:
        with contextlib.suppress(OSError, UserError):  # a cache that cannot be written is no error
            _keep(path, work)
    return work


def _place(config: PretrainConfig) -> Path:
    source = sorted(Path(simmim.__file__).parent.rglob("*.py"))
    facts = [to_toml(config), *(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "timm"))]
    facts += [f"{path} {(status := path.stat()).st_size} {status.st_mtime_ns}" for path in source]
    return user_cache() / "work" / f"{hashlib.sha256(chr(10).join(facts).encode()).hexdigest()[:32]}.npz"


def _read(path: Path) -> StepWork | None:
    """Read a file of the cache; `None` for a missing or damaged one."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found: dict[str, Any] = {name: array if array.ndim else int(array) for name, array in arrays.items()}
            return StepWork(**found)
    except Exception:  # damaged files raise arbitrary errors
        return None


def _keep(path: Path, work: StepWork) -> None:
    with written_whole(path) as aside, aside.open("wb") as file:
        arrays: dict[str, Any] = {name.name: getattr(work, name.name) for name in dataclasses.fields(work)}
        np.savez_compressed(file, **arrays)
    for old in sorted(path.parent.glob("*.npz"), key=lambda file: file.stat().st_mtime)[:-_MOST]:
        old.unlink(missing_ok=True)
