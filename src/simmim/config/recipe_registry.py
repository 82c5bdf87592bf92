"""Registry of pretraining recipes: named, complete configurations with paper, expected figure and command."""

from collections.abc import Callable

from simmim.config.pretraining import PretrainConfig

Recipe = Callable[[], PretrainConfig]
RECIPES: dict[str, Recipe] = {}


def recipe(function: Recipe) -> Recipe:
    """Register a recipe under its function's name, with hyphens."""
    RECIPES[function.__name__.replace("_", "-")] = function
    return function
