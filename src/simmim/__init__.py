"""Pretrain vision backbones by masked image modelling (SimMIM, arXiv 2111.09886) on your own unlabelled images.

import simmim
run = simmim.pretrain(data="images/", out="runs/a", epochs=100)
backbone = simmim.load_encoder("runs/a")  # a plain timm module
names, features = simmim.embed("runs/a", data="images/")
"""

import importlib
import signal
from collections.abc import Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    from numpy import floating
    from numpy.typing import NDArray

    from simmim.config.pretraining import PretrainConfig
    from simmim.data.sources import register_source
    from simmim.errors import UserError
    from simmim.torch_engine.tasks.base import TaskSpec, register_task
    from simmim.torch_engine.train.storage import load_encoder, load_model
    from simmim.training.loop import Outcome
    from simmim.training.run_directory import Run

__version__ = "0.2.0.dev0"
__all__ = [
    "PretrainConfig",
    "Run",
    "TaskSpec",
    "UserError",
    "__version__",
    "embed",
    "finetune",
    "load_encoder",
    "load_model",
    "predict",
    "pretrain",
    "probe",
    "register_source",
    "register_task",
]

# Loaded on first use, so that `import simmim` stays fast.
_HOMES = {
    "PretrainConfig": "simmim.config.pretraining",
    "Run": "simmim.training.run_directory",
    "UserError": "simmim.errors",
    "TaskSpec": "simmim.torch_engine.tasks.base",
    "load_encoder": "simmim.torch_engine.train.storage",
    "load_model": "simmim.torch_engine.train.storage",
    "register_task": "simmim.torch_engine.tasks.base",
    "register_source": "simmim.data.sources",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'simmim' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def pretrain(*, recipe: str | None = None, **settings: Any) -> "Run":
    """Pretrain a backbone, or resume the run in `out`; settings are the fields of `PretrainConfig`.

    All others are those of the recipe. Without one it is `default-small`, for useful features (`audio-small` for
    sounds), or SimMIM where an objective, target, loss, head or the Keras engine is given (docs/pretraining.md).

    Returns the run. Raises `UserError` for an invalid setting, images that cannot be read, or an `out` that holds a run
    with another configuration. A training that a signal stopped is saved first; then Ctrl-C raises `KeyboardInterrupt`,
    another signal `SystemExit`.
    """
    from simmim.config.pretrain_recipes import find_recipe, first_config
    from simmim.config.pretraining import PretrainConfig
    from simmim.config.validation import from_settings
    from simmim.data.files import names_sounds
    from simmim.engines import pretrain

    if recipe:
        first = find_recipe(recipe)
    else:
        model = str(settings["model"]) if "model" in settings else None
        first = first_config(settings, model, sounds=names_sounds(settings.get("data")))
    return _run_of(*pretrain(from_settings(PretrainConfig, vars(first) | settings)))


def finetune(task: str, **settings: Any) -> "Run":
    """Train an encoder for a task, or resume the run in `out`.

    `task` is "classify", "segment", "detect" or one that `register_task` added. Settings are the fields of its
    configuration in `simmim.config.tasks`; `init` is what the command line calls `--from`: a run, "scratch",
    "timm:NAME" or "local-dir:PATH". Returns the run. Raises what `pretrain` does.
    """
    from simmim.config.tasks import find_task
    from simmim.config.validation import from_settings
    from simmim.engines import finetune

    return _run_of(*finetune(from_settings(find_task(task), settings)))


def _run_of(run: "Run", outcome: "Outcome") -> "Run":
    """Return the run, or raise if a signal came: a script must not go on, nor take half a training for one."""
    stop = outcome.stopped_by or outcome.late_signal
    if stop == signal.SIGINT:
        raise KeyboardInterrupt
    if stop is not None:
        from simmim.training.loop import code_of_signal

        raise SystemExit(code_of_signal(stop))
    return run


def probe(run: str, data: str, **settings: Any) -> dict[str, Any]:
    """Judge the frozen encoder of a run by labelled images; settings are the other fields of `ProbeConfig`.

    Returns top1 and balanced_accuracy, in [0, 1], and the numbers of images and classes. With `method="linear"` and
    `out`, it also writes the classifier as a model for `simmim.predict`. Raises `UserError` for a run without encoder,
    for images that cannot be read or do not fit, and if `out` exists.
    """
    from simmim.config.validation import from_settings
    from simmim.torch_engine.tasks.probe import ProbeConfig, probe

    return probe(from_settings(ProbeConfig, {"run": run, "data": data, **settings}))


@overload
def embed(
    run: str | PathLike[str], data: str | PathLike[str], *, labels: Literal[False] = False, **settings: Any
) -> "tuple[list[str], NDArray[floating[Any]]]": ...


@overload
def embed(
    run: str | PathLike[str], data: str | PathLike[str], *, labels: Literal[True], **settings: Any
) -> "tuple[list[str], NDArray[floating[Any]], list[str]]": ...


def embed(run: str | PathLike[str], data: str | PathLike[str], **settings: Any) -> tuple[Any, ...]:
    """Compute the features of images with the frozen encoder of a run, of "timm:NAME" or "local-dir:PATH".

    Settings are the other fields of `EmbedConfig`. Returns the names of the images and their features (N, D), or
    (N, h·w, D) with `patches`, in the order of the images; with `labels` their labels come third. Unreadable images are
    left out. With `out` the features are written to that file too, which a killed call resumes; for more of them than
    fit in memory use `simmim embed`. Raises `UserError` for a run without encoder, settings that do not fit it, or
    images that cannot be read.
    """
    from simmim.config.validation import from_settings
    from simmim.torch_engine.tasks.embed import EmbedConfig, embed

    given = {"run": fspath(run), "data": fspath(data), **settings}
    return embed(from_settings(EmbedConfig, given))


def predict(
    run: str | PathLike[str], images: str | PathLike[str] | Sequence[str | PathLike[str]], **settings: Any
) -> dict[str, Any]:
    """Predict labels, masks or boxes of images with the model of a fine-tuned run.

    `images` are files, or one thing that `simmim predict` takes. Settings are the other fields of `PredictConfig`.
    Returns "images", for each "image" (its name) and

    - from a classifier "label", "probability" and "top": pairs of these;
    - from segmentation "shares": of the image's pixels for each class found;
    - from detection "boxes": each a "label", a "score", a "box" [left, top, width, height] in the image's pixels, and
      with Mask R-CNN an "rle", COCO's run lengths of its mask;

    and "bad_images", those that cannot be read, each with a "reason". With `out`, all that is in `out/predictions.json`
    too, and each image has a "picture" there and from segmentation a "mask", a PNG of class numbers. Raises `UserError`
    for a run without a fine-tuned model, or where no image can be read.
    """
    from simmim.config.validation import from_settings
    from simmim.torch_engine.tasks.predict import PredictConfig, predict

    several = (images,) if isinstance(images, (str, PathLike)) else images
    names = tuple(fspath(image) for image in several)
    return predict(from_settings(PredictConfig, {"run": fspath(run), "images": names, **settings}))
