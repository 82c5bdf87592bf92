"""Sounds in fine-tuning: from the encoder's front end to settings and data."""

import dataclasses
from typing import Any

from simmim.config.sound import Sound
from simmim.config.tasks import ClassifyConfig, FinetuneConfig
from simmim.data.labelled.classes import LabelledImages
from simmim.data.sounds import as_sounds, holds_sounds
from simmim.errors import UserError
from simmim.torch_engine.tasks.base import TaskData

# Of images; for sounds the defaults are these.
_OFF: dict[str, Any] = {
    "flip": "none",
    "crop_scale": (1.0, 1.0),
    "eval_crop": 1.0,
    "rand_augment": 0.0,
    "erase": 0.0,
}


def with_sounds(config: FinetuneConfig, sound: Sound | None, data: TaskData) -> tuple[FinetuneConfig, TaskData]:
    """Return settings and data as a fine-tuning on sounds has them; of images, as they are.

    `sound` is the front end of the encoder, `None` for one of images. Raises `UserError` where encoder, data and
    settings are not for the same.
    """
    if not holds_sounds(data.train):
        if sound is not None:
            raise UserError(f"{config.init} is an encoder of sounds, and {config.data} holds none; give sounds")
        for option, given in {
            "--sound.*": config.sound != Sound(),
            "--time-mask": getattr(config, "time_mask", 0),
            "--band-mask": getattr(config, "band_mask", 0),
        }.items():
            if given:
                raise UserError(f"{option} is for sounds, and {config.data} holds images; leave it out")
        return config, data
    if not isinstance(config, ClassifyConfig) or not isinstance(data, LabelledImages):
        raise UserError(f"{config.data} holds sounds, and {config.command} is for images; use finetune classify")
    if sound is None and config.init != "scratch":
        raise UserError(f"{config.init} is an encoder of images, and {config.data} holds sounds; pretrain on sounds")
    for name, off in _OFF.items():
        if getattr(config, name) not in (off, getattr(ClassifyConfig, name)):
            raise UserError(f"--{name.replace('_', '-')} is for images, and {config.data} holds sounds; leave it out")
    front = config.sound
    if sound is not None:
        if front.as_table() not in (Sound().as_table(), sound.as_table()):
            raise UserError(f"--sound.* differs from the front end of {config.init}; leave out all but gain and noise")
        front = dataclasses.replace(front, **sound.as_table())
    changes: dict[str, Any] = {**_OFF, "input": "sounds", "sound": front, "channels": config.channels or 1}
    if changes["channels"] != 1:
        raise UserError(f"channels {config.channels} is for images, and {config.data} holds sounds; leave it out")
    opened = {part: as_sounds(getattr(data, part), front.rate) for part in ("train", "val")}
    return dataclasses.replace(config, **changes), dataclasses.replace(data, **opened)
