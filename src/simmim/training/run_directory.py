"""The run directory (docs/pretraining.md): its files, and how the same command finds it again."""

import contextlib
import dataclasses
import itertools
import json
import shutil
import textwrap
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from simmim.config.pretraining import PretrainConfig
from simmim.config.toml import changed_fields, read_toml, to_toml
from simmim.config.training import TrainingConfig
from simmim.disk import make_directory, to_disk, writing
from simmim.errors import UserError
from simmim.output import say
from simmim.training.run_lock import LOCK, locked, move_lock
from simmim.training.saved_work import check_checkpoints

_V0_1 = {"flip": "horizontal", "crop_scale": (0.67, 1.0), "crop_ratio": (3 / 4, 4 / 3)}
"""Values of version 0.1 for fields that it did not have."""

_OF_THE_MACHINE = ("device", "precision", "compile", "workers")
"""Fields that a machine decides where they are left open. config.toml has them as asked, machine.json as decided."""

Config = TypeVar("Config", bound=TrainingConfig)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path to write, renamed to `path` at the end: readers see the old file or the new one, whole.

    Raises `WriteError` where the disk does not take it; the old file stays.
    """
    aside = _aside(path)  # always the same name: what a killed process left is written over
    with writing(path):
        make_directory(path.parent)
        try:
            yield aside
            to_disk(aside)
            aside.replace(path)
        finally:
            with contextlib.suppress(OSError):  # of a file system that is read-only
                aside.unlink(missing_ok=True)
        to_disk(path.parent)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write a JSON file, whole or not at all."""
    with written_whole(path) as aside:
        aside.write_text(json.dumps(value, indent=indent), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, `{}` where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


@contextlib.contextmanager
def new_directory(out: str | Path) -> Iterator[Path]:
    """Give a directory to fill, renamed to `out` at the end; after an error, nothing is there.

    Raises `UserError` if `out` exists and is not an empty directory, or another process is filling it.
    """
    target = Path(out)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"--out {out} exists already; give a new directory")
    with writing(target):
        parent = target.with_name(f".writing-{target.name}")  # always the same: what a killed process left is removed
        try:
            with locked(parent):
                aside = parent / target.name
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                try:
                    yield aside
                    for path in (*aside.rglob("*"), aside):
                        to_disk(path)
                    aside.rename(target)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
        finally:
            with contextlib.suppress(OSError):  # another process fills it now
                parent.rmdir()
        to_disk(target.parent)


@dataclass(frozen=True)
class Run:
    """Paths of a run directory."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def has_checkpoint(self) -> bool:
        return any(self.checkpoints.glob("step-*"))

    @property
    def encoder(self) -> Path:
        return self.path / "encoder"

    @property
    def model(self) -> Path:
        """Of a fine-tuning."""
        return self.path / "model"

    @property
    def evaluation(self) -> Path:
        """What the report shows of the evaluation of a fine-tuning's `model`."""
        return self.path / "evaluation.json"

    @property
    def latest_evaluation(self) -> Path:
        """The same of the latest evaluation, until its model is kept or not."""
        return self.path / ".evaluation-latest.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def trackers(self) -> Path:
        """Ids of the run at hosted trackers."""
        return self.path / "trackers.json"

    @property
    def reconstructions(self) -> Path:
        return self.path / "reconstructions"

    @property
    def feature_pictures(self) -> Path:
        """Pictures of the features of images kept aside, and what they were drawn from."""
        return self.path / "feature_pictures"

    @property
    def machine(self) -> Path:
        """What the run was trained on, for each process that began or resumed it, and the settings decided by that."""
        return self.path / "machine.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def data(self) -> Path:
        """Counts and digests of the images."""
        return self.path / "data.json"

    @property
    def data_names(self) -> Path:
        return self.path / "data_names.gz"

    @property
    def bad_images(self) -> Path:
        return self.path / "bad_images.txt"

    def read_config(self, kind: type[Config]) -> Config:
        if not self.config.is_file():
            raise UserError(f"{self.path} is not a run: it has no config.toml; give the --out directory of a training")
        task, tuning = find_task_of(self.path), "task" in {field.name for field in dataclasses.fields(kind)}
        if bool(task) != tuning:
            here = f"a fine-tuning ({task}), not a pretraining" if task else "a pretraining, not a fine-tuning"
            raise UserError(f"{self.path} holds {here}; give another directory")
        config = dataclasses.replace(read_toml(self.config, kind), **self.machine_facts().get("settings", {}))
        missing = {name: value for name, value in _V0_1.items() if getattr(config, name, value) is None}
        return dataclasses.replace(config, **missing)

    def machine_facts(self) -> dict[str, Any]:
        """Return the object in machine.json; `{}` where there is none, or it is damaged."""
        try:
            found = read_json(self.machine)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


_TASK = "task.json"  # beside a fine-tuned model, so that its directory can be used alone


def mark_task(directory: Path, task: str) -> None:
    """Write down what the model in a directory was fine-tuned for."""
    write_json(directory / _TASK, {"task": task})


def find_task_of(path: Path) -> str | None:
    """Return the task that a run, or the model directory of one, was fine-tuned for; `None` if it was not."""
    for file in (path / _TASK, Run(path).model / _TASK):
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))["task"]
    config = Run(path).config
    return _read_raw(config).get("task") if config.is_file() else None


def _read_raw(config: Path) -> dict[str, Any]:
    """Return the table in a run's config.toml, whatever its command. Raises `UserError` for a damaged one."""
    try:
        return tomllib.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:  # no TOML, or no text
        raise UserError(f"{config} cannot be read as a run's: {error}; bring it back, or give another run") from None


def find_model(path: Path) -> Path:
    """Find the model directory of a fine-tuned run; `path` may be either. Raises `UserError` if there is none."""
    if (path / _TASK).is_file():
        return path
    run = Run(path)
    if (run.model / _TASK).is_file():
        return run.model
    if find_task_of(path):
        raise UserError(f"{path} has no model yet; wait for its first evaluation (--eval-every-epochs)")
    if run.config.is_file():
        raise UserError(
            f"{path} is a pretraining; fine-tune it first: "
            f"simmim finetune classify --from {path} --data LABELLED --out RUN2"
        )
    raise UserError(f"{path} is not a fine-tuned run; give the --out directory of simmim finetune")


def read_pretraining(path: str | Path) -> PretrainConfig:
    """Return the configuration of a pretraining run. Raises `UserError` for anything else."""
    if task := find_task_of(Path(path)):
        raise UserError(f"{path} is fine-tuned for {task}, and reconstructs nothing; give the run that it began from")
    return Run(Path(path)).read_config(PretrainConfig)


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
            old = _read_raw(run.config)
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
    left = {run.machine, *map(_aside, (run.machine, run.config)), run.path / LOCK}
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
