"""All pretraining recipes by name. `simmim recipes` lists them; `pixel_recipes` and `feature_recipes` define them."""

from simmim.config import feature_recipes, pixel_recipes
from simmim.config.pretraining import PretrainConfig
from simmim.config.recipe_registry import RECIPES
from simmim.errors import UserError

__all__ = ["RECIPES", "feature_recipes", "find_recipe", "pixel_recipes"]


def find_recipe(name: str) -> PretrainConfig:
    """Return a recipe's configuration. Raises `UserError` for an unknown name."""
    if name not in RECIPES:
        raise UserError(f"recipe {name!r} is not known; choose from {', '.join(RECIPES)}")
    return RECIPES[name]()
