"""`simmim reconstruct`: what a pretrained model sees in images of one's own."""

from pathlib import Path

import numpy as np

from simmim.data.decode import BadImage, open_picture
from simmim.data.evaluation import eval_images
from simmim.data.sources import open_files, sniff
from simmim.errors import UserError
from simmim.method.objectives import PixelReconstruction
from simmim.training.pictures import save_png


def reconstruct(run: str | Path, images: tuple[str, ...], *, out: str | Path, count: int = 8, seed: int = 0) -> Path:
    """Draw up to `count` images as original, masked and reconstruction, in true colours; returns the PNG's path.

    `images` are files, or one thing that `--data` takes. Raises `UserError` for a run without a checkpoint, images that
    cannot be read, or a target that shows no picture.
    """
    from simmim.torch_engine.train.pretrain import judge_and_draw
    from simmim.torch_engine.train.storage import load_run

    if Path(out).suffix.lower() != ".png":
        raise UserError(f"--out {out} is not a .png file; name one")
    if count < 1:
        raise UserError(f"count {count} is less than 1; the default is 8")
    source = open_files(images)
    if len(images) > 1:
        _check(images)
    step, config = load_run(run)
    if not any(isinstance(each, PixelReconstruction) for each in config.objectives):
        kinds = ", ".join(each.kind for each in config.objectives)
        raise UserError(f"{run} was trained for {kinds} and predicts no pixels; reconstruct needs the objective pixels")
    assert config.image_size is not None
    chosen = np.arange(len(source))
    if len(chosen) > count:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(source))[:count])
    dtype = sniff(source, channels=config.channels)
    pixels = eval_images(source, chosen, size=config.image_size, channels=config.channels, dtype=dtype)
    _, panel = judge_and_draw(step, config, pixels, seed, pictures=count)
    if panel is None:
        raise UserError(f"target {config.target.kind} of {run} shows no picture; reconstruct needs a target of pixels")
    save_png(panel, Path(out))
    return Path(out)


def _check(images: tuple[str, ...]) -> None:
    """Refuse an image that is named and cannot be read; of a folder or a list, such are left out."""
    for image in images:
        try:
            open_picture(Path(image).read_bytes())
        except BadImage as error:
            raise UserError(f"{image} cannot be read: {error}; give other images") from None
