"""Ways to train with a peer, for `features_vs_peers.py`, which describes them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

Arguments = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to train with a peer: its arguments by image size."""

    peer: str
    arguments: Callable[[int], Arguments]


def lightly_dino(size: int) -> Arguments:
    views = {"image_size": [size, size], "local_view": {"view_size": [size // 2, size // 2]}}
    return {"method": "dino", "transform_args": views}


def lightly_dino_tuned(size: int, rate: float) -> Arguments:
    found = lightly_dino(size) | lightly_tuned(rate)
    found["transform_args"] |= {
        "gaussian_blur": None,
        "global_view_1": {"gaussian_blur": None},
        "random_resize": {"min_scale": 0.3},
    }
    found["transform_args"]["local_view"] |= {
        "gaussian_blur": None,
        "random_resize": {"min_scale": 0.1, "max_scale": 0.3},
    }
    # Made for short runs: by default the last layer would not train for 1250 steps.
    found["method_args"] = {"student_freeze_last_layer_steps": 30, "momentum_start": 0.95}
    return found


def lightly_simclr(size: int) -> Arguments:
    return {"method": "simclr", "transform_args": {"image_size": [size, size]}}


def lightly_simclr_its_views(size: int, rate: float) -> Arguments:
    """Return the tuned arm with its own crops, jitter and temperature: in a short run its loss stays above chance."""
    found = lightly_simclr(size) | lightly_tuned(rate)
    found["transform_args"] |= {"gaussian_blur": None}
    return found


def lightly_simclr_tuned(size: int, rate: float) -> Arguments:
    found = lightly_simclr_its_views(size, rate) | {"method_args": {"temperature": 0.2}}
    found["transform_args"] |= {"random_resize": {"min_scale": 0.3}, "color_jitter": {"strength": 0.5}}
    return found


def lightly_tuned(rate: float) -> Arguments:
    """Return arguments for AdamW; lightly-train multiplies a rate by batch size / 256."""
    optimiser = {"lr": rate * 256 / 64, "weight_decay": 0.04}
    return {"optim": "adamw", "optim_args": optimiser, "batch_size": 64, "precision": "bf16-mixed"}


def stable_simclr(_: int) -> Arguments:
    """Return the example of its README: SimCLR, its default optimiser AdamW at 1e-3 and a cosine."""
    return {
        "temperature": 0.5,
        "projector": {"hidden_channels": [512, 128]},
        "batch_size": 256,
        "precision": "32-true",
        "augmentation": {"scale": [0.08, 1.0], "jitter": [0.4, 0.4, 0.2, 0.1], "blur": 1.0},
    }


def stable_simclr_tuned(size: int, rate: float) -> Arguments:
    return stable_simclr(size) | {
        "temperature": 0.2,
        "projector": {"hidden_channels": [512, 128], "norm_layer": "batch_norm"},
        "batch_size": 64,
        "precision": "bf16-mixed",
        "augmentation": {"scale": [0.2, 1.0], "jitter": [0.4, 0.4, 0.4, 0.1], "blur": 0.0},
        "optim": {
            "optimizer": {"type": "AdamW", "lr": rate, "weight_decay": 0.04},
            "scheduler": "LinearWarmupCosineAnnealing",
        },
    }


ARMS = {
    **{
        f"{name}, rate {rate:g}": Arm(name.split()[0], functools.partial(arguments, rate=rate))
        for rate in (1e-3, 3e-3)
        for name, arguments in {
            "lightly SimCLR": lightly_simclr_tuned,
            "stable SimCLR": stable_simclr_tuned,
            "lightly DINO": lightly_dino_tuned,
        }.items()
    },
    "lightly SimCLR, its views, rate 0.001": Arm("lightly", functools.partial(lightly_simclr_its_views, rate=1e-3)),
    "lightly DINO, defaults": Arm("lightly", lightly_dino),
    "stable SimCLR, defaults": Arm("stable", stable_simclr),
    "lightly SimCLR, defaults": Arm("lightly", lightly_simclr),
}
