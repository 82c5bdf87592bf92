"""`simmim predict`: run a fine-tuned model on new images.

Shapes: `H W` pixels, `C` channels.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from simmim.config.commands import PredictConfig
from simmim.config.validation import from_settings
from simmim.data.pages import say_pages
from simmim.data.picture import BadImage
from simmim.data.sounds import read_as
from simmim.data.sources import ImageSource, open_files, read_raw
from simmim.data.video.source import check_frames
from simmim.errors import UserError
from simmim.hardware.host import cpu_cores
from simmim.output import say
from simmim.torch_engine.accelerators import choose_device
from simmim.torch_engine.tasks.base import Predictor, find_spec
from simmim.training.run_directory import find_model, find_task_of
from simmim.training.tracking import progress
from simmim.training.whole_files import new_directory

_TOP = 5


def predict(config: PredictConfig) -> dict[str, Any]:
    """Run a fine-tuned model on images; see `simmim.predict`."""
    config = from_settings(PredictConfig, vars(config))
    directory = find_model(Path(config.run))
    task = find_task_of(directory)
    assert task is not None
    if config.top is not None and task != "classify":
        raise UserError(f"--top is for classifiers, and {config.run} is fine-tuned for {task}; leave it out")
    source = open_files(config.images, config.frames)
    check_frames(config.frames, source, config.images[0])
    if pages := say_pages(source):
        say(f"warning    {pages}")
    predictor = find_spec(task).load_predictor(directory, choose_device(config.device))
    source = read_as(source, predictor.rate, config.run)

    def find(out: Path | None) -> dict[str, Any]:
        album = _Album(source, predictor, config.top or _TOP, out)
        return album.look(batch_size=config.batch_size, threads=config.workers or cpu_cores())

    facts = {"run": config.run, "task": task}
    if config.out is None:
        return facts | find(None)
    with new_directory(config.out) as out:
        found = facts | find(out)
        (out / "predictions.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def describe(found: dict[str, Any], out: str | None) -> list[str]:
    """Format predictions as lines, one for each image."""
    summarize = find_spec(found["task"]).summarize
    rows = [(summarize(prediction), prediction["image"]) for prediction in found["images"]]
    width = max(len(summary) for summary, _ in rows)
    lines = [f"{summary:{width}}  {name}" for summary, name in rows]
    lines += [f"{bad['image']} could not be read: {bad['reason']}" for bad in found["bad_images"]]
    if out is not None:
        lines.append(f"pictures and predictions.json are in {out}")
    return lines


@dataclass(frozen=True)
class _Image:
    """An image that was read: the pixels for the model, and the whole image (H, W, C) if a picture is drawn."""

    index: int
    pixels: NDArray[Any]
    whole: NDArray[Any] | None


@dataclass(frozen=True)
class _Album:
    """Read, predict and save images; pictures and masks go into the directory `out`."""

    source: ImageSource
    predictor: Predictor
    top: int
    out: Path | None
    bad: dict[int, str] = field(default_factory=dict)

    def read(self, index: int) -> _Image | None:
        try:
            raw = read_raw(self.source, index)
            pixels, whole = self.predictor.read(raw), None
            if self.out is not None:
                whole = self.predictor.whole(raw)
            return _Image(index, pixels, whole)
        except BadImage as error:
            self.bad[index] = str(error)
            return None

    def keep(self, image: _Image, prediction: dict[str, Any]) -> dict[str, Any]:
        name = self.source.name(image.index)
        kept = {"image": name, **prediction}
        if "top" in kept:
            kept["top"] = kept["top"][: self.top]
        mask = kept.pop("mask", None)
        if self.out is not None and image.whole is not None:
            plain = re.sub(r"[^\w.-]", "_", Path(name).stem)
            stem = f"{image.index:06d}-{plain}"
            kept["picture"] = _save(self.predictor.draw(image.whole, prediction), self.out, f"pictures/{stem}.jpg")
            if mask is not None:
                kept["mask"] = _save(mask, self.out, f"masks/{stem}.png")
        return kept

    def look(self, *, batch_size: int, threads: int) -> dict[str, Any]:
        """Return the predictions in order, and the images that could not be read."""
        found: list[dict[str, Any]] = []
        count = len(self.source)
        starts = range(0, count, batch_size)
        with ThreadPoolExecutor(threads) as pool:
            for start in progress(starts, len(starts), "batches looked at"):
                indices = range(start, min(start + batch_size, count))
                images = [image for image in pool.map(self.read, indices) if image is not None]
                if images:
                    found += pool.map(self.keep, images, self.predictor.predict([image.pixels for image in images]))
        bad = [{"image": self.source.name(index), "reason": self.bad[index]} for index in sorted(self.bad)]
        if not found:
            raise UserError(
                f"none of {count} images can be read, such as {bad[0]['image']}: {bad[0]['reason']}; "
                "give images like those that the model was trained on"
            )
        return {"images": found, "bad_images": bad}


def _save(pixels: NDArray[Any], out: Path, name: str) -> str:
    """Write a picture or mask; returns its path relative to `out`."""
    from PIL import Image

    path = out / name
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path, quality=90, subsampling=0)
    return name
