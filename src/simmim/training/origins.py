"""Encoders by the names that every command takes: a run, an encoder directory, timm:NAME, local-dir:PATH.

Nothing is loaded here, so that a name that is wrong is told at once.
"""

from pathlib import Path

from simmim.config.pretraining import PretrainConfig
from simmim.config.tasks import FinetuneConfig
from simmim.errors import UserError
from simmim.training.resume import recall
from simmim.training.run_directory import Run

_LOCAL = "local-dir:"


def is_timms(source: str) -> bool:
    """Tell whether a source of an encoder names a model as timm describes it, and not a run or a file of ours."""
    return source.startswith(("timm:", _LOCAL))


def encoder_directory(source: str | Path) -> Path | None:
    """Return the hub directory of a run's encoder, or of an encoder that is one; `None` where there is none."""
    run = Run(Path(source))
    directory = run.encoder if run.encoder.is_dir() else run.path
    return directory if (directory / "config.json").is_file() else None


def check_encoder(source: str, option: str = "") -> None:
    """Raise `UserError` where a source names no encoder, beginning with the `option` that it was given to."""
    given = f"{option} {source}".strip()
    if source.startswith(_LOCAL):
        if not Path(source.removeprefix(_LOCAL), "config.json").is_file():
            raise UserError(f"{given} has no config.json; give a directory that timm or save_pretrained wrote")
    elif not is_timms(source) and encoder_directory(source) is None:
        if _is_checkpoint(Path(source)):
            raise UserError(
                f"{given} is a checkpoint and no encoder yet; make it one with simmim convert {source} --out DIR, and "
                "give DIR"
            )
        scratch = ", scratch" if option == "--from" else ""
        raise UserError(
            f"{given} has no encoder; give the --out directory of a run that has saved{scratch}, timm:NAME or "
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
        check_encoder(source, "--from")
    elif is_timms(source):
        check_encoder(source, "--init-from")
    elif not Path(source).exists():
        raise UserError(f"--init-from {source} is not there; give a run, a checkpoint, timm:NAME or local-dir:PATH")
