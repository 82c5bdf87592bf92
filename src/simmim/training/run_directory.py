"""The run directory (docs/pretraining.md): its files, its configuration, and the task that it was fine-tuned for."""

import dataclasses
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from simmim.config.pretraining import PretrainConfig
from simmim.config.toml import read_toml
from simmim.config.training import TrainingConfig
from simmim.errors import UserError
from simmim.training.whole_files import read_json, write_json

_V0_1 = {"flip": "horizontal", "crop_scale": (0.67, 1.0), "crop_ratio": (3 / 4, 4 / 3)}
"""Values of version 0.1 for fields that it did not have."""

Config = TypeVar("Config", bound=TrainingConfig)


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
    def baselines(self) -> Path:
        """Runs of `simmim baseline`: the same fine-tuning from random weights."""
        return self.path / "baselines"

    @property
    def frozen(self) -> Path:
        """What `simmim baseline` found on frozen features."""
        return self.baselines / "frozen.json"

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
    return read_settings(config).get("task") if config.is_file() else None


def read_settings(config: Path) -> dict[str, Any]:
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
