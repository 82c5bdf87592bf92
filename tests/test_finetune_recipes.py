"""Fine-tuning recipes against the figures of the official configurations."""

import dataclasses
from pathlib import Path

import pytest

from simmim.cli import main
from simmim.config.finetune_recipes import FINETUNE_RECIPES, find_finetune_recipe
from simmim.config.tasks import ClassifyConfig, FinetuneConfig

SHARED = {
    "image_size": (224, 224),
    "batch_size": 2048,
    "epochs": 100,
    "warmup_epochs": 20,
    "lr": 1.25e-3,
    "warmup_lr": 2.5e-7,
    "min_lr": 2.5e-7,
    "schedule": "cosine",
    "weight_decay": 0.05,
    "betas": (0.9, 0.999),
    "clip_grad": 5.0,
    "rand_augment": 9,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "erase": 0.25,
    "eval_crop": 224 / 256,
}
# Layer decay, drop path, window.
OWN = {
    "simmim-vit-b-finetune": (0.65, 0.1, None),
    "simmim-swin-b-100ep-finetune": (0.9, 0.1, 7),
    "simmim-swin-b-800ep-finetune": (0.8, 0.1, 7),
    "simmim-swin-l-800ep-finetune": (0.7, 0.2, 14),
    "simmim-swinv2-b-800ep-finetune": (0.75, 0.1, 14),
}


@pytest.mark.parametrize("name", FINETUNE_RECIPES)
def test_fine_tuning_recipe_equals_the_official_configuration_field_by_field(name: str) -> None:
    recipe = find_finetune_recipe(name, ClassifyConfig)
    found = dataclasses.asdict(recipe)
    assert {field: found[field] for field in SHARED} == SHARED
    assert (recipe.layer_decay, recipe.drop_path, recipe.model_args.get("window_size")) == OWN[name]


@pytest.mark.parametrize("name", FINETUNE_RECIPES)
def test_fine_tuning_recipe_changes_nothing_else(name: str) -> None:
    recipe, plain = find_finetune_recipe(name, ClassifyConfig), ClassifyConfig()
    changed = {f.name for f in dataclasses.fields(plain) if getattr(recipe, f.name) != getattr(plain, f.name)}
    assert changed <= {*SHARED, "layer_decay", "drop_path", "model_args"}


@pytest.mark.parametrize("name", FINETUNE_RECIPES)
def test_fine_tuning_recipe_is_documented(name: str) -> None:
    text = FINETUNE_RECIPES[name].__doc__ or ""
    assert f"--recipe {name}" in text
    assert "reproduced here" in text
    assert f"`{name}`" in (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_an_unknown_fine_tuning_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "classify", "--recipe", "huge"]) == 2
    names = ", ".join(FINETUNE_RECIPES)
    assert capsys.readouterr().err == f"simmim: fine-tuning recipe 'huge' is not known; choose from {names}\n"


def test_a_recipe_of_another_task_is_refused() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class SortConfig(FinetuneConfig):
        task: str = "sort"

    with pytest.raises(ValueError, match="is for simmim finetune classify; use a recipe of this task"):
        find_finetune_recipe("simmim-vit-b-finetune", SortConfig)
