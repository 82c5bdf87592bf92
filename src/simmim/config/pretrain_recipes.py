"""All pretraining recipes by name, and what a pretraining starts from where none is named.

`simmim recipes` lists them; `pixel_recipes`, `feature_recipes` and `sound_recipes` define them.
"""

from collections.abc import Collection
from dataclasses import replace

from simmim.config import feature_recipes, pixel_recipes, sound_recipes
from simmim.config.pretraining import PretrainConfig
from simmim.config.recipe_registry import RECIPES
from simmim.errors import UserError

__all__ = ["RECIPES", "feature_recipes", "find_recipe", "first_config", "pixel_recipes", "sound_recipes"]

# Settings that ask for another objective than the usual one, or for parts of SimMIM. Those of version 0.1 come last.
_OF_OTHERS = frozenset(
    {
        *("objective", "objectives", "teacher", "target", "loss", "head", "plain_step", "engine", "backend"),
        *("clusters", "cluster_centres", "decoder_depth", "decoder_width"),
    }
)


def find_recipe(name: str) -> PretrainConfig:
    """Return a recipe's configuration. Raises `UserError` for an unknown name."""
    if name not in RECIPES:
        raise UserError(f"recipe {name!r} is not known; choose from {', '.join(RECIPES)}")
    return RECIPES[name]()


def first_config(given: Collection[str], model: str | None = None, *, sounds: bool = False) -> PretrainConfig:
    """Return what a pretraining starts from without recipe or file, by the names of the settings that are given.

    It is the recipe for useful features, `default-small`, or with an encoder that cannot leave patches out
    `default-small-resnet`; an encoder that is named has its own image size. Where an objective, a part of SimMIM or
    another engine is named, it is SimMIM. For `sounds` the recipe is `audio-small`.
    """
    if not _OF_OTHERS.isdisjoint(given):
        return PretrainConfig()
    if sounds:
        usual = sound_recipes.audio_small()
        if model is None:
            return usual
        return replace(usual, model=model) if model.startswith(("vit_", "deit")) else PretrainConfig()
    if model is None:
        return feature_recipes.default_small()
    sees_patches = model.startswith(("vit_", "deit"))
    usual = feature_recipes.default_small() if sees_patches else feature_recipes.default_small_resnet()
    return replace(usual, model=model, image_size=None)
