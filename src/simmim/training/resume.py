"""Begin a run in a directory, or find it again: the same command resumes it."""

import contextlib
import dataclasses
import itertools
import json
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simmim.config.toml import changed_fields, to_toml
from simmim.config.training import TrainingConfig
from simmim.disk import make_directory
from simmim.errors import UserError
from simmim.output import say
from simmim.training.run_directory import Config, Run, read_settings
from simmim.training.run_lock import LOCK, locked, move_lock
from simmim.training.saved_work import check_checkpoints
from simmim.training.whole_files import aside_of, write_json, written_whole

_OF_THE_MACHINE = ("device", "precision", "compile", "workers")
"""Fields that a machine decides where they are left open. config.toml has them as asked, machine.json as decided."""


def recall(config: Config) -> Config | None:
    """Return the configuration that the run in `config.out` began with; `None` where training starts anew.

    It does in a run that was killed before its first checkpoint.
    """
    if config.out is None or config.fresh or not (run := Run(Path(config.out))).config.is_file():
        return None
    begun = run.read_config(type(config))
    return begun if run.has_checkpoint else None


def asked_precision(config: TrainingConfig) -> str:
    """Return the precision that is asked for; for auto, that which the run to be resumed began with."""
    begun = recall(config) if config.precision == "auto" else None
    return begun.precision if begun else config.precision


@contextlib.contextmanager
def hold_run(config: TrainingConfig, *, is_main: bool) -> Iterator[None]:
    """Keep other trainings out of `config.out`; the main process does it for all.

    Raises `UserError` where another training holds it, it is no place for a run, or its checkpoints were deleted.
    """
    assert config.out is not None
    if not is_main:
        yield
        return
    run = Run(Path(config.out))
    _check_place(run)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(run.path))
        except OSError as error:
            raise _not_writable(run, error) from None
        if run.config.is_file() and not config.fresh:
            old = read_settings(run.config)
            check_checkpoints(run, old, _origin(config))
        yield


def open_run(config: TrainingConfig, asked: TrainingConfig | None = None) -> Run:
    """Open the run directory of `config.out`, made if new. A run in it is resumed, or refused if it differs.

    A run that was killed before its first checkpoint begins anew; if it differs, it is set aside first. `config` is
    complete (nothing left to resolve), so that it can be compared; `asked` is what the user gave. config.toml keeps
    what was asked of the machine, so that another one that repeats the run decides for itself. Raises `UserError` that
    names the fields that differ, or for a directory that holds something else.
    """
    assert config.out is not None
    run = Run(Path(config.out))
    if config.fresh and run.config.exists():
        _set_aside(run)
    if run.config.exists():
        old = run.read_config(type(config))
        changed = changed_fields(old, config)
        if config.extend:
            changed = [name for name in changed if name not in ("steps", "epochs")]
        if not run.has_checkpoint:
            if changed:
                old_path = _set_aside(run)
                say(f"{run.path} held a run that was killed before its first checkpoint; it is {old_path} now")
            _forget_attempt(run)
        elif changed:
            differences = ", ".join(
                f"{name} {_short(getattr(old, name))} → {_short(getattr(config, name))}" for name in changed
            )
            raise UserError(
                f"{run.path} holds a run with another configuration ({differences}); "
                f"{_remedy(run, changed)}, give another --out (with {_origin(config)} "
                f"{run.model if hasattr(config, 'task') else run.path} to start from its weights), or start again with "
                "--fresh"
            )
    _check_place(run)
    try:
        make_directory(run.path)
        decided = {name: getattr(config, name) for name in _OF_THE_MACHINE}
        write_json(run.machine, run.machine_facts() | {"settings": decided})
        open_ones = {name: getattr(asked or config, name) for name in _OF_THE_MACHINE}
        with written_whole(run.config) as path:
            path.write_text(to_toml(dataclasses.replace(config, **open_ones)), encoding="utf-8")
    except OSError as error:
        raise _not_writable(run, error) from None
    return run


def _remedy(run: Run, changed: list[str]) -> str:
    if set(changed) <= {"steps", "epochs"}:
        return f"simmim resume {run.path} --{changed[0]} N extends it"
    return "repeat its command to resume it"


def _origin(config: TrainingConfig) -> str:
    return "--init-from" if hasattr(config, "init_from") else "--from"


def _check_place(run: Run) -> None:
    if run.path.exists() and not run.config.exists() and not (run.path.is_dir() and _is_empty(run)):
        raise UserError(f"{run.path} exists and is not a run; give a new directory as --out")


def _not_writable(run: Run, error: OSError) -> UserError:
    return UserError(f"{run.path} cannot be written: {error.strerror}; give another --out")


def _short(value: Any) -> str:
    return textwrap.shorten(str(value), 80, placeholder=" …")


def _is_empty(run: Run) -> bool:
    # Left by a process that was killed as it began.
    left = {run.machine, *map(aside_of, (run.machine, run.config)), run.path / LOCK}
    return set(run.path.iterdir()) <= left


def _forget_attempt(run: Run) -> None:
    """Remove what would mix with the steps of a run that begins anew: figures, and the record of the images."""
    drop_metrics_after(run.metrics, 0)
    for path in (run.data, run.path / "metrics.json"):
        path.unlink(missing_ok=True)


def _set_aside(run: Run) -> Path:
    """Move an old run to RUN.old-TIME: `--fresh` never deletes what may have cost days."""
    base = f"{run.path.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))  # clocks are set back
    old = next(path for name in names if not (path := run.path.with_name(name)).exists())
    run.path.rename(old)
    move_lock(old, run.path)
    return old


def drop_metrics_after(path: Path, step: int) -> None:
    """Forget the lines of steps that a resumed run will do again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was killed while it wrote
            continue
        if record.get("step", 0) <= step:
            kept.append(line + "\n")
    with written_whole(path) as aside:
        aside.write_text("".join(kept), encoding="utf-8")
