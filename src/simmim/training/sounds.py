"""Sounds in a pretraining: recognise them, and refuse what is of images only."""

from simmim.config.pretraining import PretrainConfig
from simmim.config.sound import Sound
from simmim.data.sounds import as_sounds, holds_sounds
from simmim.data.sources import ImageSource
from simmim.errors import UserError
from simmim.method.targets import ClusterTarget

_OBJECTIVES = ("pixels", "ema", "descriptor")
"""Objectives that were tried on sounds and need no colours."""


def as_input(source: ImageSource, config: PretrainConfig) -> tuple[ImageSource, bool]:
    """Return a source as a training reads it, and whether it holds sounds.

    Raises `UserError` for settings that are not for what it holds.
    """
    if holds_sounds(source):
        check_sounds(config)
        return as_sounds(source, config.sound.rate), True
    if config.input == "sounds":
        raise UserError(
            f"these settings are for sounds, and {config.data} holds none; give sounds, or write audio:{config.data}"
        )
    if config.sound != Sound():
        raise UserError(f"--sound.* is for sounds, and {config.data} holds images; leave it out")
    return source, False


def check_sounds(config: PretrainConfig) -> None:
    """Raise `UserError` for settings that are of images and not of sounds."""
    refused = {
        f"--engine {config.engine}": (config.engine != "torch", "use --engine torch"),
        "--decode gpu": (config.decode != "cpu", "use --decode cpu"),
        f"--channels {config.channels}": (config.channels not in (1, PretrainConfig.channels), "leave it out"),
        f"--flip {config.flip}": (config.flip not in (None, "none"), "leave it out"),
        "--crop pixels": (config.crop != "resized", "leave it out"),
        "--crop-scale": (config.crop_scale not in (None, (1.0, 1.0)), "sounds are not resized; leave it out"),
        "--crop-ratio": (config.crop_ratio not in (None, (1.0, 1.0)), "sounds are not resized; leave it out"),
        "--no-antialias": (not config.antialias, "leave it out"),
        f"--target {config.target.kind}": (isinstance(config.target, ClusterTarget), "use pixels or normalized"),
    }
    for objective in config.objectives:
        here = objective.kind in _OBJECTIVES
        refused[f"objective {objective.kind}"] = (not here, f"use {', '.join(_OBJECTIVES[:-1])} or {_OBJECTIVES[-1]}")
    for option, (given, remedy) in refused.items():
        if given:
            raise UserError(f"{option} is for images, and {config.data} holds sounds; {remedy}")
