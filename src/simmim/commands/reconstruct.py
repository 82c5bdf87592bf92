"""`simmim reconstruct`: what a pretrained model sees in images, or sounds, of one's own."""

from pathlib import Path
from typing import Any

import numpy as np

from simmim.data.decode import open_picture
from simmim.data.evaluation import eval_images
from simmim.data.picture import BadImage
from simmim.data.sounds import read_as
from simmim.data.sources import ImageSource, check_files, open_files, read_raw, sniff
from simmim.data.windows import MiddleWindows
from simmim.errors import UserError
from simmim.training.feature_pictures import panel_of, principal_axes
from simmim.training.pictures import save_png
from simmim.training.run_directory import read_pretraining
from simmim.training.spectrogram_pictures import upright


def reconstruct(
    run: str | Path,
    images: tuple[str, ...],
    *,
    out: str | Path,
    count: int = 8,
    seed: int = 0,
    features: bool = False,
    wav: bool = False,
) -> Path:
    """Draw up to `count` images as original, masked and reconstruction, in true colours; returns the PNG's path.

    Of sounds it draws spectrograms, and with `wav` also writes what can be heard of each, to three files beside the
    PNG. With `features` draw them beside three principal axes of their features, as colours, of a run of any objective.
    `images` are files, or one thing that `--data` takes. Raises `UserError` for a run without a checkpoint, images that
    cannot be read, or a target that shows no picture.
    """
    if Path(out).suffix.lower() != ".png":
        raise UserError(f"--out {out} is not a .png file; name one")
    if count < 1:
        raise UserError(f"count {count} is less than 1; the default is 8")
    check_files(images)
    trained = read_pretraining(run)
    source = open_files(images, trained.frames)
    sounds = trained.input == "sounds"
    source = read_as(source, trained.sound.rate if sounds else None, str(run))
    if wav and (features or not sounds):
        raise UserError("--wav is for reconstructions of sounds; leave it out")
    if len(images) > 1:
        _check(source)

    from simmim.torch_engine.tasks.feature_maps import feature_maps
    from simmim.torch_engine.tasks.sound_pictures import picture_sounds, write_wavs
    from simmim.torch_engine.train.pretrain import judge_and_draw
    from simmim.torch_engine.train.storage import load_run

    step, config = load_run(run)
    if not features and not config.reconstructs:
        kinds = ", ".join(each.kind for each in config.objectives)
        raise UserError(f"{run} was trained for {kinds} and predicts no pixels; --features draws its features instead")
    assert config.image_size is not None
    chosen = np.arange(len(source))
    if len(chosen) > count:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(source))[:count])
    how: dict[str, Any] = {"size": config.read_size, "channels": config.channels}
    if config.crop == "pixels":
        source, how["fraction"] = MiddleWindows(source, config.image_size), 1.0
    pixels = eval_images(source, chosen, dtype=sniff(source, channels=config.channels), **how)
    if features:
        maps = feature_maps(step, config, pixels)
        if not np.isfinite(maps).all():
            raise UserError(f"features of {run} are not finite; use a checkpoint from before it diverged")
        if sounds:
            pixels, maps = picture_sounds(step, pixels), upright(maps)
        panel = panel_of(pixels, principal_axes(maps))
    else:
        _, panel = judge_and_draw(step, config, pixels, seed, pictures=count)
    if panel is None:
        raise UserError(f"target {config.target.kind} of {run} shows no picture; add --features to draw its features")
    save_png(panel, Path(out))
    if wav:
        write_wavs(step, config, pixels, seed, Path(out))
    return Path(out)


def _check(source: ImageSource) -> None:
    """Refuse an image that is named and cannot be read; of a folder or a list, such are left out."""
    for index in range(len(source)):
        try:
            open_picture(read_raw(source, index))
        except BadImage as error:
            raise UserError(f"{source.name(index)} cannot be read: {error}; give other images") from None
