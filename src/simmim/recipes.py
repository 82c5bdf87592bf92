"""Named recipes: complete configurations with their paper, expected figure and command. `simmim recipes` lists them.

Adding one is adding a function here. What a recipe leaves to the user is the data, the run directory and the machine.
"""

from collections.abc import Callable

from simmim.config import PretrainConfig

Recipe = Callable[[], PretrainConfig]
RECIPES: dict[str, Recipe] = {}


def recipe(function: Recipe) -> Recipe:
    RECIPES[function.__name__.replace("_", "-")] = function
    return function


def find_recipe(name: str) -> PretrainConfig:
    """The configuration of a recipe; one-line `ValueError` for a name that is not one."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is not known; choose from {', '.join(RECIPES)}")
    return RECIPES[name]()


@recipe
def demo() -> PretrainConfig:
    """A very small ViT on the embedded emoji: a first picture in minutes on two cores.

    Paper: SimMIM (arXiv 2111.09886), its method at toy size.
    Expected: hidden shapes recognisably filled in; no accuracy is claimed.
    Cost: about four minutes on two CPU cores.
    Command: simmim pretrain --recipe demo --out runs/demo
    Reproduced here: yes, by `make demo`.
    """
    return PretrainConfig(
        data="demo",
        model="vit_tiny_patch16_224",
        model_args={"patch_size": 8, "depth": 6},
        image_size=(64, 64),
        mask_cell=16,
        mask_ratio=0.5,
        batch_size=64,
        epochs=100.0,
        lr=4e-3,
    )


@recipe
def small() -> PretrainConfig:
    """ViT-S/16 at 224 on one modest GPU, for some tens of thousands of images.

    Paper: SimMIM (arXiv 2111.09886); ViT-S is not in it, the settings are its 100-epoch ones for batch 256.
    Expected: no published figure.
    Cost: not measured.
    Command: simmim pretrain --recipe small --data IMAGES --out runs/small
    Not reproduced here.
    """
    return PretrainConfig(
        model="vit_small_patch16_224",
        image_size=(224, 224),
        batch_size=256,
        epochs=100.0,
        lr=2e-4,
        warmup_epochs=10.0,
        warmup_lr=1e-6,
        min_lr=1e-5,
    )
