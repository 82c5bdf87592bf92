"""Encoders by the names that every command takes: a run, an encoder directory, timm:NAME, local-dir:PATH.

Nothing is loaded here, so that a name that is wrong is told at once.
"""

from pathlib import Path

from simmim.config.pretraining import PretrainConfig
from simmim.config.tasks import FinetuneConfig
from simmim.errors import UserError
from simmim.training.resume import recall
from simmim.training.run_directory import Run, find_model, find_task_of
from simmim.training.whole_files import read_json

_LOCAL = "local-dir:"
_WHOLE = {"detect": ("detector", "pyramid_channels"), "segment": ("decoder_channels",)}
"""Tasks that begin from a whole model too, and the settings that must be those of that model."""


def is_timms(source: str) -> bool:
    """Tell whether a source of an encoder names a model as timm describes it, and not a run or a file of ours."""
    return source.startswith(("timm:", _LOCAL))


def encoder_directory(source: str | Path) -> Path | None:
    """Return the hub directory of a run's encoder, or of an encoder that is one; `None` where there is none."""
    run = Run(Path(source))
    directory = run.encoder if run.encoder.is_dir() else run.path
    return directory if (directory / "config.json").is_file() else None


def tuned_model(config: FinetuneConfig) -> Path | None:
    """Return the model directory of `--from` if that is a detector or segmenter, fine-tuned for the same task.

    Raises `UserError` if its training has not saved it yet, or its head is of another kind or width.
    """
    if config.task not in _WHOLE or config.init is None or find_task_of(Path(config.init)) != config.task:
        return None
    directory = find_model(Path(config.init))
    told = read_json(directory / "config.json")
    for name in _WHOLE[config.task]:
        if (old := told[name]) != (new := getattr(config, name)):
            option = f"--{name.replace('_', '-')}"
            remedy = f"use {option} {old}, or give the encoder that it began from"
            raise UserError(f"--from {config.init} has {option} {old} and not {new}; {remedy}")
    return directory


def check_encoder(source: str, option: str = "", *, scratch: bool = True) -> None:
    """Raise `UserError` where a source names no encoder, beginning with the `option` that it was given to.

    `scratch`: whether `--from` takes random weights too.
    """
    given = f"{option} {source}".strip()
    if source.startswith(_LOCAL):
        if not Path(source.removeprefix(_LOCAL), "config.json").is_file():
            raise UserError(f"{given} has no config.json; give a directory that timm or save_pretrained wrote")
        return
    if is_timms(source):
        return
    if (task := find_task_of(Path(source))) in _WHOLE:
        remedy = f"give it to simmim finetune {task}, or give the run that it began from"
        raise UserError(f"{given} is fine-tuned for {task}, and no encoder; {remedy}")
    if encoder_directory(source) is None:
        if _is_checkpoint(Path(source)):
            raise UserError(
                f"{given} is a checkpoint and no encoder yet; make it one with simmim convert {source} --out DIR, and "
                "give DIR"
            )
        random = ", scratch" if option == "--from" and scratch else ""
        raise UserError(
            f"{given} has no encoder; give the --out directory of a run that has saved{random}, timm:NAME or "
            "local-dir:PATH"
        )


def _is_checkpoint(path: Path) -> bool:
    """Tell whether `path` looks like weights of another package, which `simmim convert` reads: file or directory."""
    if path.is_dir():
        return any((path / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))
    return path.is_file() and path.suffix in (".pth", ".pt", ".bin", ".ckpt", ".safetensors")


def check_start(config: PretrainConfig | FinetuneConfig) -> None:
    """Raise `UserError` where a new training's first weights are not there. A checkpoint holds those of one resumed."""
    if isinstance(config, FinetuneConfig):
        source, old = config.init, "init"
    else:
        source, old = config.init_from, "init_from"
    if source in (None, "scratch"):
        return
    begun = recall(config)
    if begun is not None and getattr(begun, old) == source:
        return
    if isinstance(config, FinetuneConfig):
        if tuned_model(config) is None:
            check_encoder(source, "--from")
    elif is_timms(source):
        check_encoder(source, "--init-from")
    elif not Path(source).exists():
        raise UserError(f"--init-from {source} is not there; give a run, a checkpoint, timm:NAME or local-dir:PATH")
